# SPDX-License-Identifier: Apache-2.0
"""Names, keys and shapes of the detectors, what is frozen, and what a configuration may not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gfl.models import GFL, build, create_model

FILES = {
    "gfl_r50_fpn_1x_coco": ("gfl_r50_1x", {}),
    "gfl_r101_fpn_ms-2x_coco": ("gfl_r101_2x", {}),
    "gfl_r101-dconv-c3-c5_fpn_ms-2x_coco": ("gfl_r101_2x", {"dcn": "v1", "dcn_stages": (3, 4, 5)}),
    "gfl_x101-32x4d_fpn_ms-2x_coco": ("gfl_x101_32x4d_2x", {}),
    "gfl_x101-32x4d-dconv-c4-c5_fpn_ms-2x_coco": ("gfl_x101_32x4d_2x", {"dcn": "v1", "dcn_stages": (4, 5)}),
}


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def meta_model(name: str, **fields: object) -> GFL:
    with torch.device("meta"):
        return create_model(name, **fields)


@pytest.mark.parametrize("file", FILES)
def test_the_state_dict_is_mmdets(file: str, data: Path) -> None:
    name, fields = FILES[file]
    assert shapes(meta_model(name, **fields)) == json.loads((data / "checkpoint_keys" / f"{file}.json").read_text())


@pytest.mark.parametrize("name", ["gfl_r101_dcnv2_2x", "gfl_x101_32x4d_dcnv2_2x"])
def test_version_2_learns_nine_weights_too(name: str) -> None:
    offsets = {k: v for k, v in shapes(meta_model(name)).items() if k.endswith("conv_offset.weight")}
    assert len(offsets) == 4 + 23 + 3 and all(shape[0] == 27 for shape in offsets.values())
    assert {key.split(".")[1] for key in offsets} == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "name", ["gflv2_r50_1x", "gflv2_r50_2x", "gflv2_r101_2x", "gflv2_r101_dcnv2_2x", "gflv2_x101_32x4d_dcnv2_2x"]
)
def test_the_second_version_has_a_quality_branch_more(name: str) -> None:
    """Keys and shapes as in GFocalV2: 1x1 convolutions from 4 sides × (4 peaks + mean) by 64 to one channel."""
    found, first = shapes(meta_model(name)), shapes(meta_model(name.replace("gflv2", "gfl")))
    assert {k: v for k, v in found.items() if k not in first} == {
        "bbox_head.reg_conf.0.weight": [64, 20, 1, 1],
        "bbox_head.reg_conf.0.bias": [64],
        "bbox_head.reg_conf.2.weight": [1, 64, 1, 1],
        "bbox_head.reg_conf.2.bias": [1],
    }
    assert {k: v for k, v in found.items() if k in first} == first


@pytest.mark.parametrize("name", ["gfl_r50_2x", "gfl_r18_1x", "gfl_tiny"])
def test_the_other_names(name: str) -> None:
    model = meta_model(name, num_classes=3)
    assert model.bbox_head.gfl_cls.weight.shape[0] == 3 == model.config.num_classes
    assert model.test.short_side == (192 if name == "gfl_tiny" else 800)


def test_a_slim_backbone_has_fractions_of_the_channels() -> None:
    model = meta_model("gfl_tiny", backbone="resnet34", width=16)
    assert model.backbone.channels == (32, 64, 128)
    assert meta_model("gfl_tiny", backbone="resnext101_32x4d", width=32).backbone.channels == (256, 512, 1024)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_stem_and_the_first_stage_are_frozen_and_norms_keep_their_statistics() -> None:
    model = meta_model("gfl_r18_1x").train()
    fixed = {name.split(".")[1] for name, _ in model.named_parameters()} - {n.split(".")[1] for n in trained(model)}
    assert fixed == {"conv1", "bn1", "layer1"}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    assert "backbone.layer2.0.bn1.weight" in trained(model)
    assert model.backbone.layer2.training


def test_minus_one_trains_everything_the_stem_too() -> None:
    model = meta_model("gfl_r18_1x", frozen_stages=-1, norm_eval=False).train()
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_zero_freezes_the_stem_alone() -> None:
    model = meta_model("gfl_r18_1x", frozen_stages=0, norm_eval=False).train()
    assert not {n for n in trained(model) if n.startswith(("backbone.conv1", "backbone.bn1"))}
    assert not model.backbone.bn1.training and model.backbone.layer1[0].bn1.training
    assert "backbone.layer1.0.conv1.weight" in trained(model)


def test_freezing_can_be_changed_and_the_configuration_follows() -> None:
    model = meta_model("gfl_r18_1x").train()
    model.backbone.freeze(-1, norm_eval=False)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert all(m.training for m in model.modules())
    assert (model.config.frozen_stages, model.config.norm_eval) == (-1, False)
    assert shapes(build(model.config)) == shapes(model)


def test_weights_start_as_published(seed: int) -> None:
    torch.manual_seed(seed)
    model = create_model("gfl_r18_1x", num_classes=7)
    head = model.bbox_head
    torch.testing.assert_close(head.gfl_cls.bias.sigmoid(), torch.full((7,), 0.01))
    for conv in (head.gfl_reg, head.cls_convs[0].conv):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    # Of 64·9 outputs a channel: variance 2/576 for a ReLU. Of a pyramid: uniform up to √(6 / (in + out)).
    assert model.backbone.layer1[0].conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert model.neck.fpn_convs[0].conv.weight.abs().max().item() == pytest.approx((6 / (2 * 256 * 9)) ** 0.5, rel=0.02)
    assert not model.backbone.layer3[1].bn2.weight.any() and model.backbone.layer3[1].bn1.weight.all()
    assert not model.neck.fpn_convs[4].conv.bias.any()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"backbone": "resnet51"}, "`backbone` must be one of resnet18,.* got 'resnet51'"),
        ({"bakcbone": "resnet50"}, "no field `bakcbone`"),
        ({"num_classes": 0}, "`num_classes` must be >= 1, got 0"),
        ({"dcn": "v3"}, "`dcn` must be one of v1, v2, got 'v3'"),
        ({"dcn": "v2", "backbone": "resnet18"}, "`dcn` is for resnet50, resnet101 and resnext101_32x4d, got 'v2'"),
        ({"dcn": "v2", "dcn_stages": (1, 2)}, "`dcn_stages` must be among 2, 3, 4, 5"),
        ({"frozen_stages": 5}, r"`frozen_stages` must be in \[-1, 4\], got 5"),
        ({"head_groups": 33}, "`head_groups` must divide `head_channels`, 256, got 33"),
        ({"reg_max": 0}, r"`reg_max` must be in \[1, 128\], got 0"),
        ({"strides": (8, 16)}, "`strides` must be 8, 16, 32 and so on"),
        ({"strides": (4, 8, 16, 32)}, "`strides` must be 8, 16, 32 and so on"),
        ({"width": 40, "backbone": "resnext101_32x4d"}, "`width` must be in 16s for resnext101_32x4d, got 40"),
        ({"width": 0}, "`width` must be >= 1, got 0"),
        ({"topk": "nine"}, "`topk` must be of type int, got 'nine'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_network_is_said(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        create_model("gfl_r50_1x", **fields)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"gfl_x101_32x4d_dcnv2_2x.*got 'gfl_r51'"):
        create_model("gfl_r51")
