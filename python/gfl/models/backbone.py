# SPDX-License-Identifier: Apache-2.0
"""What every backbone has in common: three feature maps, and which of its parameters are trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

# Pixels per cell of the maps c3, c4 and c5.
STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """A network from images to the maps c3, c4 and c5; subclasses define its stages."""

    channels: tuple[int, int, int]  # of the three maps
    frozen_stages: int = -1  # set by `freeze`
    norm_eval: bool = False

    def fold_norms(self, fold: bool) -> None:
        """Whether `conv_norm` folds norms that keep their statistics into the convolutions before them."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.folded = fold  # type: ignore[assignment]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 of images ``[B, 3, H, W]``."""
        raise NotImplementedError

    def stage_parameters(self, stages: int) -> Iterable[nn.Parameter]:
        """The parameters of the stem and of the first `stages` stages."""
        raise NotImplementedError

    def freeze(self, stages: int, norm_eval: bool) -> None:
        """Train neither the stem nor the first `stages` stages (−1: train all).

        With `norm_eval` all batch norms keep their statistics in training too; their weights and biases are trained.
        """
        self.frozen_stages, self.norm_eval = stages, norm_eval
        self.requires_grad_(True)
        if stages >= 0:
            for parameter in self.stage_parameters(stages):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.modules() if mode else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                frozen = module.affine and not module.weight.requires_grad
                if self.norm_eval or frozen:
                    module.eval()
        return self
