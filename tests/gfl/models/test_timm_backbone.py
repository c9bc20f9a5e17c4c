# SPDX-License-Identifier: Apache-2.0
"""Networks of timm as backbones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gfl import checkpoint
from gfl.config import preset
from gfl.models import build, create_model

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", (128, 256, 512)),
        ("convnext_atto", (80, 160, 320)),
        ("mobilenetv3_small_050", (16, 24, 288)),
        ("swin_tiny_patch4_window7_224", (192, 384, 768)),  # [B, H, W, C] inside
    ],
)
def test_it_is_a_backbone(name: str, channels: tuple[int, ...]) -> None:
    model = create_model("gfl_tiny", num_classes=3, backbone=f"timm:{name}")
    assert model.backbone.channels == channels
    images = torch.randn(2, 3, 224, 224)
    maps = model.backbone(images)
    assert [tuple(m.shape) for m in maps] == [(2, c, 224 // s, 224 // s) for c, s in zip(channels, (8, 16, 32))]
    targets = [{"boxes": torch.tensor([[20.0, 30, 150, 170]]), "labels": torch.tensor([1])}] * 2
    sum(model.train().loss(images, targets).values()).backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0
    assert model.eval()(images).boxes.shape == (2, 100, 4)


@pytest.mark.parametrize(
    ("name", "fixed", "trained"),
    [
        ("resnet18", "body.layer1.1.bn2.bias", "body.layer2.0.conv1.weight"),
        ("convnext_atto", "body.stages_0.blocks.1.mlp.fc2.bias", "body.stages_1.downsample.0.weight"),
        ("mobilenetv3_small_050", "body.blocks.0.0.bn2.bias", "body.blocks.1.0.conv_pw.weight"),
    ],
)
def test_stages_are_frozen_in_their_order(name: str, fixed: str, trained: str) -> None:
    model = create_model("gfl_r18_1x", backbone=f"timm:{name}").train()
    parameters = list(model.backbone.named_parameters())
    frozen = [key for key, parameter in parameters if not parameter.requires_grad]
    assert frozen == [key for key, _ in parameters[: len(frozen)]]
    assert frozen[-1] == fixed and parameters[len(frozen)][0] == trained
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    model.backbone.freeze(-1, norm_eval=False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["hf-hub:a/b", "resnet18.hf-hub:a/b", "resnet18:x", "no_such_net"])
def test_a_name_of_something_elsewhere_is_refused(name: str) -> None:
    """A checkpoint may name its backbone."""
    with pytest.raises(ValueError, match="has no model"):
        create_model("gfl_tiny", backbone=f"timm:{name}")


def test_the_stem_of_a_resnet_alone() -> None:
    backbone = create_model("gfl_r18_1x", backbone="timm:resnet18", frozen_stages=0).backbone
    assert {k for k, p in backbone.named_parameters() if not p.requires_grad} == {
        "body.conv1.weight", "body.bn1.weight", "body.bn1.bias"
    }  # fmt: skip


def test_a_checkpoint_brings_it_back() -> None:
    config = preset("gfl_tiny").replace(backbone="timm:mobilenetv3_small_050", num_classes=2)
    model = build(config.model)
    content = {"meta": checkpoint.meta(config, ["a", "b"]), "state_dict": model.state_dict()}
    again, _, _, _ = checkpoint.model_from(content)
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet19", "has no model 'resnet19'"),
        ("vit_tiny_patch16_224", "those of timm's vit_tiny_patch16_224 have 16, 16, 16"),
    ],
)
def test_what_is_no_backbone(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model("gfl_tiny", backbone=f"timm:{name}")
    with pytest.raises(ValueError, match="`dcn` is for resnet50"):
        create_model("gfl_tiny", backbone="timm:resnet18", dcn="v1")
