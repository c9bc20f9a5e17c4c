# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus's pyramid: a path aggregation network (arXiv 1803.01534) of ghost modules (arXiv 1911.11907)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .separable import layer, named, separable

# Filters of the pyramid's depthwise convolutions, and of those within ghost modules.
SIZE, GHOST_SIZE = 5, 3


class Ghost(nn.Module):
    """Half of the outputs come from a 1x1 convolution, the other half from a depthwise one of these."""

    def __init__(self, inputs: int, outputs: int, act: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.primary_conv = nn.Sequential(*layer(inputs, half, act=act))
        self.cheap_operation = nn.Sequential(*layer(half, half, GHOST_SIZE, depthwise=True, act=act))

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], 1)


class GhostBottleneck(nn.Module):
    """Two ghost modules beside a depthwise and a pointwise convolution; no activation after the sum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ghost1 = Ghost(inputs, outputs, act=True)
        self.ghost2 = Ghost(outputs, outputs, act=False)
        depthwise = layer(inputs, inputs, SIZE, depthwise=True, act=False)
        self.shortcut = nn.Sequential(*depthwise, *layer(inputs, outputs, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.ghost2(self.ghost1(x)) + self.shortcut(x)


class GhostPAN(nn.Module):
    """One map per level, all with the same, even number of channels.

    The backbone's maps are reduced by 1x1 convolutions. From the coarsest down, a level is made of the coarser one,
    upsampled bilinearly, and its own map; from the finest up again, of the finer one, at stride 2, and its own map. One
    further level is the sum of two strided convolutions, of the coarsest reduced map and of the level before.

    `inputs` are the channels of the backbone's maps, the finest first; `levels` is their number or one more.
    """

    def __init__(self, inputs: Sequence[int], channels: int, levels: int) -> None:
        super().__init__()

        def blocks() -> nn.ModuleList:
            each = (nn.Sequential(GhostBottleneck(2 * channels, channels)) for _ in steps)
            return nn.ModuleList(named("blocks", [block]) for block in each)

        def strided(count: int) -> nn.ModuleList:
            return nn.ModuleList(separable(channels, channels, SIZE, 2) for _ in range(count))

        steps, further = range(len(inputs) - 1), levels - len(inputs)
        self.reduce_layers = nn.ModuleList(named("conv bn act", layer(c, channels)) for c in inputs)
        self.top_down_blocks = blocks()
        self.downsamples = strided(len(steps))
        self.bottom_up_blocks = blocks()
        self.extra_lvl_in_conv, self.extra_lvl_out_conv = strided(further), strided(further)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """``[B, C_i, H_i, W_i]``, the finest first, to ``[B, channels, H_i, W_i]`` and a further level of half the
        coarsest's size, rounded up."""
        reduced = [layer(x) for layer, x in zip(self.reduce_layers, maps, strict=True)]
        inner = [reduced[-1]]
        for block, x in zip(self.top_down_blocks, reduced[-2::-1], strict=True):
            larger = functional.interpolate(inner[0], size=x.shape[2:], mode="bilinear", align_corners=False)
            inner.insert(0, block(torch.cat([larger, x], 1)))
        outputs = [inner[0]]
        for down, block, x in zip(self.downsamples, self.bottom_up_blocks, inner[1:], strict=True):
            outputs.append(block(torch.cat([down(outputs[-1]), x], 1)))
        for from_input, from_output in zip(self.extra_lvl_in_conv, self.extra_lvl_out_conv, strict=True):
            outputs.append(from_input(reduced[-1]) + from_output(outputs[-1]))
        return outputs
