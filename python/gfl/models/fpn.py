# SPDX-License-Identifier: Apache-2.0
"""Feature pyramid (arXiv 1612.03144) over c3 to c5, with further levels by strided convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from .layers import Conv


class FPN(nn.Module):
    """One map per level, all with the same number of channels.

    The backbone's maps, projected, are summed from the coarsest down, the coarser one upsampled to the finer one's
    size by nearest neighbour; each further level is a convolution of the last one's output with stride 2. Weights start
    as in Glorot and Bengio's uniform initialisation, biases at 0.

    `inputs` are the channels of the backbone's maps, the finest first; there are `levels`, at least as many.
    """

    def __init__(self, inputs: Sequence[int], channels: int, levels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList([Conv(c, channels, size=1) for c in inputs])
        strides = [1] * len(inputs) + [2] * (levels - len(inputs))
        self.fpn_convs = nn.ModuleList([Conv(channels, channels, stride=s) for s in strides])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C_i, H_i, W_i]``, the finest first, to ``[B, channels, H_i, W_i]`` and further levels of half the size
        each, rounded up."""
        levels: list[Tensor] = []
        for lateral, x in zip(list(self.lateral_convs)[::-1], maps[::-1], strict=True):
            levels.insert(0, lateral(x, functional.interpolate(levels[0], size=x.shape[2:]) if levels else None))
        outputs: list[Tensor] = []
        for i, conv in enumerate(self.fpn_convs):
            outputs.append(conv(levels[i] if i < len(levels) else outputs[-1]))
        return outputs
