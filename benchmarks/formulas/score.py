# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores; see `formulas`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import average, widen

BCE = F.binary_cross_entropy_with_logits


def qfl(pred: Tensor, target: tuple[Tensor, Tensor], weight: Tensor, avg_factor: Tensor) -> Tensor:
    """Everything as background first, then overwritten at the positives."""
    label, score = target
    pred = widen(pred)
    sigmoid = pred.sigmoid()
    loss = BCE(pred, torch.zeros_like(pred), reduction="none") * sigmoid.pow(2.0)
    rows = ((label >= 0) & (label < pred.size(1))).nonzero().squeeze(1)
    classes = label[rows].long()
    distance = score[rows] - sigmoid[rows, classes]
    loss[rows, classes] = BCE(pred[rows, classes], score[rows], reduction="none") * distance.abs().pow(2.0)
    return average(loss.sum(1), weight, avg_factor)


def dense_qfl(pred: Tensor, target: tuple[Tensor, Tensor], weight: Tensor, avg_factor: Tensor) -> Tensor:
    label, score = target
    pred = widen(pred)
    dense = torch.where(label[:, None] == torch.arange(pred.size(1), device=pred.device), score[:, None], 0.0)
    loss = BCE(pred, dense, reduction="none") * (dense - pred.sigmoid()).square()
    return average(loss.sum(1), weight, avg_factor)


def focal(inputs: Tensor, targets: Tensor, reduction: str, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    inputs = widen(inputs)
    p = inputs.sigmoid()
    missed = (1 - p) * targets + p * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    loss = BCE(inputs, targets, reduction="none") * balance * missed.pow(gamma)
    return loss.sum() if reduction == "sum" else loss


def vfl(pred: Tensor, target: Tensor, avg_factor: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    pred = widen(pred)
    positive = (target > 0).to(target.dtype)
    weight = target * positive + alpha * (pred.sigmoid() - target).abs().pow(gamma) * (1 - positive)
    return average(BCE(pred, target, reduction="none") * weight, None, avg_factor)
