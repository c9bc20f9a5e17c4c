# SPDX-License-Identifier: Apache-2.0
"""The network as it is run when nothing is trained: norms and factors in the convolutions, few calls.

What is folded, in fp64, before weights are rounded to the type they are used in:

- a batch norm into the convolution before it;
- ReLU, and the sum of a block or of the pyramid, into the convolution's call, where oneDNN or cuDNN has one for it;
- a level's `Scale` into that level's own copy of the distributions' convolution: 0.6 MB for five levels, since one
  shared convolution can't have five factors. The towers' weights stay shared.

On a CPU in fp32 the 3x3 convolutions go by `winograd`, those of the head over all levels at once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

import gfl_ops

from ..config import ModelConfig
from .deform import DeformConv2d
from .fpn import FPN
from .gfl import GFL
from .head import GFLHead
from .resnet import ResNet
from .winograd import Winograd, as_maps, as_rows, plan, tiles_in, tiles_of

# Fewer tiles or channels than these, and a direct convolution is faster (each tile reads all 36 transformed filters).
MIN_TILES, MIN_CHANNELS = 16, 64
# Sizes of input that oneDNN's own arrangements of a weight are kept for: two, and as many as take this many bytes.
PACKED, PACKED_BYTES = 2, 2**20


class FusedConv(nn.Module):
    """A convolution with bias, a summand and ReLU in one call where there is one.

    Args:
        weight: ``[K, C/groups, h, w]``.
        bias: ``[K]``.
        stride, padding, groups: as `nn.Conv2d`'s.
        relu: at the end.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0, groups: int = 1, relu: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.groups, self.relu = (stride, stride), (padding, padding), groups, relu
        self.register_buffer("weight", weight.detach().float().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.detach().float().contiguous())
        self._onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        self._cudnn = True
        self._packed: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._winograd: Winograd | None = None
        square = weight.shape[2:] == (3, 3) and min(weight.shape[:2]) >= MIN_CHANNELS
        self._minimal = square and (stride, padding, groups) == (1, 1, 1)

    @staticmethod
    def of(conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None, relu: bool = False) -> FusedConv:
        """A convolution, the batch norm after it, and ReLU."""
        weight, bias = folded(conv.weight, conv.bias, norm)
        return FusedConv(weight, bias, conv.stride[0], int(conv.padding[0]), conv.groups, relu)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """relu(convolution(x) + bias + summand), of ``[B, C, H, W]``."""
        if not torch.compiler.is_compiling():
            if x.device.type == "cpu" and x.dtype == torch.float32:
                if self._minimal and tiles_in(x.shape[0], [(x.shape[2], x.shape[3])]) >= MIN_TILES:
                    return self._by_tiles(x, summand)
                if self._onednn:
                    return self._by_onednn(x, summand)
            if x.device.type == "cuda" and self.relu and self._cudnn:
                found = self._by_cudnn(x, summand)
                if found is not None:
                    return found
        y = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)
        y = y if summand is None else y + summand
        return y.relu_() if self.relu else y

    def winograd(self) -> Winograd:
        """The transformed filters, made at the first use."""
        if self._winograd is None:
            self._winograd = Winograd(self.weight, self.bias)
        return self._winograd

    def _by_tiles(self, x: Tensor, summand: Tensor | None) -> Tensor:
        size = (int(x.shape[2]), int(x.shape[3]))
        where = plan(int(x.shape[0]), (size,))
        rows = self.winograd()(tiles_of(as_rows([x]), where), where)
        (y,) = as_maps(rows, x.shape[0], [size])
        y = y if summand is None else y.add_(summand)
        return y.relu_() if self.relu else y

    def _by_onednn(self, x: Tensor, summand: Tensor | None) -> Tensor:
        where = (self.padding, self.stride, (1, 1), self.groups)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self._packed.get(tuple(x.shape))
        if weight is None:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, list(x.shape))
            self._packed[tuple(x.shape)] = weight
            if len(self._packed) > max(PACKED, PACKED_BYTES // (4 * self.weight.numel())):
                self._packed.popitem(last=False)
        last = "relu" if self.relu else None
        if summand is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *where, last or "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, summand, weight, self.bias, *where, "add", None, last, [], None
        )

    def _by_cudnn(self, x: Tensor, summand: Tensor | None) -> Tensor | None:
        """None where cuDNN has no such call for these shapes or this type; that is not asked twice."""
        where = (self.stride, self.padding, (1, 1), self.groups)
        try:
            if summand is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *where)
            return torch.cudnn_convolution_add_relu(x, self.weight, summand, 1.0, self.bias, *where)
        except RuntimeError:
            self._cudnn = False
            return None


class FusedDeform(nn.Module):
    """A deformable convolution with the norm after it folded in, and ReLU."""

    bias: Tensor

    def __init__(self, conv: DeformConv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        inputs = conv.conv_offset.in_channels
        weight, bias = folded(conv.weight, None, norm)
        version = conv.modulated
        self.conv = DeformConv2d(inputs, weight.shape[0], conv.stride, conv.groups, version)
        self.conv.load_state_dict({**conv.state_dict(), "weight": weight})
        self.register_buffer("bias", bias[:, None, None].float())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).add_(self.bias).relu_()


def folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the norm after it, as it is in evaluation, in fp64.

    Raises:
        ValueError: a norm that keeps no statistics is another function of each batch.
    """
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    if norm is None:
        return weight, bias
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("gfl: a batch norm without running statistics can't be folded; detect without `optimize`")
    factor = (norm.running_var.double() + norm.eps).rsqrt() * norm.weight.detach().double()
    return weight * factor[:, None, None, None], (bias - norm.running_mean.double()) * factor + norm.bias.detach()


class FusedBlock(nn.Module):
    """A residual block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        pairs = [
            (getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")
        ]
        self.convs = nn.ModuleList(
            FusedDeform(conv, norm) if isinstance(conv, DeformConv2d) else FusedConv.of(conv, norm, relu=True)
            for conv, norm in pairs
        )
        shortcut = getattr(block, "downsample", None)
        self.shortcut = None if shortcut is None else FusedConv.of(shortcut[0], shortcut[1])

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        for conv in self.convs[:-1]:
            x = conv(x)
        return self.convs[-1](x, identity)


class FusedResNet(nn.Module):
    """A `ResNet` in evaluation."""

    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.stem = FusedConv.of(backbone.conv1, backbone.bn1, relu=True)
        self.pool = backbone.maxpool
        blocks = [[FusedBlock(block) for block in stage.children()] for stage in backbone.stages()]
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.pool(self.stem(images))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


def _conv_of(layer: nn.Module) -> nn.Conv2d:
    conv = layer.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    return conv


class FusedFPN(nn.Module):
    """A `FPN` in which a map's projection adds the enlarged coarser one."""

    def __init__(self, neck: FPN) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(FusedConv.of(_conv_of(conv)) for conv in neck.lateral_convs)
        self.outputs = nn.ModuleList(FusedConv.of(_conv_of(conv)) for conv in neck.fpn_convs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels: list[Tensor] = []
        above: Tensor | None = None
        for lateral, x in zip(list(self.laterals)[::-1], maps[::-1], strict=True):
            above = lateral(x, None if above is None else functional.interpolate(above, size=x.shape[2:]))
            levels.insert(0, above)
        outputs: list[Tensor] = []
        for i, conv in enumerate(self.outputs):
            outputs.append(conv(levels[i] if i < len(levels) else outputs[-1]))
        return outputs


Layer = TypeVar("Layer", bound=nn.Module)


def _list(layers: Iterable[Layer]) -> Sequence[Layer]:
    """A list of modules, typed."""
    return nn.ModuleList(layers)  # type: ignore[return-value]


class FusedHead(nn.Module):
    """A `GFLHead`, all levels by one call a layer where the device allows it."""

    def __init__(self, head: GFLHead) -> None:
        super().__init__()
        self.head = head
        self.cls_convs = _list(_Layer(conv) for conv in head.cls_convs)
        self.reg_convs = _list(_Layer(conv) for conv in head.reg_convs)
        self.gfl_cls = FusedConv.of(head.gfl_cls)
        self.gfl_reg = FusedConv.of(head.gfl_reg)
        self.factors = [float(scale.get_parameter("scale").detach()) for scale in head.scales]
        weight, bias = folded(head.gfl_reg.weight, head.gfl_reg.bias, None)
        self.scaled = _list(FusedConv(weight * f, bias * f, padding=1) for f in self.factors)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [(int(x.shape[2]), int(x.shape[3])) for x in maps]
        x = maps[0]
        # The filters are read once for all levels, so that their number of channels decides alone.
        tiled = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] >= MIN_CHANNELS
        if tiled and len(self.cls_convs) and not torch.compiler.is_compiling():
            cls_scores, reg_preds = self._by_tiles(maps, sizes)
        else:
            cls_features, reg_features = list(maps), list(maps)
            for layer in self.cls_convs:
                cls_features = layer(cls_features)
            for layer in self.reg_convs:
                reg_features = layer(reg_features)
            cls_scores = [self.gfl_cls(x) for x in cls_features]
            reg_preds = [conv(x) for conv, x in zip(self.scaled, reg_features, strict=True)]
        return [self.head.rescored(c, r) for c, r in zip(cls_scores, reg_preds)], reg_preds

    def _by_tiles(self, maps: Sequence[Tensor], sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        batch = int(maps[0].shape[0])
        where = plan(batch, tuple(sizes))
        first = tiles_of(as_rows(maps), where)
        found = []
        for tower, last in ((self.cls_convs, self.gfl_cls), (self.reg_convs, self.gfl_reg)):
            tiles = first
            for layer in tower:
                rows = layer.conv.winograd()(tiles, where)
                tiles = tiles_of(as_rows(layer.normed(as_maps(rows, batch, sizes))), where)
            found.append(as_maps(last.winograd()(tiles, where), batch, sizes))
        return found[0], [x.mul_(factor) for x, factor in zip(found[1], self.factors, strict=True)]


class _Layer(nn.Module):
    """A layer of a tower: convolution, group norm and ReLU of all levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv = FusedConv.of(_conv_of(layer))
        norm = layer.get_submodule("gn")
        assert isinstance(norm, nn.GroupNorm)
        self.norm = norm

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.normed([self.conv(x) for x in maps])

    def normed(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return gfl_ops.group_norm_relu(maps, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)


class FusedGFL(GFL):
    """A `GFL` for detection alone, with the results of `model` in evaluation.

    In fp32 its maps differ from the model's by about 1e-4 of their standard deviation. It holds copies: weights that
    change later are not seen, settings in `test` are.

    Args:
        model: any `GFL`. A backbone of timm stays as it is.
        dtype: of weights and maps; softmax, ranking and boxes are fp32 in any case.
    """

    def __init__(self, model: GFL, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        self._config, self.test, self.dtype = model.config, model.test, dtype
        with torch.no_grad():
            backbone = model.backbone
            self.backbone = FusedResNet(backbone) if isinstance(backbone, ResNet) else copy.deepcopy(backbone)  # type: ignore[assignment]
            self.neck = FusedFPN(model.neck)  # type: ignore[assignment]
            self.bbox_head = FusedHead(copy.deepcopy(model.bbox_head))  # type: ignore[assignment]
        self.to(dtype).eval().requires_grad_(False)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def train(self, mode: bool = True) -> FusedGFL:
        """Always in evaluation."""
        super().train(False)
        return self

    def predict_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return super().predict_maps(images.to(self.dtype, memory_format=torch.channels_last))
