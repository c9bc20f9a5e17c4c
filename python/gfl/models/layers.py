# SPDX-License-Identifier: Apache-2.0
"""Small modules that neck and head are made of, named as in mmdet's state dicts, and a convolution with its norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """A convolution with a bias; with `groups` without one, and followed by a group norm of so many and a ReLU.

    The input is padded so that stride 1 keeps its size.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=groups == 0)
        self.gn = nn.GroupNorm(groups, outputs) if groups else None

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        """The convolution of `x`, plus `summand` if given, then norm and ReLU if there are any."""
        x = self.conv(x)
        x = x if summand is None else x + summand
        return x if self.gn is None else self.gn(x).relu_()


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
