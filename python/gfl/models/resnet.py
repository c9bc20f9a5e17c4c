# SPDX-License-Identifier: Apache-2.0
"""Residual networks (arXiv 1512.03385) and ResNeXt (arXiv 1611.05431), named as in torchvision's and mmdet's files.

In bottlenecks the 3x3 convolution has the stride, not the first 1x1 one as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..config import ModelConfig
from .backbone import Backbone
from .deform import DeformConv2d
from .layers import conv_norm


class Architecture(NamedTuple):
    """Blocks of each stage; whether they are bottlenecks; groups of their 3x3 convolutions."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool
    groups: int = 1


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2, 2), False),
    "resnet34": Architecture((3, 4, 6, 3), False),
    "resnet50": Architecture((3, 4, 6, 3), True),
    "resnet101": Architecture((3, 4, 23, 3), True),
    "resnext101_32x4d": Architecture((3, 4, 23, 3), True, groups=32),
}
EXPANSION = 4


class Block(nn.Module):
    """Convolutions beside the identity, or beside a 1x1 convolution where the shape changes.

    Two of 3x3, or in a bottleneck 1x1, 3x3 and 1x1, the 3x3 one grouped or deformable.
    """

    def __init__(self, inputs: int, planes: int, stride: int, architecture: Architecture, dcn: str | None) -> None:
        super().__init__()
        self.downsample: nn.Sequential | None = None
        outputs = planes * EXPANSION if architecture.bottleneck else planes
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        if not architecture.bottleneck:
            self._add(1, nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False), planes)
            self._add(2, nn.Conv2d(planes, planes, 3, padding=1, bias=False), planes)
            return
        groups = architecture.groups
        # ResNeXt 32x4d: 32 groups of 4 channels where a ResNet has 64 channels.
        middle = planes if groups == 1 else planes * groups * 4 // 64
        self._add(1, nn.Conv2d(inputs, middle, 1, bias=False), middle)
        if dcn is None:
            self._add(2, nn.Conv2d(middle, middle, 3, stride, padding=1, groups=groups, bias=False), middle)
        else:
            self._add(2, DeformConv2d(middle, middle, stride, groups, modulated=dcn == "v2"), middle)
        self._add(3, nn.Conv2d(middle, outputs, 1, bias=False), outputs)

    def _add(self, number: int, conv: nn.Module, channels: int) -> None:
        self.add_module(f"conv{number}", conv)
        self.add_module(f"bn{number}", nn.BatchNorm2d(channels))

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each convolution with its norm."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in (1, 2, 3) if hasattr(self, f"conv{i}")]

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else conv_norm(self.downsample[0], self.downsample[1], x, relu=False)
        *pairs, last = self.pairs()
        for pair in pairs:
            x = conv_norm(*pair, x)
        return conv_norm(*last, x, summand=identity)


class ResNet(Backbone):
    """A residual network without its classifier, of one of the `ARCHITECTURES`.

    Weights start as in He et al.'s initialisation for a ReLU (arXiv 1502.01852, by the outputs), the last norm of each
    block at 0, so that a block starts as the identity, and deformable convolutions with offsets of 0.
    """

    def __init__(self, architecture: Architecture, config: ModelConfig) -> None:
        super().__init__()
        self.architecture = architecture
        width = config.width
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs, outputs = width, []
        for stage, count in enumerate(architecture.blocks):
            planes = width * 2**stage
            blocks = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                dcn = config.dcn if stage + 2 in config.dcn_stages else None
                blocks.append(Block(inputs, planes, stride, architecture, dcn))
                inputs = planes * EXPANSION if architecture.bottleneck else planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            outputs.append(inputs)
        self.channels = (outputs[1], outputs[2], outputs[3])
        self._initialise()
        self.freeze(config.frozen_stages, config.norm_eval)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.initialise()
            elif isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.pairs()[-1][1].get_parameter("weight"))

    def stages(self) -> list[nn.Module]:
        """The four stages, c2 to c5."""
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def stage_parameters(self, stages: int) -> Iterator[nn.Parameter]:
        for module in (self.conv1, self.bn1, *self.stages()[:stages]):
            yield from module.parameters()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps c3, c4, c5 of normalised images ``[B, 3, H, W]``, of ceil(H/s) × ceil(W/s) cells for s = 8, 16, 32."""
        maps = [self.maxpool(conv_norm(self.conv1, self.bn1, images))]
        for stage in self.stages():
            maps.append(stage(maps[-1]))
        return maps[2:]
