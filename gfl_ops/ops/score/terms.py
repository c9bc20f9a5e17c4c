# SPDX-License-Identifier: Apache-2.0
"""What the references of the losses of class scores are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.dtypes import clamp_infinite


def binary_cross_entropy(pred: Tensor, target: Tensor, activated: bool) -> tuple[Tensor, Tensor]:
    """Probability and element-wise binary cross entropy of logits, or of probabilities if `activated`."""
    if not activated:
        pred = clamp_infinite(pred)
        # −log q and −log p, between them by the target: one of them alone is a one-hot target's loss. torch's own takes
        # (1 − t)x − log p, where two terms of x's size leave the e^x of a logit far below 0. Linear above 40, where
        # fp64 does not tell log(1 + e^x) from x.
        negative, positive = (F.softplus(x, threshold=40.0) for x in (pred, -pred))
        return pred.sigmoid(), torch.lerp(negative, positive, target)
    # torch's own cross entropy stops the program where input or target leave [0, 1], refuses autocast, and floors the
    # logarithms at −100 in the value but not in its derivative by the target, infinite where a bf16 sigmoid saturates.
    # It is linear in the target, so that the two ends of the line serve any target, floored in both.
    valid = (pred >= 0) & (pred <= 1)
    with torch.autocast(pred.device.type, enabled=False):
        inside = torch.where(valid, pred, 0.5)
        positive = F.binary_cross_entropy(inside, torch.ones_like(inside), reduction="none")
        negative = F.binary_cross_entropy(inside, torch.zeros_like(inside), reduction="none")
        loss = target * positive + (1 - target) * negative
    # Multiplied, not chosen by `where`, whose other branch would hand NaN to every gradient.
    return pred, loss * torch.where(valid, 1.0, float("nan"))


def absolute_power(difference: Tensor, exponent: float) -> Tensor:
    """|difference|^exponent, with derivative 0 at 0 also for exponents below 1."""
    return finite_power(difference.abs(), exponent)


def finite_power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent with derivative 0 at 0; subnormal bases, where the derivative would overflow, count as 0."""
    zero = base.abs() < torch.finfo(base.dtype).tiny
    return torch.where(zero, 0.0 if exponent > 0 else 1.0, torch.where(zero, 1.0, base).pow(exponent))
