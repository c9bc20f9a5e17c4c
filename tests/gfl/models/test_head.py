# SPDX-License-Identifier: Apache-2.0
"""The quality branch of Generalized Focal Loss V2 against its formula."""

from __future__ import annotations

import math

import torch

from gfl.models import create_model
from gfl.models.head import joint_logit


def test_the_joint_logit_is_that_of_the_product(generator: torch.Generator) -> None:
    x, q = torch.randn(2, 1000, generator=generator, dtype=torch.float64).mul(6).unbind()
    product = x.sigmoid() * q.sigmoid()
    # fp32 against fp64: a few ulp of the logit, or of the two that it is computed from.
    torch.testing.assert_close(joint_logit(x, q).double(), product.logit(), rtol=1e-6, atol=5e-6)


def test_the_joint_logit_of_extreme_logits_is_finite_and_has_finite_gradients() -> None:
    x = torch.tensor([1e4, 1e4, -1e4, -1e4, 0.0], requires_grad=True)
    q = torch.tensor([1e4, -1e4, 1e4, -1e4, 1e4], requires_grad=True)
    joint = joint_logit(x, q)
    joint.sum().backward()
    torch.testing.assert_close(joint, torch.tensor([1e4 - math.log(2), -1e4, -1e4, -2e4, 0.0]))
    assert torch.isfinite(x.grad).all() and torch.isfinite(q.grad).all()


def test_scores_are_class_times_quality(seed: int) -> None:
    torch.manual_seed(seed)
    model = create_model("gfl_tiny", num_classes=3, width=16, quality_branch=True).eval()
    images = torch.randn(2, 3, 64, 96)
    for name, parameter in model.bbox_head.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2 if "conv" in name else 0.05)
    with torch.no_grad():
        joint, distributions = model.predict_maps(images)
        maps = model.neck(model.backbone(images))
        head = model.bbox_head
        for level, x in enumerate(maps):
            features = x
            for conv in head.cls_convs:
                features = conv(features)
            b, _, h, w = x.shape
            probability = distributions[level].view(b, 4, 17, h, w).softmax(2)
            greatest = probability.sort(2, descending=True).values[:, :, :4]
            statistics = torch.cat([greatest, greatest.mean(2, keepdim=True)], 2).reshape(b, 20, h, w)
            hidden = torch.nn.functional.conv2d(statistics, head.reg_conf[0].weight, head.reg_conf[0].bias).relu()
            quality = torch.nn.functional.conv2d(hidden, head.reg_conf[2].weight, head.reg_conf[2].bias).sigmoid()
            want = head.gfl_cls(features).sigmoid() * quality
            torch.testing.assert_close(joint[level].sigmoid(), want, rtol=1e-4, atol=1e-6)
    losses = model.loss(images, [{"boxes": torch.tensor([[5.0, 5, 50, 40]]), "labels": torch.tensor([1])}] * 2)
    sum(losses.values()).backward()
    assert head.reg_conf[0].weight.grad.abs().sum() > 0
