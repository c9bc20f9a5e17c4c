# SPDX-License-Identifier: Apache-2.0
"""The head of Generalized Focal Loss (arXiv 2006.04388): class and distribution logits at every location."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

import gfl_ops

from ..config import ModelConfig
from .layers import Scale, TowerLayer, last_layer

# Initial probability of an object at a location: keeps the first losses of the many background locations small.
PRIOR_PROBABILITY = 0.01
PRIOR_LOGIT = -math.log(1 / PRIOR_PROBABILITY - 1)
# The quality branch: how many of a side's highest probabilities it reads, and its hidden channels.
PEAKS, QUALITY_CHANNELS = 4, 64


def _upcast(x: Tensor) -> Tensor:
    """In fp32, or fp64 if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def joint_logit(class_logit: Tensor, quality_logit: Tensor) -> Tensor:
    """The logit of ``sigmoid(class_logit) · sigmoid(quality_logit)``, finite for all finite logits; fp32 or fp64.

    1/p − 1 = e^−x + e^−q (1 + e^−x), whose logarithm is the negative logit. So quality focal loss on it is the paper's
    loss on the product, and ranking by it is ranking by the product, which saturates.
    """
    x, q = _upcast(class_logit), _upcast(quality_logit)
    return -torch.logaddexp(-x, functional.softplus(-x) - q)


class GFLHead(nn.Module):
    """Two towers of convolutions, shared by all levels; each level has its own factor for the distributions' logits.

    A layer is computed for all levels before the next one, so that its norm and activation are one call.

    With ``config.quality_branch`` the class probabilities are multiplied by a quality, which a small network predicts
    from the four highest probabilities of each side's distribution and their mean (Generalized Focal Loss V2, arXiv
    2011.12885). Weights start normal with deviation 0.01, biases at 0, except the class logits' for a probability of
    0.01.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.reg_max, groups = config.reg_max, config.head_groups
        widths = [config.neck_channels] + [config.head_channels] * config.head_convs
        self.cls_convs = nn.Sequential(*(TowerLayer(*of, groups) for of in pairwise(widths)))
        self.reg_convs = nn.Sequential(*(TowerLayer(*of, groups) for of in pairwise(widths)))
        self.gfl_cls = nn.Conv2d(widths[-1], config.num_classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(widths[-1], 4 * (self.reg_max + 1), 3, padding=1)
        self.scales = nn.ModuleList([Scale() for _ in config.strides])
        # Holds no weights, but is part of the published state dicts.
        self.integral = gfl_ops.Integral(self.reg_max)
        self.reg_conf: nn.Module | None = None
        if config.quality_branch:
            statistics = nn.Conv2d(4 * (PEAKS + 1), QUALITY_CHANNELS, 1)
            self.reg_conf = nn.Sequential(statistics, nn.ReLU(inplace=True), nn.Conv2d(QUALITY_CHANNELS, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.gfl_cls.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """``[B, inputs, H, W]`` per level to class logits ``[B, C, H, W]`` and the logits of the distances left, top,
        right and bottom, ``[B, 4(R+1), H, W]``, bins innermost."""
        reg_preds = last_layer(self.gfl_reg, self.reg_convs(maps), self.training)
        reg_preds = [scale(x) for scale, x in zip(self.scales, reg_preds, strict=True)]
        cls_scores = last_layer(self.gfl_cls, self.cls_convs(maps), self.training)
        return [self.rescored(c, r) for c, r in zip(cls_scores, reg_preds, strict=True)], reg_preds

    def class_layers(self) -> list[nn.Conv2d]:
        """The last layers of the class logits, as many as there are sets of weights."""
        return [self.gfl_cls]

    def rescored(self, cls_score: Tensor, reg_pred: Tensor) -> Tensor:
        """A level's class logits, multiplied in probability by the quality if there is such a branch."""
        if self.reg_conf is None:
            return cls_score
        quality = last_layer(self.reg_conf, [self._peaks(reg_pred)], self.training)
        return joint_logit(cls_score, *quality).to(cls_score.dtype)

    def _peaks(self, reg_pred: Tensor) -> Tensor:
        """Each side's highest probabilities and their mean, ``[B, 4(PEAKS + 1), H, W]``."""
        probability = _upcast(reg_pred).unflatten(1, (4, self.reg_max + 1)).softmax(2)
        peaks = probability.topk(PEAKS, dim=2).values
        return torch.cat([peaks, peaks.mean(2, keepdim=True)], 2).flatten(1, 2).to(reg_pred.dtype)
