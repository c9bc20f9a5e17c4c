# SPDX-License-Identifier: Apache-2.0
"""The optimizer with its groups of weights, and the average of the weights over the steps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..config import TrainConfig

# Stages of a backbone, as this package and timm name them.
STAGE = re.compile(r"^backbone\.(?:.*\.)?(?:layer|stages?[._])(\d)")
STAGES = 4
# The key of a group of weights that its learning rate is multiplied with.
SCALE = "rate_scale"


def make_optimizer(model: nn.Module, settings: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW over a model's trainable weights."""
    graph = settings.graph and device.type == "cuda"

    # Fused: a few kernels for all weights, and on the CPU one pass over each. A graph reads its rate from a tensor.
    def rate() -> Any:
        return torch.tensor(settings.lr, device=device) if graph else settings.lr

    groups = [group | {"lr": rate()} for group in weight_groups(model, settings)]
    rest: dict[str, Any] = {"lr": rate(), "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(settings.momentum, 0.999), capturable=graph, **rest)
    return torch.optim.SGD(groups, momentum=settings.momentum, **rest)


def weight_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, Any]]:
    """A model's trainable weights by their share of the learning rate and their decay; by default all in one group."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = settings.norm_decay or parameter.ndim > 1
            groups.setdefault((settings.layer_decay ** depth(name), decays), []).append(parameter)
    result: list[dict[str, Any]] = []
    for (scale, decays), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters}
        if scale != 1:
            group[SCALE] = scale
        if not decays:
            group["weight_decay"] = 0.0
        result.append(group)
    return result


def depth(name: str) -> int:
    """How many stages of the backbone a weight is below neck and head, which are at 0; the stem is the last."""
    if not name.startswith("backbone."):
        return 0
    stage = STAGE.match(name)
    # timm counts stages from 0, under other names than `layer`.
    number = 0 if stage is None else int(stage[1]) + ("layer" not in stage[0])
    return STAGES + 1 - min(number, STAGES)


class Average(AveragedModel):
    """A moving average of a model's weights and statistics, whose decay rises to `decay` over the first steps.

    Early on it forgets fast, (1 + n)/(10 + n) after n steps, so that in a short training too the average has left the
    initial weights behind.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=self._mix, use_buffers=True)
        self.requires_grad_(False)
        self.decay = decay

    def _mix(self, averaged: Iterable[Tensor], current: Iterable[Tensor], number: Tensor | int) -> None:
        # The counter is on the CPU; what torch passes here may be on a GPU, and reading it would wait.
        count = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + count) / (10 + count))
        # torch passes values of one type at a time: one call for all, and counters as they are.
        mine, new = list(averaged), list(current)
        with torch.no_grad():
            if mine[0].is_floating_point():
                torch._foreach_lerp_(mine, new, weight)
            else:
                torch._foreach_copy_(mine, new)
