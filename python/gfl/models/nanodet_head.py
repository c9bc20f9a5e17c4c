# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus's head: each level has its own depthwise separable convolutions, shared by classes and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

import gfl_ops

from ..config import ModelConfig
from .head import PRIOR_LOGIT
from .layers import last_layer
from .separable import separable

SIZE = 5


class NanoDetPlusHead(nn.Module):
    """Class and distribution logits at every location, of one 1x1 convolution per level.

    Weights start normal with deviation 0.01, the class logits' biases for a probability of 0.01.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_classes, self.reg_max = config.num_classes, config.reg_max
        widths = [config.neck_channels] + [config.head_channels] * config.head_convs
        outputs = config.num_classes + 4 * (config.reg_max + 1)
        self.cls_convs = nn.ModuleList(
            nn.Sequential(*(separable(*of, SIZE) for of in pairwise(widths))) for _ in config.strides
        )
        self.gfl_cls = nn.ModuleList(nn.Conv2d(widths[-1], outputs, 1) for _ in config.strides)
        # Holds no weights, but is part of the published state dicts.
        self.integral = gfl_ops.Integral(self.reg_max)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        for conv in self.class_layers():
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            nn.init.constant_(conv.bias[: self.num_classes], PRIOR_LOGIT)  # type: ignore[index]

    def class_layers(self) -> list[nn.Conv2d]:
        """The last layers of the class logits, one per level, which give the distributions' logits too."""
        return [conv for conv in self.gfl_cls if isinstance(conv, nn.Conv2d)]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``[B, inputs, H, W]`` per level to class logits ``[B, C, H, W]`` and the logits of the distances left, top,
        right and bottom, ``[B, 4(R+1), H, W]``, bins innermost."""
        outputs = [
            last_layer(last, [convs(x)], self.training)[0]
            for last, convs, x in zip(self.gfl_cls, self.cls_convs, maps, strict=True)
        ]
        return [y[:, : self.num_classes] for y in outputs], [y[:, self.num_classes :] for y in outputs]
