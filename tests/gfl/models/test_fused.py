# SPDX-License-Identifier: Apache-2.0
"""The folded network against the plain one: the same maps, fewer calls, nothing changed in the original."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gfl.models import GFL, create_model
from gfl.models.fused import FusedConv, FusedGFL, FusedMaxPool, folded
from gfl.models.winograd import Winograd

TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed: no deformable convolution"
)


def detector(seed: int, name: str = "gfl_tiny", **fields: Any) -> GFL:
    """With norms, scales and biases as after a training: none of them neutral."""
    torch.manual_seed(seed)
    model = create_model(name, num_classes=6, **fields).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    head = model.bbox_head
    nn.init.normal_(head.gfl_cls.weight, std=0.1)
    nn.init.normal_(head.gfl_reg.weight, std=0.1)
    nn.init.normal_(head.gfl_reg.bias, std=0.5)  # type: ignore[arg-type]
    for scale in head.scales:
        nn.init.uniform_(scale.scale, 0.5, 2.0)  # type: ignore[arg-type]
    return model


KINDS: dict[str, dict[str, Any]] = {
    "basic": {},
    "wide-head": {"head_channels": 80, "head_groups": 8},
    "bottleneck": {"backbone": "resnet50", "width": 16},
    "groups": {"backbone": "resnext101_32x4d", "width": 16},
    "quality": {"quality_branch": True},
    "no-towers": {"head_convs": 0},
    "narrow": {"neck_channels": 24, "head_channels": 24},
    "three-levels": {"strides": (8, 16, 32)},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_maps_are_the_models(kind: str, seed: int) -> None:
    model = detector(seed, **KINDS[kind])
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 101, 165)
    want, got = model.predict_maps(images), FusedGFL(model).predict_maps(images)
    for wanted, found in zip(want[0] + want[1], got[0] + got[1], strict=True):
        # A minimal-filtering layer adds 4e-5 of the deviation, and there are up to 20 of them, whose errors add up as
        # their roots of squares do. Maps of a few cells have little deviation of their own.
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4 * max(float(wanted.abs().max()), 0.1))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@TORCHVISION
@pytest.mark.parametrize("dcn", ["v1", "v2"])
@torch.no_grad()
def test_deformable_convolutions_take_their_norms(dcn: str, seed: int) -> None:
    model = detector(seed, backbone="resnet50", width=16, dcn=dcn)
    images = torch.randn(1, 3, 64, 96)
    want, got = model.predict_maps(images), FusedGFL(model).predict_maps(images)
    for wanted, found in zip(want[0] + want[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_one_after_another_and_in_other_sizes(seed: int) -> None:
    """What is kept for a size is not used for another, and results repeat themselves bit for bit."""
    model = detector(seed)
    fused = FusedGFL(model)
    first = {}
    for size in ((64, 64), (96, 64), (64, 96), (128, 160), (64, 64), (96, 64)):
        images = torch.full((1, 3, *size), 0.3) + torch.linspace(-1, 1, size[1])
        maps = fused.predict_maps(images)[1]
        for found, wanted in zip(maps, model.predict_maps(images)[1], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4 * max(float(wanted.abs().max()), 0.1))
        if size in first:
            assert all(torch.equal(a, b) for a, b in zip(first[size], maps, strict=True))
        first[size] = maps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_as_near_as_autocast(dtype: torch.dtype, seed: int) -> None:
    model = detector(seed)
    images = torch.randn(1, 3, 96, 128)
    want = model.predict_maps(images)
    got = FusedGFL(model, dtype).predict_maps(images)
    with torch.autocast("cpu", dtype):
        mixed = model.predict_maps(images)
    last = torch.float32 if dtype == torch.bfloat16 else dtype
    assert all(m.dtype == last for m in got[0] + got[1])
    # Over all levels: the norm of the last one, a single cell, magnifies what rounding leaves by chance.
    for maps in zip(want, got, mixed, strict=True):
        exact, found, rounded = (torch.cat([m.float().flatten() for m in levels]) for levels in maps)
        error, other = ((x - exact).abs().mean() for x in (found, rounded))
        # Autocast keeps norms in fp32; folding rounds once where it rounds twice. Neither may lose a digit.
        assert error <= 2 * other + 1e-3


@pytest.mark.parametrize("kind", ["basic", "quality"])
@torch.no_grad()
def test_logits_in_bf16_do_not_tie(kind: str, seed: int) -> None:
    """In steps of 2⁻⁸ thousands of candidates would share a few hundred scores, and their order would be arbitrary."""
    model, images = detector(seed, **KINDS[kind]), torch.randn(1, 3, 96, 128)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.predict_maps(images)
    for cls_scores, reg_preds in (mixed, FusedGFL(model, torch.bfloat16).predict_maps(images)):
        for logits in (cls_scores[0], reg_preds[0]):
            assert logits.dtype == torch.float32 and logits.unique().numel() > 0.9 * logits.numel()


@torch.no_grad()
def test_detections_and_settings(seed: int) -> None:
    model = detector(seed)
    torch.nn.init.zeros_(model.bbox_head.gfl_cls.bias)  # type: ignore[arg-type]
    fused = FusedGFL(model).train()
    assert not fused.training and fused.config == model.config
    fused.test.score_threshold = 0.5
    images = torch.randn(2, 3, 96, 96)
    want, got = model(images), fused(images)
    assert want.count.min() > 0 and (got.scores[got.labels >= 0] > 0.5).all()
    # Boxes of locations whose scores differ by less than the maps' error may change places.
    torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=5e-3)


@torch.no_grad()
def test_a_norm_of_no_variance_and_a_bias_are_folded(generator: torch.Generator) -> None:
    conv, norm = nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7).eval()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_var.zero_()[3] = 4.0
    norm.running_mean.normal_(generator=generator)
    x = torch.randn(2, 5, 9, 8, generator=generator)
    weight, bias = folded(conv.weight, conv.bias, norm)
    want = norm.double()(conv.double()(x.double()))
    torch.testing.assert_close(nn.functional.conv2d(x.double(), weight, bias, padding=1), want)


def test_a_norm_without_statistics_is_refused() -> None:
    model = create_model("gfl_tiny", num_classes=6)
    model.backbone.bn1 = nn.BatchNorm2d(model.backbone.bn1.num_features, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        FusedGFL(model)


# By oneDNN's names.
ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "leaky_relu": lambda x: torch.where(x > 0, x, 0.1 * x)}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("summand", [False, True])
@pytest.mark.parametrize(("size", "stride", "channels"), [(3, 1, 64), (3, 2, 64), (1, 1, 16), (7, 2, 3)])
def test_a_call_of_every_kind(
    act: str, summand: bool, size: int, stride: int, channels: int, generator: torch.Generator
) -> None:
    conv = nn.Conv2d(channels, 64, size, stride, padding=size // 2)
    x = torch.randn(2, channels, 24, 20, generator=generator)
    want = conv.double()(x.double()).detach()
    more = torch.randn(want.shape, generator=generator) if summand else None
    want = want if more is None else want + more
    found = FusedConv.of(conv, act=act)(x, more)
    torch.testing.assert_close(found, ACTIVATIONS[act](want).float(), rtol=0, atol=2e-4)


class Calls(TorchDispatchMode):
    """Counts the operators of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_head_is_a_call_a_layer_and_norms_and_activations_are_gone(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = detector(seed)
    fused = FusedGFL(model)
    images = torch.randn(1, 3, 96, 96)
    with Calls() as plain:
        model.predict_maps(images)
    filters: list[Winograd] = []
    forward = Winograd.forward
    monkeypatch.setattr(Winograd, "forward", lambda self, *rest: filters.append(self) or forward(self, *rest))
    with Calls() as few:
        pyramid = fused.neck(fused.backbone(images.contiguous(memory_format=torch.channels_last)))
        filters.clear()
        fused.bbox_head(pyramid)
    # 20 of the backbone, 8 of the neck, two towers of two layers and an output for each of five levels.
    assert plain.count["convolution"] == 20 + 8 + 5 * 6
    assert not any("batch_norm" in name for name in few.count) and not few.count["convolution"]
    # And a norm with its ReLU for each of the towers' layers, as in the plain head.
    assert len(filters) == 6 and sum(n for name, n in few.count.items() if "group_norm" in name) == 4
    assert sum(n for name, n in plain.count.items() if "group_norm" in name) == 4


def test_biases_of_zeros_are_dropped_and_a_shortcut_s_is_its_branch_s(seed: int) -> None:
    model = detector(seed, backbone="resnet50", width=16)
    fused = FusedGFL(model)
    towers = (*fused.bbox_head.cls_convs, *fused.bbox_head.reg_convs)
    assert len(towers) == 4 and all(layer.conv.bias is None for layer in towers)
    pairs = zip(model.backbone.stages(), fused.backbone.stages(), strict=True)
    for plain, folded_block in (pair for stages in pairs for pair in zip(*stages, strict=True)):
        biases = [plain.bn3.bias - plain.bn3.weight * plain.bn3.running_mean / (plain.bn3.running_var + 1e-5).sqrt()]
        if plain.downsample is not None:
            assert folded_block.downsample[0].bias is None
            norm = plain.downsample[1]
            biases.append(norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())
        torch.testing.assert_close(folded_block.conv3.bias, sum(biases).detach(), rtol=0, atol=1e-5)
    nn.init.zeros_(model.neck.lateral_convs[0].conv.bias)
    assert FusedGFL(model).neck.lateral_convs[0].conv.bias is None


def test_what_it_holds_is_not_trained(seed: int) -> None:
    fused = FusedGFL(detector(seed))
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    maps: list[Tensor] = fused.predict_maps(torch.randn(1, 3, 64, 64))[0]
    assert not any(x.requires_grad for x in maps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: cuDNN's fused calls are its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_maps_on_a_gpu_cuda(dtype: torch.dtype, seed: int) -> None:
    model = detector(seed, backbone="resnet50", width=32)
    images = torch.randn(2, 3, 128, 160)
    want = model.predict_maps(images)
    got = FusedGFL(model, dtype).cuda().predict_maps(images.cuda())
    for wanted, found in zip(want[0] + want[1], got[0] + got[1], strict=True):
        # TF32 of cuDNN has 10 bits, as fp16; bf16 has 7.
        share = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
        assert (found.float().cpu() - wanted).abs().mean() <= share * wanted.abs().max()


@torch.no_grad()
def test_it_is_one_graph_for_a_compiler(seed: int) -> None:
    """Without what only the eager path calls: prepacked weights, tables of tiles."""
    fused = FusedGFL(detector(seed))
    images = torch.randn(1, 3, 96, 128)
    want = fused.predict_maps(images)
    got = torch.compile(fused.predict_maps, backend="eager", fullgraph=True, dynamic=False)(images)
    for wanted, found in zip(want[0] + want[1], got[0] + got[1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4 * max(float(wanted.abs().max()), 0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 2), (8, 6), (7, 6), (6, 9), (1, 1)], ids=str)
def test_the_pool_is_torchs(size: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, *size, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 1] = x[0, 1].abs().neg()
    x[1, 2, 0, 0], x[1, 3] = float("nan"), float("-inf")
    want = nn.functional.max_pool2d(x, 3, 2, 1)
    torch.testing.assert_close(FusedMaxPool()(x), want, rtol=0, atol=0, equal_nan=True)
