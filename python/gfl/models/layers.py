# SPDX-License-Identifier: Apache-2.0
"""Small modules that neck and head are made of, named as in mmdet's state dicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution with a bias, or without one and followed by a group norm and a ReLU.

    Args:
        inputs, outputs: channels.
        size: of the kernel, odd; the input is padded so that stride 1 keeps its size.
        stride: of the convolution.
        groups: of the group norm; 0: there is none.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=groups == 0)
        self.gn = nn.GroupNorm(groups, outputs) if groups else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.gn is None else self.gn(x).relu_()


class Scale(nn.Module):
    """A learned factor, at first 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale
