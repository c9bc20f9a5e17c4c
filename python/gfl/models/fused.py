# SPDX-License-Identifier: Apache-2.0
"""The network as it runs when nothing is trained: norms and factors folded into the convolutions, few calls.

What is folded, in fp64, before weights are rounded to the type they are used in:

- a batch norm into the convolution before it;
- a shortcut's bias into that of the branch that it is added to; a bias of zeros is dropped, since it costs a GPU a
  launch;
- ReLU, and the sum of a block or of the pyramid, into the convolution's call, where oneDNN has one for it, or where
  cuDNN has one that is faster than separate calls;
- a level's `Scale` into that level's own copy of the distributions' convolution: 0.6 MB for five levels, since one
  shared convolution can't have five factors. The towers' weights stay shared.

On a CPU in fp32 the 3x3 convolutions go by `winograd`, those of the head over all levels at once. Together this takes
61 to 82 % of the time of ``torch.compile`` with frozen weights (R18 and R50 at 320, 640 and 800x1344, one core), and
oneDNN's fused calls up to 10 % less than separate ones.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .autotune import Fastest
from .deform import DeformConv2d
from .gfl import GFL
from .ghost_pan import GhostPAN
from .head import GFLHead
from .layers import Conv, TowerLayer
from .nanodet_head import NanoDetPlusHead
from .resnet import Block, ResNet
from .separable import SLOPE
from .shufflenet import ShuffleNetV2
from .winograd import Winograd, sizes_of, tiles_in

# With fewer tiles or channels a direct convolution is faster (each call reads all 36 transformed filters).
MIN_TILES, MIN_CHANNELS = 16, 64
# Activations by oneDNN's names.
NONE, RELU, LEAKY_RELU = "none", "relu", "leaky_relu"
# oneDNN's call of a convolution and an activation.
HAS_CONVOLUTION = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
CONVOLUTION: Any = torch.ops.mkldnn._convolution_pointwise.default if HAS_CONVOLUTION else None
# glibc returns freed memory to the system from a size on that grows with the largest buffer so far, and half of it is
# its limit: then no feature map of a small network costs page faults in every run.
HEAP_BYTES = 2**25 - 2**16
# Input sizes for which oneDNN's own layouts of a weight are kept: two, and as many as fit into this many bytes.
PACKED, PACKED_BYTES = 2, 2**20


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm after it, in fp64; it must keep statistics (ValueError)."""
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    if norm is None:
        return weight, bias
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("gfl: a batch norm without running statistics can't be folded; detect without `optimize`")
    statistics = norm.running_mean.double(), norm.running_var.double()
    return fuse_conv_bn_weights(weight, bias, *statistics, norm.eps, norm.weight.double(), norm.bias.double())


class FusedConv(nn.Module):
    """A convolution with bias, a summand and ReLU in one call where there is one; the shape of the filters is `conv`'s.

    A bias of zeros is the same as none.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, act: str = NONE) -> None:
        super().__init__()
        stride, padding = conv.stride[0], int(conv.padding[0])
        self.stride, self.padding, self.groups, self.act = (stride, stride), (padding, padding), conv.groups, act
        self._where = (self.padding, self.stride, (1, 1), conv.groups)
        self._slope: list[float | None] = [SLOPE] if act == LEAKY_RELU else []
        self.weight = nn.Buffer(weight.detach().float().contiguous(memory_format=torch.channels_last))
        self.bias = None if bias is None or not bias.any() else nn.Buffer(bias.detach().float().contiguous())
        self._onednn = CONVOLUTION is not None
        self._fastest = Fastest()
        self._packed: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._winograd: Winograd | None = None
        kind = (*weight.shape[2:], stride, padding, conv.groups)
        self._fits_winograd = weight.shape[1] >= MIN_CHANNELS and kind == (3, 3, 1, 1, 1)

    @staticmethod
    def of(
        conv: nn.Module, norm: nn.Module | None = None, act: str = NONE, more_bias: Tensor | None = None
    ) -> FusedConv:
        """A convolution, the batch norm after it, a bias that is added to its own, and an activation."""
        assert isinstance(conv, nn.Conv2d)
        weight, bias = folded(conv.weight, conv.bias, norm)
        return FusedConv(conv, weight, bias if more_bias is None else bias + more_bias, act)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """act(convolution(x) + bias + summand), of ``[B, C, H, W]``."""
        # A network of a hundred small convolutions takes a tenth of its time to decide: a known shape skips that.
        known = not torch.compiler.is_compiling() and x.shape in self._packed
        if known and summand is None and x.dtype == torch.float32 and x.device.type == "cpu":
            return self._by_onednn(x, None)
        if self.weight.shape[0] >= MIN_CHANNELS and self.uses_winograd([x]):
            (y,) = self._by_winograd([x])
            return self._activated(y if summand is None else y.add_(summand))
        if not torch.compiler.is_compiling():
            if x.device.type == "cpu" and x.dtype == torch.float32 and self._onednn:
                return self._by_onednn(x, summand)
            if x.device.type == "cuda" and self.act == RELU:
                return self._by_the_faster(x, summand)
        return self._separately(x, summand)

    def _separately(self, x: Tensor, summand: Tensor | None) -> Tensor:
        y = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        return self._activated(y if summand is None else y + summand)

    def _activated(self, y: Tensor) -> Tensor:
        if self.act == LEAKY_RELU:
            return functional.leaky_relu_(y, SLOPE)
        return y.relu_() if self.act == RELU else y

    def _by_the_faster(self, x: Tensor, summand: Tensor | None) -> Tensor:
        ways = {"separate": partial(self._separately, x, summand), "fused": partial(self._by_cudnn, x, summand)}
        return self._fastest((x.device, x.shape, x.dtype, summand is None), ways)

    def uses_winograd(self, maps: Sequence[Tensor]) -> bool:
        """Whether `levels` of these maps is one call, whatever the number of outputs: filters are read once for all.

        A compiler is left to choose for itself.
        """
        x = maps[0]
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
            return False
        return self._fits_winograd and tiles_in(x.shape[0], sizes_of(maps)) >= MIN_TILES

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several maps."""
        if not self.uses_winograd(maps):
            return [self(x) for x in maps]
        return [self._activated(y) for y in self._by_winograd(maps)]

    def _by_winograd(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self._winograd is None:
            self._winograd = Winograd(self.weight, self.bias)
        return self._winograd(maps)

    def _by_onednn(self, x: Tensor, summand: Tensor | None) -> Tensor:
        where = self._where
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._packed.get(x.shape)
        if weight is None:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, list(x.shape))
            self._packed[x.shape] = weight
            if len(self._packed) > max(PACKED, PACKED_BYTES // (4 * self.weight.numel())):
                self._packed.popitem(last=False)
        if summand is None:
            return CONVOLUTION(x, weight, self.bias, *where, self.act, self._slope, "")
        # Of activations after a sum it only has ReLU.
        last = self.act if self.act == RELU else None
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            x, summand, weight, self.bias, *where, "add", None, last, [], None
        )
        return y if last == self.act else self._activated(y)

    def _by_cudnn(self, x: Tensor, summand: Tensor | None) -> Tensor:
        """Raises RuntimeError where cuDNN has no such call for these shapes or this type."""
        where = (self.stride, self.padding, (1, 1), self.groups)
        if summand is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *where)
        return torch.cudnn_convolution_add_relu(x, self.weight, summand, 1.0, self.bias, *where)


class FusedDeform(nn.Module):
    """A deformable convolution with the norm after it folded in, and ReLU."""

    def __init__(self, conv: DeformConv2d, norm: nn.Module) -> None:
        super().__init__()
        weight, bias = folded(conv.weight, None, norm)
        self.conv = copy.deepcopy(conv)
        self.conv.weight = nn.Parameter(weight.float())
        self.bias = nn.Buffer(bias[:, None, None].float())

    def forward(self, x: Tensor, summand: None = None) -> Tensor:
        return self.conv(x).add_(self.bias).relu_()


class ScaledConv(nn.Module):
    """The distributions' convolution of all levels, with a factor for each."""

    def __init__(self, conv: nn.Conv2d, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors, self.shared = factors, FusedConv.of(conv)
        weight, bias = folded(conv.weight, conv.bias, None)
        self.scaled = nn.ModuleList(FusedConv(conv, weight * factor, bias * factor) for factor in factors)

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The convolution of each map times the level's factor."""
        if self.shared.uses_winograd(maps):
            return [x.mul_(factor) for x, factor in zip(self.shared.levels(maps), self.factors, strict=True)]
        return [conv(x) for conv, x in zip(self.scaled, maps, strict=True)]


class FusedMaxPool(nn.MaxPool2d):
    """3x3 at stride 2, on a CPU as maxima of whole rows and then of columns: a third of the time."""

    def __init__(self) -> None:
        super().__init__(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
        if torch.compiler.is_compiling() or x.device.type != "cpu" or not even:
            return super().forward(x)
        cells = x.permute(0, 2, 3, 1)
        rows = torch.maximum(cells[:, 0::2], cells[:, 1::2])
        torch.maximum(rows[:, 1:], cells[:, 1:-1:2], out=rows[:, 1:])
        y = torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
        torch.maximum(y[:, :, 1:], rows[:, :, 1:-1:2], out=y[:, :, 1:])
        return y.permute(0, 3, 1, 2)


def _fuse_norm(parent: nn.Module, conv: str, norm: str, more_bias: Tensor | None = None) -> None:
    """Puts one module in the place of a convolution, its norm and ReLU, as `layers.conv_norm` calls it."""
    layer, norm_layer = getattr(parent, conv), getattr(parent, norm)
    if isinstance(layer, DeformConv2d):
        setattr(parent, conv, FusedDeform(layer, norm_layer))
    else:
        setattr(parent, conv, FusedConv.of(layer, norm_layer, RELU, more_bias))
    setattr(parent, norm, nn.Identity())


def _fuse_block(block: Block) -> None:
    shortcut_bias = None
    if block.downsample is not None:
        conv, norm = block.downsample
        assert isinstance(conv, nn.Conv2d)
        weight, shortcut_bias = folded(conv.weight, conv.bias, norm)
        block.downsample = nn.Sequential(FusedConv(conv, weight, None), nn.Identity())
    last = len(block.pairs())
    for number in range(1, last + 1):
        _fuse_norm(block, f"conv{number}", f"bn{number}", shortcut_bias if number == last else None)


def fuse_sequences(network: nn.Module) -> None:
    """Makes one module of each convolution, batch norm and LeakyReLU that follow each other in an `nn.Sequential`."""
    for sequence in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        layers = list(sequence.named_children())
        for (name, conv), (_, norm), (_, act) in zip(layers, layers[1:], [*layers[2:], ("", None)]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                leaky = isinstance(act, nn.LeakyReLU)
                setattr(sequence, name, FusedConv.of(conv, norm, LEAKY_RELU if leaky else NONE))
        for name, module in layers:
            if isinstance(module, (nn.BatchNorm2d, nn.LeakyReLU)):
                delattr(sequence, name)


def _fuse_nanodet_head(head: NanoDetPlusHead, dtype: torch.dtype) -> NanoDetPlusHead:
    fused = copy.deepcopy(head)
    fuse_sequences(fused)
    fused.to(dtype)
    fused.gfl_cls = nn.ModuleList(FusedConv.of(conv) for conv in head.gfl_cls).to(_precise(dtype))
    return fused


def _precise(dtype: torch.dtype) -> torch.dtype:
    """Of the last layers: fp32 instead of bf16, of whose 8 bits many scores would be equal."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def _fuse_head(head: GFLHead, dtype: torch.dtype) -> GFLHead:
    fused = copy.deepcopy(head)
    for layer in (*fused.cls_convs, *fused.reg_convs):
        assert isinstance(layer, TowerLayer)
        layer.conv = FusedConv.of(layer.conv)  # type: ignore[assignment]
    fused.to(dtype)
    factors = [float(scale.get_parameter("scale").detach()) for scale in head.scales]
    fused.scales = nn.ModuleList(nn.Identity() for _ in factors)
    precise = _precise(dtype)
    fused.gfl_cls = FusedConv.of(head.gfl_cls).to(precise)  # type: ignore[assignment]
    fused.gfl_reg = ScaledConv(head.gfl_reg, factors).to(precise)  # type: ignore[assignment]
    fused.reg_conf = None if head.reg_conf is None else copy.deepcopy(head.reg_conf).to(precise)
    return fused


class FusedGFL(GFL):
    """A `GFL` for detection alone, with the results of `model` in evaluation.

    In fp32 its maps differ from the model's by about 1e-4 of their standard deviation. It holds copies: weights that
    change later are not seen, settings in `test` are. A backbone of timm stays as it is. `dtype` is that of weights and
    features; with bf16 the last layers and their logits are fp32. Softmax, ranking and boxes are fp32 in any case.
    """

    @torch.no_grad()
    def __init__(self, model: GFL, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        self._config, self.test, self.dtype = model.config, model.test, dtype
        self.backbone, self.neck = copy.deepcopy(model.backbone), copy.deepcopy(model.neck)
        for module in list(self.backbone.modules()):
            if isinstance(module, ResNet):
                _fuse_norm(module, "conv1", "bn1")
            elif isinstance(module, Block):
                _fuse_block(module)
        if isinstance(self.backbone, (ResNet, ShuffleNetV2)):
            self.backbone.maxpool = FusedMaxPool()
        if isinstance(self.backbone, ShuffleNetV2):
            fuse_sequences(self.backbone)
        if isinstance(self.neck, GhostPAN):
            fuse_sequences(self.neck)
        for layer in self.neck.modules():
            if isinstance(layer, Conv):
                layer.conv = FusedConv.of(layer.conv)  # type: ignore[assignment]
        self.to(dtype)
        head = model.bbox_head
        fuse = _fuse_nanodet_head if isinstance(head, NanoDetPlusHead) else _fuse_head
        self.bbox_head = fuse(head, dtype)
        torch.empty(HEAP_BYTES, dtype=torch.uint8)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FusedGFL:
        """Always in evaluation."""
        super().train(False)
        return self

    def predict_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return super().predict_maps(images.to(self.dtype, memory_format=torch.channels_last))
