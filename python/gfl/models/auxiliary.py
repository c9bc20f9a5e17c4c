# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus's assign guidance: a larger head on a second pyramid, which only a training has, assigns the objects."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TypeVar

from ..config import ModelConfig
from .head import GFLHead
from .layers import TowerLayer
from .separable import SLOPE

Value = TypeVar("Value")
# Groups of its norms, of which its channels are a multiple in the published detectors.
GROUPS = 32
# Its keys in a state dict, as in the authors' checkpoints.
KEYS = re.compile(r"aux_(fpn|head)\.")


class AuxiliaryHead(GFLHead):
    """A head of GFL on both pyramids' maps, with twice the channels of one, LeakyReLU and `aux_convs` convolutions."""

    def __init__(self, config: ModelConfig) -> None:
        channels = 2 * config.neck_channels
        wide = {"neck_channels": channels, "head_channels": channels, "head_groups": math.gcd(GROUPS, channels)}
        super().__init__(
            dataclasses.replace(config, head_convs=config.aux_convs, quality_branch=False, **wide)  # type: ignore[arg-type]
        )
        del self.integral  # which the authors' checkpoints have once
        for layer in (*self.cls_convs, *self.reg_convs):
            assert isinstance(layer, TowerLayer)
            layer.gn.slope = SLOPE


def without_auxiliary(weights: Mapping[str, Value]) -> dict[str, Value]:
    """The weights that detection needs."""
    return {key: value for key, value in weights.items() if not KEYS.match(key)}
