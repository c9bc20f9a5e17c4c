# SPDX-License-Identifier: Apache-2.0
"""What a network costs: parameters, arithmetic and bytes, counted without weights or images."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from ..config import Config
from ..models import build
from ..models.deform import DeformConv2d


class Cost(NamedTuple):
    """Of one image at the test size."""

    parameters: int
    multiply_adds: int  # of convolutions
    bytes: int  # of all weights and buffers
    size: tuple[int, int]  # (height, width) of the padded input


class _Rigid(nn.Module):
    """A deformable convolution as two plain ones, which need no torchvision."""

    def __init__(self, deformable: DeformConv2d) -> None:
        super().__init__()
        self.offset, self.weight, self.stride = deformable.conv_offset, deformable.weight, deformable.stride

    def forward(self, x: Tensor) -> Tensor:
        self.offset(x)
        return functional.conv2d(x, self.weight, None, self.stride, 1, groups=x.shape[1] // self.weight.shape[1])


def cost(config: Config) -> Cost:
    """The cost of a configuration's detector."""
    divisor = config.test.size_divisor
    height, width = (-(-side // divisor) * divisor for side in (config.test.short_side, config.test.long_side))
    with FakeTensorMode():
        model = build(config.model, config.test).eval()
        parameters = sum(p.numel() for p in model.parameters())
        size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, DeformConv2d):
                    setattr(module, name, _Rigid(child))
        counted = 0

        def count(module: nn.Module, _: object, output: Tensor) -> None:
            nonlocal counted
            weight = module.get_parameter("weight")
            counted += output.numel() * math.prod(weight.shape[1:])

        for module in model.modules():
            if isinstance(module, (nn.Conv2d, _Rigid)):
                module.register_forward_hook(count)
        with torch.no_grad():
            model.predict_maps(torch.empty(1, 3, height, width))
    return Cost(parameters, counted, size, (height, width))
