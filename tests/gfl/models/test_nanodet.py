# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus: the network against plain calls of torch, its keys, and files of its authors' program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gfl import checkpoint, preset
from gfl.models import GFL, build, create_model
from gfl.models.fused import FusedGFL

SIZES = [(64, 96), (96, 64), (52, 75)]
LEVELS = range(4)
# Millions of weights, as its authors' README states them: of the convolutions' filters.
PARAMETERS = {"m_320": 1.17, "m_416": 1.17, "m_1.5x_320": 2.44, "m_1.5x_416": 2.44}


@pytest.fixture
def model(seed: int) -> GFL:
    """A small one whose statistics and weights are all different."""
    torch.manual_seed(seed)
    config = preset("nanodet_plus_m_320").replace(width=12, neck_channels=8, head_channels=8, num_classes=3)
    model = build(config.model, config.test).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(value, 0.2, 1)  # type: ignore[arg-type]
        elif isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def as_published(model: GFL) -> dict[str, Tensor]:
    """The weights under the official keys."""
    renamed = {}
    for key, value in model.state_dict().items():
        key = key.replace("bbox_head.integral.", "head.distribution_project.")
        key = key.replace("bbox_head.", "head.") if key.startswith("bbox") else key
        renamed[key.replace("neck.", "fpn.") if key.startswith("neck") else key] = value.clone()
    return renamed


class Plain:
    """The network as its authors' description says, layer by layer from weights under the official keys."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {key: value.double() for key, value in weights.items()}

    def conv(self, x: Tensor, conv: str, norm: str, stride: int = 1, act: bool = True) -> Tensor:
        weight = self.weights[f"{conv}.weight"]
        groups = x.shape[1] // weight.shape[1]
        y = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (
            self.weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        y = functional.batch_norm(y, mean, var, scale, shift, eps=1e-5)
        return torch.where(y > 0, y, 0.1 * y) if act else y

    def separable(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        x = self.conv(x, f"{name}.depthwise", f"{name}.dwnorm", stride)
        return self.conv(x, f"{name}.pointwise", f"{name}.pwnorm")

    def shuffle_block(self, x: Tensor, name: str, stride: int) -> Tensor:
        half = x.shape[1] // 2
        one, two = (x, x) if stride == 2 else (x[:, :half], x[:, half:])
        if stride == 2:
            one = self.conv(one, f"{name}.branch1.0", f"{name}.branch1.1", 2, act=False)
            one = self.conv(one, f"{name}.branch1.2", f"{name}.branch1.3")
        two = self.conv(two, f"{name}.branch2.0", f"{name}.branch2.1")
        two = self.conv(two, f"{name}.branch2.3", f"{name}.branch2.4", stride, act=False)
        two = self.conv(two, f"{name}.branch2.5", f"{name}.branch2.6")
        return torch.stack([one, two], 2).flatten(1, 2)

    def ghost(self, x: Tensor, name: str, act: bool) -> Tensor:
        x = self.conv(x, f"{name}.primary_conv.0", f"{name}.primary_conv.1", act=act)
        return torch.cat([x, self.conv(x, f"{name}.cheap_operation.0", f"{name}.cheap_operation.1", act=act)], 1)

    def bottleneck(self, one: Tensor, two: Tensor, name: str) -> Tensor:
        x, name = torch.cat([one, two], 1), f"fpn.{name}.blocks.0"
        shortcut = self.conv(x, f"{name}.shortcut.0", f"{name}.shortcut.1", act=False)
        shortcut = self.conv(shortcut, f"{name}.shortcut.2", f"{name}.shortcut.3", act=False)
        return self.ghost(self.ghost(x, f"{name}.ghost1", True), f"{name}.ghost2", False) + shortcut

    def __call__(self, images: Tensor) -> list[Tensor]:
        x = self.conv(images.double(), "backbone.conv1.0", "backbone.conv1.1", 2)
        x, maps = functional.max_pool2d(x, 3, 2, 1), []
        for stage, count in ((2, 4), (3, 8), (4, 4)):
            for block in range(count):
                x = self.shuffle_block(x, f"backbone.stage{stage}.{block}", 2 if block == 0 else 1)
            maps.append(x)
        low, mid, high = (
            self.conv(x, f"fpn.reduce_layers.{i}.conv", f"fpn.reduce_layers.{i}.bn") for i, x in enumerate(maps)
        )
        larger = functional.interpolate(high, mid.shape[2:], mode="bilinear")
        inner = self.bottleneck(larger, mid, "top_down_blocks.0")
        larger = functional.interpolate(inner, low.shape[2:], mode="bilinear")
        levels = [self.bottleneck(larger, low, "top_down_blocks.1")]
        for i, own in enumerate((inner, high)):
            down = self.separable(levels[-1], f"fpn.downsamples.{i}", 2)
            levels.append(self.bottleneck(down, own, f"bottom_up_blocks.{i}"))
        further = self.separable(high, "fpn.extra_lvl_in_conv.0", 2)
        levels.append(further + self.separable(levels[-1], "fpn.extra_lvl_out_conv.0", 2))
        for i, x in enumerate(levels):
            for layer in range(2):
                x = self.separable(x, f"head.cls_convs.{i}.{layer}")
            last = f"head.gfl_cls.{i}"
            levels[i] = functional.conv2d(x, self.weights[f"{last}.weight"], self.weights[f"{last}.bias"])
        return levels


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_maps_are_those_of_plain_calls(model: GFL, size: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.randn(2, 3, *size, generator=generator)
    want = Plain(as_published(model))(images)
    with torch.no_grad():
        got = model.double().predict_maps(images.double())
    assert [tuple(x.shape[2:]) for x in want] == [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64)]
    for level, classes, sides in zip(want, *got, strict=True):
        torch.testing.assert_close(torch.cat([classes, sides], 1), level, rtol=1e-9, atol=1e-9)
        assert classes.shape[1] == 3 and sides.shape[1] == 32


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_fused_maps_are_the_models(model: GFL, size: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.randn(2, 3, *size, generator=generator)
    fused = FusedGFL(model)
    assert not [name for name, module in fused.named_modules() if isinstance(module, (nn.BatchNorm2d, nn.LeakyReLU))]
    with torch.no_grad():
        want, got = model.predict_maps(images), fused.predict_maps(images)
    for one, other in zip(want[0] + want[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * float(one.std()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = create_model(f"nanodet_plus_{name}")
    count = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Conv2d))
    assert round(count / 1e6, 2) == PARAMETERS[name]
    assert model.test.short_side == model.test.long_side == int(name[-3:]) and model.config.channel_order == "bgr"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"width": 11}, r"`width` must be even for shufflenetv2, got 11"),
        ({"neck_channels": 7}, r"`neck_channels` must be even for ghost_pan, got 7"),
        ({"strides": (8, 16, 32, 64, 128)}, r"`strides` must be 8, 16, 32 and so on, each twice the last, 3 to 4"),
        ({"quality_branch": True}, r"`quality_branch` is for `head` gfl"),
        ({"dcn": "v2"}, r"`dcn` is for resnet50"),
        ({"std": (1, 0, 1)}, r"`std` must be > 0"),
        ({"neck": "pan"}, r"`neck` must be one of fpn, ghost_pan, got 'pan'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_configuration_may_not_say(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("nanodet_plus_m_416", **fields)


def test_parts_go_with_those_of_other_models(generator: torch.Generator) -> None:
    images = torch.randn(1, 3, 64, 64, generator=generator)
    for fields in (
        {"backbone": "shufflenetv2", "strides": (8, 16, 32)},
        {"neck": "ghost_pan", "strides": (8, 16, 32, 64)},
        {"head": "nanodet_plus"},
    ):
        model = create_model("gfl_tiny", 3, **{"width": 8, **fields}).eval()
        with torch.no_grad():
            want, got = model.predict_maps(images), FusedGFL(model).predict_maps(images)
        assert len(want[0]) == len(model.config.strides)
        for one, other in zip(want[0] + want[1], got[0] + got[1], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_stages_freeze_from_the_stem_on(model: GFL) -> None:
    model.backbone.freeze(1, norm_eval=False)
    frozen = {name.split(".")[0] for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "stage2"}


def lightning(model: GFL, *, averaged: bool = True) -> dict[str, object]:
    """A checkpoint as the authors' training program writes it: networks side by side, an auxiliary head in each."""
    own = as_published(model)
    aux = {"aux_fpn.reduce_layers.0.conv.weight": torch.ones(8, 12, 1, 1), "aux_head.scales.0.scale": torch.ones(1)}
    weights = {f"model.{key}": value + (0 if not averaged else 1) for key, value in {**own, **aux}.items()}
    if averaged:
        weights |= {f"avg_model.{key}": value for key, value in {**own, **aux}.items()}
    return {"epoch": 299, "global_step": 366900, "pytorch-lightning_version": "1.9.0", "state_dict": weights}


@pytest.mark.parametrize("averaged", [True, False], ids=["averaged", "trained"])
def test_the_authors_checkpoints_load(model: GFL, averaged: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(lightning(model, averaged=averaged), path)
    weights = checkpoint.normalise(checkpoint.read(path))
    assert weights.source == "NanoDet-Plus"
    assert weights.notes[-1] == "left out: 2 weights of the auxiliary head, which only a training uses"
    with pytest.raises(ValueError, match=r"NanoDet-Plus can't tell short_side \(416\), long_side \(416\)"):
        checkpoint.model_from(path, strict=True)
    loaded = checkpoint.model_from(path, preset("nanodet_plus_m_320"), strict=True)
    assert loaded.model.config == model.config and loaded.config.test.short_side == 320
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_is_missing_in_a_checkpoint_is_named(model: GFL) -> None:
    weights = as_published(model)
    del weights["fpn.reduce_layers.0.conv.weight"]
    with pytest.raises(ValueError, match=r"not a NanoDet-Plus detector on a ShuffleNetV2.*neck.reduce_layers.0.conv"):
        checkpoint.model_from(weights, preset("nanodet_plus_m_320"))


def test_other_classes_keep_all_but_the_class_outputs(model: GFL) -> None:
    """The boxes' distributions come from the same layers, after the classes."""
    other = build(preset("nanodet_plus_m_320").replace(num_classes=5, width=12, neck_channels=8, head_channels=8).model)
    before, given = ({k: v.clone() for k, v in of.state_dict().items()} for of in (other, model))
    notes = checkpoint.load_weights(other, given, allow_new_head=True)
    layers = [f"bbox_head.gfl_cls.{level}" for level in LEVELS]
    counts = "the weights are for 3 classes, the model has 5"
    assert notes == [f"{counts}: new are the class outputs of {', '.join(layers)}, all else is taken over"]
    own = other.state_dict()
    assert {k for k, v in own.items() if not torch.equal(v, given[k])} == {
        f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")
    }
    for key in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        assert torch.equal(own[key][:5], before[key][:5]) and torch.equal(own[key][5:], given[key][3:])
    given[f"{layers[1]}.weight"] = torch.zeros(32, 8, 1, 1)
    with pytest.raises(ValueError, match=r"shape: bbox_head\.gfl_cls\.1\.weight is \[32, 8, 1, 1\] in the file, \[37"):
        checkpoint.load_weights(other, given, allow_new_head=True)
    assert all(torch.equal(v, own[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("classes", [3, 5])
def test_a_training_starts_from_the_authors_auxiliary_head(model: GFL, classes: int, tmp_path: Path) -> None:
    config = preset("nanodet_plus_m_320").replace(width=12, neck_channels=8, head_channels=8)
    theirs = build(config.replace(num_classes=3).model, training=True)
    theirs.load_state_dict(model.state_dict(), strict=False)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {f"avg_model.{key}": value for key, value in as_published(theirs).items()}}, path)
    own = build(config.replace(num_classes=classes).model, training=True)
    new = {k: v.clone() for k, v in own.state_dict().items()}
    notes = checkpoint.start(own, path)
    differing = {k for k, v in own.state_dict().items() if not torch.equal(v, theirs.state_dict()[k])}
    if classes == 3:
        assert notes == [] and not differing
        return
    assert notes[0].endswith("gfl_cls.3, aux_head.gfl_cls, all else is taken over")
    assert {key.rpartition(".")[0] for key in differing} == {
        *(f"bbox_head.gfl_cls.{level}" for level in LEVELS),
        "aux_head.gfl_cls",
    }
    # Of a file without one, as those for inference are.
    torch.save({"state_dict": as_published(model)}, path)
    again = build(config.replace(num_classes=3).model, training=True)
    new = {k: v.clone() for k, v in again.state_dict().items()}
    assert checkpoint.start(again, path) == ["the weights have no auxiliary head: the model's is new"]
    for key, value in again.state_dict().items():
        assert torch.equal(value, new[key] if key.startswith("aux_") else model.state_dict()[key])
