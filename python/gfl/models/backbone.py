# SPDX-License-Identifier: Apache-2.0
"""What every backbone has in common: three feature maps, and which of its parameters are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

# Pixels a cell of the maps that a backbone gives: c3, c4, c5.
STRIDES = (8, 16, 32)
FOLDED = "folded"


def norm_of_conv(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``, with the same gradients.

    Where `Backbone.fold_norms` asks for it, the norm keeps its statistics and the convolution has no bias, the
    convolution's weights are scaled instead of its results: with s = γ / √(σ² + ε), ``(s · w) * x + (β − s · μ)``.
    That saves the passes over the maps forward and backward, and the map that the norm would keep; results differ in
    their last digits.
    """
    asked = not norm.training and getattr(norm, FOLDED, False)
    if not asked or not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or conv.bias is not None:
        return norm(conv(x))
    if norm.running_mean is None or norm.running_var is None:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    shift = norm.bias - scale * norm.running_mean
    return functional.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class Backbone(nn.Module):
    """A network from images to the maps c3, c4 and c5; subclasses say what its stages are.

    Attributes:
        channels: of the three maps.
        frozen_stages: the stem and this many stages are not trained; −1: everything is. Set by `freeze`.
        norm_eval: batch norms keep their statistics also in training; their weights and biases are trained. Set by
            `freeze`.
    """

    channels: tuple[int, int, int]
    frozen_stages: int = -1
    norm_eval: bool = False

    def fold_norms(self, fold: bool) -> None:
        """Whether `norm_of_conv` makes one convolution of a convolution and a norm that keeps its statistics."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                setattr(module, FOLDED, fold)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 of images ``[B, 3, H, W]``."""
        raise NotImplementedError

    def stage_parameters(self, stages: int) -> Iterable[nn.Parameter]:
        """The parameters of the stem and of the first `stages` stages."""
        raise NotImplementedError

    def freeze(self, stages: int, norm_eval: bool) -> None:
        """Train neither the stem nor the first `stages` stages (−1: train all); `norm_eval` as in the attributes."""
        self.frozen_stages, self.norm_eval = stages, norm_eval
        self.requires_grad_(True)
        if stages >= 0:
            for parameter in self.stage_parameters(stages):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if mode:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and (self.norm_eval or _frozen(module)):
                    module.eval()
        return self


def _frozen(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and not weight.requires_grad
