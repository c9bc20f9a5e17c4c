# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss on the CPU in fp32, whose backward pass needs no second softmax; see core/grad_in_forward.py.

The forward pass keeps the exponentials of all bins, which take as much memory as the gradient needs anyway; finishing
turns them into the gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import backends, extension
from ...core.dtypes import as_dtype
from ...core.grad_in_forward import GradInForward, Grads, Inputs, Kernels, is_plain, wants_grad
from ...core.reduction import AVG_FACTOR_EPS, factor_and_norm, reduce_loss
from ...core.registry import SPECS, define

_INPUT = "Tensor pred, Tensor target, bool ignore_out_of_range"
# How rows become one number, if they do: factor · Σ weight · loss / (norm + epsilon).
_REDUCTION = "Tensor? weight, Tensor? norm, float factor, bool reduced"


def _fake_keep(
    pred: Tensor, target: Tensor, ignore: bool, distance: bool, weight: Tensor | None, norm: Tensor | None,
    factor: float, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = pred.shape[0]
    return (
        pred.new_empty(() if reduced else (rows,)), pred.new_empty(rows if distance else 0),
        pred.new_empty(pred.shape), pred.new_empty((2, rows)),
    )  # fmt: skip


_AVAILABLE = extension.serves("dfl_keep", "cpu")
if _AVAILABLE:
    keep = f"({_INPUT}, bool distance, {_REDUCTION}) -> (Tensor, Tensor, Tensor kept, Tensor sums)"
    define("dfl_keep", keep, _fake_keep)
    finish = f"(Tensor(a!) kept, Tensor sums, Tensor grad_loss, Tensor? grad_distance, {_INPUT}, {_REDUCTION}) -> ()"
    define("dfl_finish", finish, lambda *arguments: None)


def _forward(inputs: Inputs, constants: Any, store: bool = True) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    pred, target, weight, norm = inputs
    ignore, with_distance, factor, reduced = constants
    loss, distance, *buffers = torch.ops.gfl.dfl_keep(
        pred, target, ignore, with_distance, weight, norm, factor, reduced
    )
    return ((loss, distance) if with_distance else (loss,)), buffers


def _finish(buffers: list[Tensor], grads: Grads, inputs: Inputs, constants: Any) -> list[Tensor]:
    pred, target, weight, norm = inputs
    ignore, with_distance, factor, reduced = constants
    grad_distance = grads[1] if with_distance else None
    torch.ops.gfl.dfl_finish(*buffers, grads[0], grad_distance, pred, target, ignore, weight, norm, factor, reduced)
    return buffers[:1]


def _backward(grads: Grads, inputs: Inputs, constants: Any) -> Any:
    if not torch.is_grad_enabled():
        return _finish(_forward(inputs, constants)[1], grads, inputs, constants)
    pred, target, weight, norm = inputs
    ignore, with_distance, factor, reduced = constants
    assert pred is not None and target is not None
    grad_rows = grads[0]
    if reduced:
        grad_rows = grad_rows * factor if norm is None else grad_rows * factor / (norm + AVG_FACTOR_EPS)
        grad_rows = grad_rows.expand(target.shape) if weight is None else grad_rows * weight
    operator = torch.ops.gfl.dfl_integral_bwd if with_distance else torch.ops.gfl.dfl_bwd
    return operator(grad_rows, *grads[1:], pred, target, ignore, [True, False])[:1]


def _reference(inputs: Inputs, constants: Any) -> tuple[Tensor, ...]:
    pred, target, weight, norm = inputs
    ignore, with_distance, factor, reduced = constants
    results = SPECS["dfl_integral" if with_distance else "dfl"].reference(pred, target, ignore)
    loss, *distance = results if with_distance else (results,)
    if reduced:
        loss = (loss if weight is None else loss * weight).sum() * factor
        loss = loss if norm is None else loss / (norm + AVG_FACTOR_EPS)
    return loss, *distance


_KERNELS = Kernels(_forward, _finish, _backward, _reference, differentiable=2)


def dfl(
    stem: str,
    pred: Tensor,
    target: Tensor,
    ignore_out_of_range: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Any:
    """What the operator `stem`, "dfl" or "dfl_integral", gives, its loss reduced; None where it has to be called."""
    if not (_AVAILABLE and pred.is_cpu and pred.dtype == torch.float32 and wants_grad([pred])):
        return None
    if not is_plain([pred], [target]) or backends.serving(stem, "cpu") != "native":
        return None
    with_distance = stem == "dfl_integral"
    if reduction != "none" and is_plain([], [weight, avg_factor]) and _on_cpu(weight) and _on_cpu(avg_factor):
        factor, norm = factor_and_norm(reduction, avg_factor, pred.shape[0], pred, pred.dtype)
        weight = None if weight is None else as_dtype(weight, pred.dtype)
        constants = (ignore_out_of_range, with_distance, factor, True)
        results = GradInForward.apply(_KERNELS, constants, pred, target, weight, norm)
        return results if with_distance else results[0]
    constants = (ignore_out_of_range, with_distance, 1.0, False)
    loss, *distance = GradInForward.apply(_KERNELS, constants, pred, target, None, None)
    loss = reduce_loss(loss, weight, reduction, avg_factor)
    return (loss, *distance) if with_distance else loss


def _on_cpu(value: object) -> bool:
    return not isinstance(value, Tensor) or value.is_cpu
