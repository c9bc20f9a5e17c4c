# SPDX-License-Identifier: Apache-2.0
"""Weighting and reduction of every loss: mmdet's rules, computed in the dtype of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dtypes import accumulator, as_dtype

AvgFactor = float | Tensor | None

# mmdet adds float32's epsilon to the average factor, so that a batch without positives does not divide by 0.
AVG_FACTOR_EPS = torch.finfo(torch.float32).eps


def check_reduction(
    op: str, loss_shape: torch.Size, names: str, pred: Tensor, weight: Tensor | None, reduction: str, avg_factor: object
) -> AvgFactor:
    """Check `weight`, `reduction` and `avg_factor` before the loss is computed. Returns the last."""
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    if weight is not None:
        checks.tensor(op, "weight", weight, checks.REAL)
        checks.shape(op, "weight", weight, names, loss_shape)
        checks.same_device(op, "weight", weight, "pred", pred)
    if avg_factor is None:
        return None
    if reduction == "sum":
        raise ValueError('avg_factor can not be used with reduction="sum"')
    if not isinstance(avg_factor, Tensor):
        return checks.number(op, "avg_factor", avg_factor, dtype=accumulator(pred.dtype))
    checks.tensor(op, "avg_factor", avg_factor, checks.FLOATING + checks.INTEGER)
    if avg_factor.numel() != 1:
        raise ValueError(checks.message(op, "avg_factor", "must hold one number", list(avg_factor.shape)))
    if not avg_factor.is_cpu:
        checks.same_device(op, "avg_factor", avg_factor, "pred", pred)
    return avg_factor


def factor_and_norm(
    reduction: str, avg_factor: float | Tensor | None, count: int, pred: Tensor, dtype: torch.dtype
) -> tuple[float, Tensor | None]:
    """How a kernel reduces the sum of `count` losses: multiply by the first result, then divide by the second, unless
    it is None, plus AVG_FACTOR_EPS. The host does not read an `avg_factor` on the device of `pred`."""
    if reduction != "mean":
        return 1.0, None
    if avg_factor is None:
        return _reciprocal(count), None
    if isinstance(avg_factor, Tensor) and avg_factor.device == pred.device:
        return 1.0, as_dtype(avg_factor.detach().reshape(()), dtype)
    return _reciprocal(float(avg_factor) + AVG_FACTOR_EPS), None


def _reciprocal(x: float) -> float:
    return 1.0 / x if x else float("inf")


def check_element_reduction(
    op: str, pred: Tensor, weight: Tensor | None, reduction: str, avg_factor: object
) -> tuple[Tensor | None, AvgFactor]:
    """`check_reduction` for a loss of pred's shape. Returns `weight`, which may have one number per row, ready to
    broadcast, and `avg_factor`."""
    shape = pred.shape
    if weight is not None:
        checks.tensor(op, "weight", weight, checks.REAL)
        if weight.shape != shape:
            rows, spread = shape[:1], shape[:1] + (1,) * (pred.dim() - 1)
            if weight.shape != rows and weight.shape != spread:
                rule = f"must have shape [N] = {list(rows)} or pred's, {list(shape)}"
                raise ValueError(checks.message(op, "weight", rule, list(weight.shape)))
            shape, weight = torch.Size(spread), weight.reshape(spread)
    return weight, check_reduction(op, shape, "pred's", pred, weight, reduction, avg_factor)


def reduce_loss(loss: Tensor, weight: Tensor | None, reduction: str, avg_factor: float | Tensor | None) -> Tensor:
    """Apply `weight` and `reduction`; with "mean" and an `avg_factor`, the sum over (avg_factor + 1.19e-07)."""
    if weight is not None:
        loss = loss * weight.to(loss.dtype)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if avg_factor is None:
        return loss.mean()
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.reshape(()).to(loss.dtype)
    return loss.sum() / (avg_factor + AVG_FACTOR_EPS)
