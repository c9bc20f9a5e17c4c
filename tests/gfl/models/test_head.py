# SPDX-License-Identifier: Apache-2.0
"""The head's layers against torch's own, and the quality branch of Generalized Focal Loss V2 against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import gfl_ops
from gfl.models import create_model
from gfl.models.head import GFLHead, joint_logit


class Calls(TorchDispatchMode):
    """The operators that ran, and the dtypes and layouts of their maps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append((function.__name__.split(".")[0], args[0] if args else None))
        return function(*args, **(kwargs or {}))


def level_by_level(head: GFLHead, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The head by torch's own group norm."""
    cls_scores, reg_preds = [], []
    for x, scale in zip(maps, head.scales, strict=True):
        features = [x, x]
        for number, tower in enumerate((head.cls_convs, head.reg_convs)):
            for layer in tower:
                norm = layer.gn
                y = functional.group_norm(layer.conv(features[number]), norm.num_groups, norm.weight, norm.bias)
                features[number] = y.relu()
        reg_preds.append(scale(head.gfl_reg(features[1])))
        cls_scores.append(head.rescored(head.gfl_cls(features[0]), reg_preds[-1]))
    return cls_scores, reg_preds


@pytest.mark.parametrize("quality", [False, True])
def test_maps_and_gradients_are_those_of_torch_s_group_norm(quality: bool, seed: int) -> None:
    torch.manual_seed(seed)
    head = create_model("gfl_tiny", num_classes=3, width=16, quality_branch=quality).bbox_head.double()
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if name.endswith("conv.weight") else 0.3)
    channels = head.gfl_cls.in_channels
    # In fp64, where no rounding moves a value to the other side of ReLU's bend.
    options: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}
    maps = [torch.randn(2, channels, *size, **options) for size in ((12, 20), (6, 10), (3, 5), (2, 3), (1, 2))]
    leaves = [*maps, *head.parameters()]
    found = []
    for forward in (head, lambda maps: level_by_level(head, maps)):
        cls_scores, reg_preds = forward(maps)
        loss = sum((m * torch.linspace(-1, 1, m.shape[3])).sum() for m in (*cls_scores, *reg_preds))
        found.append(([*cls_scores, *reg_preds], torch.autograd.grad(loss, leaves)))
    # Sums of a few thousand terms in another order, through two norms.
    for got, want in zip(*found, strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10 * float(w.detach().abs().max()))


def test_a_layer_is_one_norm_for_all_levels_and_copies_no_map_under_autocast(seed: int) -> None:
    torch.manual_seed(seed)
    head = create_model("gfl_tiny", num_classes=3, width=16).bbox_head.to(memory_format=torch.channels_last)
    sizes = ((12, 20), (6, 10), (3, 5), (2, 3), (1, 2))
    maps = [torch.randn(2, head.gfl_cls.in_channels, *s).contiguous(memory_format=torch.channels_last) for s in sizes]
    halves = [m.bfloat16() for m in maps]
    with torch.autocast("cpu", torch.bfloat16):
        (y, *_), _ = head.train()(halves)
        with Calls() as calls:
            head(halves)
    norms = [given for name, given in calls.found if "group_norm" in name]
    assert len(norms) == len(head.cls_convs) + len(head.reg_convs)
    for given in norms:
        assert [m.shape[2:] for m in given] == [torch.Size(s) for s in sizes]
        assert all(m.dtype == torch.bfloat16 and m.stride(1) == 1 for m in given)
    # Weights are cast; no map is cast or copied.
    copied = [given.shape for name, given in calls.found if name in ("_to_copy", "clone", "copy_") and given.dim() == 4]
    assert y.dtype == torch.bfloat16 and all(shape[2:] in ((3, 3), (1, 1)) for shape in copied)


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
            for layer in head.cls_convs:
                (features,) = layer([features])
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


def test_the_second_version_trains_and_finds_by_the_paper_s_formulas(seed: int) -> None:
    """arXiv 2011.12885, section 3: F = Topkm of four sides, I = σ(W₂ δ(W₁ F)), J = C × I; QFL on J, and ranking by J.

    Losses and gradients by plain sums of losses, and detections by probabilities.
    """
    torch.manual_seed(seed)
    size, classes = torch.tensor([[64, 96]] * 2), 3
    model = create_model(
        "gflv2_r50_1x", classes, backbone="resnet18", width=16, neck_channels=16, head_channels=16, head_groups=4,
        head_convs=1, strides=(8, 16, 32),
    ).double().eval()  # fmt: skip
    head = model.bbox_head
    for name, parameter in head.named_parameters():
        if "scales" not in name:
            torch.nn.init.normal_(parameter, std=0.3 if "conv" in name else 0.1)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    boxes = torch.tensor([[5.2, 5, 50, 40], [40, 20.3, 90, 60]], dtype=torch.float64)
    targets = [{"boxes": boxes[:1], "labels": torch.tensor([1])}, {"boxes": boxes, "labels": torch.tensor([2, 0])}]
    weights = [p for n, p in head.named_parameters() if "scales" not in n]
    losses = model.loss(images, targets, size)
    gradients = torch.autograd.grad(sum(losses.values()), weights)

    joint, logits, levels = [], [], []
    first, _, second = head.reg_conf
    for x in model.neck(model.backbone(images)):
        score = head.gfl_cls(head.cls_convs[0]([x])[0]).sigmoid().permute(0, 2, 3, 1)
        side = head.gfl_reg(head.reg_convs[0]([x])[0]).permute(0, 2, 3, 1).unflatten(-1, (4, 17))
        best = side.softmax(-1).sort(-1, descending=True).values[..., :4]
        statistics = torch.cat([best, best.mean(-1, keepdim=True)], -1).flatten(-2)
        hidden = (statistics @ first.weight.flatten(1).t() + first.bias).clamp(min=0)
        quality = 1 / (1 + torch.exp(-(hidden @ second.weight.flatten(1).t() + second.bias)))
        joint.append(score * quality)
        logits.append(side)
        levels.append((x.shape[2], x.shape[3]))
    strides = model.config.strides
    padded = torch.zeros(2, 2, 4, dtype=torch.float64)
    padded[0, :1], padded[1] = boxes[:1], boxes
    labels = torch.tensor([[1, -1], [2, 0]])
    found = gfl_ops.atss_assign(levels, strides, padded.float(), labels, valid_sizes=size)
    cells = [h * w for h, w in levels]
    step = torch.cat([torch.full((n,), float(s), dtype=torch.float64) for n, s in zip(cells, strides)]).expand(2, -1)
    points = torch.cat(
        [torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1) * s for (h, w), s in zip(levels, strides)]
    ).expand(2, -1, -1)
    j, side = (torch.cat([x.flatten(1, 2) for x in maps], 1) for maps in (joint, logits))
    assert bool((found.labels >= -1).all()) and int((found.labels >= 0).sum()) > 4
    chosen = found.labels >= 0
    image = chosen.nonzero()[:, 0]
    truth = padded[image, found.matched[chosen]] / step[chosen][:, None]
    centre = points[chosen] / step[chosen][:, None]
    distance = (side[chosen].softmax(-1) * torch.arange(17.0, dtype=torch.float64)).sum(-1)
    predicted = torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)
    want = torch.zeros_like(j)
    # mmdet's eps of the quality and of GIoU differ.
    iou = 1 - gfl_ops.box_iou_loss(predicted.detach(), truth, kind="iou", eps=1e-6, reduction="none")
    want[(*chosen.nonzero().t(), found.labels[chosen])] = iou
    qfl = (want - j).abs() ** 2 * -(want * j.log() + (1 - want) * (1 - j).log())
    positives = sum(max(1, int(n)) for n in chosen.sum(1))
    weight = j[chosen].detach().amax(1)
    norm = max(float(weight.sum()), 1.0)
    giou = gfl_ops.giou_loss(predicted, truth, reduction="none")
    aim = torch.cat([centre - truth[:, :2], truth[:, 2:] - centre], 1).clamp(0, 16 - 0.1)
    dfl = gfl_ops.distribution_focal_loss(side[chosen].flatten(0, 1), aim.flatten(), reduction="none")
    dfl = dfl.reshape(-1, 4).mean(1)
    sums = [qfl.sum() / positives, 2 * (weight * giou).sum() / norm, 0.25 * (weight * dfl).sum() / norm]
    for got, expected in zip(losses.values(), sums, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for got, expected in zip(gradients, torch.autograd.grad(sum(sums), weights), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    same = gfl_ops.quality_focal_loss(
        j.flatten(0, 1), (found.labels.flatten(), want.amax(2).flatten()), activated=True, reduction="sum"
    )
    torch.testing.assert_close(same, qfl.sum(), rtol=1e-9, atol=0)

    model.test.score_threshold = 0.02
    with torch.no_grad():
        detections = model(images, size)
        by_probability = gfl_ops.postprocess(
            [x.permute(0, 3, 1, 2) for x in joint], [x.flatten(-2).permute(0, 3, 1, 2) for x in logits], strides, size,
            score_threshold=0.02, topk_mode="anchor", activated=True,
        )  # fmt: skip
    assert torch.equal(detections.labels, by_probability.labels) and int(detections.count.min()) > 0
    torch.testing.assert_close(detections.scores, by_probability.scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(detections.boxes, by_probability.boxes, rtol=1e-5, atol=1e-4)
