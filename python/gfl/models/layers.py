# SPDX-License-Identifier: Apache-2.0
"""Small modules that neck and head are made of, named as in mmdet's state dicts, and a convolution with its norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

import gfl_ops


class Conv(nn.Module):
    """A convolution with a bias; the input is padded so that stride 1 keeps its size."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """The convolution of `x`, plus `summand` if given."""
        x = self.conv(x)
        return x if summand is None else x + summand


class GroupNormReLU(nn.GroupNorm):
    """Group norm and ReLU of all levels of a pyramid at once; LeakyReLU with a `slope`.

    With `plain` it is made of torch's own operators, for programs that run without this package.
    """

    plain = False
    slope = 0.0

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:  # type: ignore[override]
        if self.slope:
            return [functional.leaky_relu_(super(GroupNormReLU, self).forward(x), self.slope) for x in maps]
        if self.plain:
            return [torch.relu(super(GroupNormReLU, self).forward(x)) for x in maps]
        return gfl_ops.group_norm_relu(maps, self.num_groups, self.weight, self.bias, self.eps)


class TowerLayer(nn.Module):
    """A 3x3 convolution without bias, group norm and ReLU, of all levels of a pyramid."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.gn = GroupNormReLU(groups, outputs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.gn(over_levels(self.conv, maps))


def over_levels(conv: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """A convolution of each map; in one call if it has `levels` (see `models.fused`)."""
    together = getattr(conv, "levels", None)
    return [conv(x) for x in maps] if together is None else together(maps)


def in_own_precision(conv: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """`over_levels` in the dtype of the weights, whatever that of the maps is and autocast would take."""
    dtype, kind = next(chain(conv.parameters(), conv.buffers())).dtype, maps[0].device.type
    maps = [x.to(dtype) for x in maps]
    if not torch.is_autocast_enabled(kind):
        return over_levels(conv, maps)
    with torch.autocast(kind, enabled=False):
        return over_levels(conv, maps)


def last_layer(layer: nn.Module, maps: Sequence[Tensor], training: bool) -> list[Tensor]:
    """Logits. Those that are detected by are as precise as the layer's weights: in bf16 many would be equal."""
    return over_levels(layer, maps) if training else in_own_precision(layer, maps)


class Scale(nn.Module):
    """A learned factor, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor, relu: bool = True, summand: Tensor | None = None) -> Tensor:
    """``relu(norm(conv(x)) + summand)``.

    If the norm has `folded` set (see `Backbone.fold_norms`), keeps its statistics and the convolution has no bias, the
    convolution's weights are scaled instead of its output: with s = γ / √(σ² + ε), ``(s · w) * x + (β − s · μ)``. This
    saves the passes over the maps forward and backward, and the map that the norm would keep; results differ in the
    last digits. An `nn.Identity` as the norm means that the convolution does all of it (`models.fused`).
    """
    if isinstance(norm, nn.Identity):
        return conv(x, summand)
    if (
        isinstance(conv, nn.Conv2d)
        and conv.bias is None
        and isinstance(norm, nn.BatchNorm2d)
        and not norm.training
        and getattr(norm, "folded", False)
        and norm.running_mean is not None
        and norm.running_var is not None
    ):
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, shift = conv.weight * scale[:, None, None, None], norm.bias - scale * norm.running_mean
        y = functional.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
    else:
        y = norm(conv(x))
    y = y if summand is None else y + summand
    return torch.relu_(y) if relu else y
