# SPDX-License-Identifier: Apache-2.0
"""Deformable 3x3 convolutions, versions 1 (arXiv 1703.06211) and 2 (arXiv 1811.11168), on torchvision's operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TAPS = 9


class DeformConv2d(nn.Module):
    r"""A 3x3 convolution whose nine taps move by learned offsets, and in version 2 are also weighted.

    .. math:: y(p) = \sum_{k=1}^{9} w_k \, x(p + p_k + \Delta p_k) \, \Delta m_k, \qquad \Delta m_k = 1 \text{ in v1}

    where x is interpolated bilinearly, 0 outside of the map. A plain convolution, `conv_offset`, predicts the offsets,
    18 channels (y, x) tap by tap, and in version 2 nine more, whose sigmoids are the weights.

    It has the given stride and groups, which share the offsets; `modulated` is version 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, modulated: bool = False) -> None:
        super().__init__()
        self.stride, self.groups, self.modulated = stride, groups, modulated
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        self.conv_offset = nn.Conv2d(inputs, (3 if modulated else 2) * TAPS, 3, stride, padding=1)
        self.initialise()

    def initialise(self) -> None:
        """He et al.'s weights; offsets of 0."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, outputs, ceil(H/stride), ceil(W/stride)]``; needs torchvision."""
        try:
            from torchvision.ops import deform_conv2d
        except ImportError as error:
            need = "a backbone with `dcn` needs torchvision's deformable convolution"
            raise RuntimeError(f"gfl: {need}: pip install torchvision") from error
        learned = self.conv_offset(x)
        offset, mask = learned[:, : 2 * TAPS], None
        # In half precision a tap of a wide map would move in steps of a cell and more.
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            if self.modulated:
                mask = learned[:, 2 * TAPS :].to(dtype).sigmoid()
            y = deform_conv2d(x.to(dtype), offset.to(dtype), self.weight.to(dtype), None, self.stride, 1, mask=mask)
        return y.to(learned.dtype)

    def extra_repr(self) -> str:
        version = "v2" if self.modulated else "v1"
        return f"{self.conv_offset.in_channels}, {self.weight.shape[0]}, stride={self.stride}, {version}"
