# SPDX-License-Identifier: Apache-2.0
"""Distributions over bins: losses, integral, decoding; see `formulas`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import distance_to_box
from .common import average, widen


def dfl(pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor) -> Tensor:
    """Two cross entropies, each with its own softmax."""
    pred = widen(pred)
    left = target.long()
    right = left + 1
    loss = F.cross_entropy(pred, left, reduction="none") * (right - target)
    loss = loss + F.cross_entropy(pred, right, reduction="none") * (target - left)
    return average(loss, weight, avg_factor)


def dense_dfl(pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor) -> Tensor:
    """The two bins' weights are a hat function of the bin's distance to the target: one log-softmax, no gather."""
    bins = torch.arange(pred.size(1), device=pred.device)
    share = (1 - (bins - target[:, None]).abs()).clamp(min=0)
    return average(-(share * widen(pred).log_softmax(1)).sum(1), weight, avg_factor)


def dfl_two_bin(pred: Tensor, target: tuple[Tensor, Tensor, Tensor], weight: Tensor, avg_factor: Tensor) -> Tensor:
    left, weight_left, weight_right = target
    pred = widen(pred)
    loss = F.cross_entropy(pred, left, reduction="none") * weight_left
    loss = loss + F.cross_entropy(pred, left + 1, reduction="none") * weight_right
    return average(loss, weight, avg_factor)


def integral(pred: Tensor, reg_max: int) -> Tensor:
    pred = widen(pred)
    project = torch.linspace(0, reg_max, reg_max + 1, dtype=pred.dtype, device=pred.device)
    softmax = F.softmax(pred.reshape(-1, reg_max + 1), dim=1)
    return F.linear(softmax, project[None]).reshape(*pred.shape[:-1], 4)


def dense_integral(pred: Tensor, reg_max: int) -> Tensor:
    bins = torch.arange(reg_max + 1, device=pred.device)
    return (widen(pred).unflatten(-1, (4, reg_max + 1)).softmax(-1) * bins).sum(-1)


def dfl_integral(pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor) -> tuple[Tensor, Tensor]:
    project = torch.linspace(0, pred.size(1) - 1, pred.size(1), dtype=widen(pred).dtype, device=pred.device)
    distance = F.linear(F.softmax(widen(pred), dim=1), project[None]).squeeze(1)
    return dfl(pred, target, weight, avg_factor), distance


def dense_dfl_integral(pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor) -> tuple[Tensor, Tensor]:
    bins = torch.arange(pred.size(1), device=pred.device)
    return dense_dfl(pred, target, weight, avg_factor), (widen(pred).softmax(1) * bins).sum(1)


def ld(pred: Tensor, teacher: Tensor, weight: Tensor, avg_factor: Tensor, temperature: float = 10.0) -> Tensor:
    """A softmax, a log-softmax, and the divergence of each element."""
    target = F.softmax(widen(teacher) / temperature, dim=1)
    log_p = F.log_softmax(widen(pred) / temperature, dim=1)
    loss = F.kl_div(log_p, target, reduction="none").mean(1) * temperature**2
    return average(loss, weight, avg_factor)


def decode(
    pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: tuple[float, float] | None = None
) -> Tensor:
    return distance_to_box(points, integral(pred, reg_max) * stride[:, None], max_shape)


def dense_decode(
    pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: tuple[float, float] | None = None
) -> Tensor:
    distance = dense_integral(pred, reg_max) * stride[:, None]
    boxes = torch.cat([points - distance[:, :2], points + distance[:, 2:]], 1)
    if max_shape is None:
        return boxes
    return boxes.clamp(min=0).minimum(boxes.new_tensor([max_shape[1], max_shape[0]] * 2))
