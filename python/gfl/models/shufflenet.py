# SPDX-License-Identifier: Apache-2.0
"""ShuffleNetV2 (arXiv 1807.11164) with LeakyReLU, named as in torchvision's and NanoDet's files."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from .backbone import Backbone
from .separable import layer

STEM_CHANNELS = 24
BLOCKS = (4, 8, 4)


class ShuffleBlock(nn.Module):
    """Half of the channels pass through, the other half goes through convolutions, then both are interleaved.

    With a stride of 2 both halves are made of all channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(*layer(inputs, inputs, 3, 2, depthwise=True, act=False), *layer(inputs, half))
        self.branch2 = nn.Sequential(
            *layer(inputs if stride == 2 else half, half),
            *layer(half, half, 3, stride, depthwise=True, act=False),
            *layer(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        one, two = (x, x) if len(self.branch1) else x.chunk(2, 1)
        return functional.channel_shuffle(torch.cat([self.branch1(one), self.branch2(two)], 1), 2)


class ShuffleNetV2(Backbone):
    """The network without its classifier; `config.width` is 116 for 1.0x and 176 for 1.5x.

    Weights start normal with deviation 1 / (inputs per group), as in ShuffleNet's own code.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*layer(3, STEM_CHANNELS, 3, 2))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = [STEM_CHANNELS] + [config.width * 2**stage for stage in range(len(BLOCKS))]
        for stage, count in enumerate(BLOCKS):
            inputs, outputs = widths[stage], widths[stage + 1]
            blocks = [ShuffleBlock(inputs, outputs, 2), *(ShuffleBlock(outputs, outputs, 1) for _ in range(count - 1))]
            self.add_module(f"stage{stage + 2}", nn.Sequential(*blocks))
        self.channels = (widths[1], widths[2], widths[3])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / module.weight.shape[1])
        self.freeze(config.frozen_stages, config.norm_eval)

    def stages(self) -> list[nn.Module]:
        """The three stages, c3 to c5."""
        return [self.get_submodule(f"stage{i}") for i in range(2, 2 + len(BLOCKS))]

    def stage_parameters(self, stages: int) -> Iterator[nn.Parameter]:
        for module in (self.conv1, *self.stages()[:stages]):
            yield from module.parameters()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps c3, c4, c5 of normalised images ``[B, 3, H, W]``, of ceil(H/s) × ceil(W/s) cells for s = 8, 16, 32."""
        maps = [self.maxpool(self.conv1(images))]
        for stage in self.stages():
            maps.append(stage(maps[-1]))
        return maps[1:]
