# SPDX-License-Identifier: Apache-2.0
"""Residual networks (arXiv 1512.03385) and ResNeXt (arXiv 1611.05431), named as in torchvision's and mmdet's files.

In the blocks of three convolutions the 3x3 one has the stride, not the first 1x1 one as in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .backbone import Backbone, norm_of_conv
from .deform import DeformConv2d


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


def _conv3x3(inputs: int, outputs: int, stride: int, groups: int, dcn: str | None) -> nn.Module:
    if dcn is not None:
        return DeformConv2d(inputs, outputs, stride=stride, groups=groups, modulated=dcn == "v2")
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)


class _Block(nn.Module):
    """A branch of convolutions beside the identity, or beside a 1x1 convolution where the shape changes."""

    last_norm: nn.BatchNorm2d

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.downsample is not None:
            conv, norm = self.downsample
            identity = norm_of_conv(norm, conv, x)
        return self.relu(self.branch(x) + identity)


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__(inputs, planes, stride)
        self.conv1 = _conv3x3(inputs, planes, stride, 1, None)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes, 1, 1, None)
        self.bn2 = nn.BatchNorm2d(planes)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(norm_of_conv(self.bn1, self.conv1, x))
        return norm_of_conv(self.bn2, self.conv2, x)


class Bottleneck(_Block):
    """1x1, 3x3, 1x1; the 3x3 one may be grouped and deformable."""

    def __init__(self, inputs: int, planes: int, stride: int, groups: int, dcn: str | None) -> None:
        super().__init__(inputs, planes * EXPANSION, stride)
        # ResNeXt 32x4d: 32 groups of 4 channels where a ResNet has 64 channels.
        middle = planes if groups == 1 else planes * groups * 4 // 64
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = _conv3x3(middle, middle, stride, groups, dcn)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(norm_of_conv(self.bn1, self.conv1, x))
        x = self.relu(norm_of_conv(self.bn2, self.conv2, x))
        return norm_of_conv(self.bn3, self.conv3, x)


class ResNet(Backbone):
    """A residual network without its classifier.

    Args:
        architecture: depth and kind of the blocks, one of `ARCHITECTURES`.
        width: channels of the stem and of the first stage's inner convolutions; 64 in the published ones.
        dcn: "v1" or "v2": the bottlenecks' 3x3 convolutions are deformable (arXiv 1703.06211, 1811.11168).
        dcn_stages: which stages' are, 2 to 5 for c2 to c5.
        frozen_stages: the stem and this many stages are not trained; −1: everything is.
        norm_eval: batch norms keep their statistics also in training.

    Weights start as in He et al.'s initialisation for a ReLU (arXiv 1502.01852, by the outputs), the last norm of each
    block at 0, so that a block starts as the identity, and deformable convolutions without a deformation.
    """

    def __init__(
        self,
        architecture: Architecture,
        width: int = 64,
        dcn: str | None = None,
        dcn_stages: Sequence[int] = (3, 4, 5),
        frozen_stages: int = 1,
        norm_eval: bool = True,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs, outputs = width, []
        for stage, blocks in enumerate(architecture.blocks):
            planes = width * 2**stage
            layer: list[nn.Module] = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                if architecture.bottleneck:
                    deformable = dcn if stage + 2 in dcn_stages else None
                    layer.append(Bottleneck(inputs, planes, stride, architecture.groups, deformable))
                    inputs = planes * EXPANSION
                else:
                    layer.append(BasicBlock(inputs, planes, stride))
                    inputs = planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
            outputs.append(inputs)
        self.channels = (outputs[1], outputs[2], outputs[3])
        self._initialise()
        self.freeze(frozen_stages, norm_eval)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.initialise()
            elif isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def stages(self) -> list[nn.Module]:
        """The four stages, c2 to c5."""
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def stage_parameters(self, stages: int) -> Iterator[nn.Parameter]:
        for module in (self.conv1, self.bn1, *self.stages()[:stages]):
            yield from module.parameters()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps c3, c4, c5 of normalised images ``[B, 3, H, W]``, of ceil(H/s) × ceil(W/s) cells for s = 8, 16, 32."""
        x = self.maxpool(self.relu(norm_of_conv(self.bn1, self.conv1, images)))
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return maps[1:]
