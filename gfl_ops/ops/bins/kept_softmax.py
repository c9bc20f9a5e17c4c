# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss on the CPU in fp32, whose backward pass needs no second softmax.

The forward pass keeps the exponentials of all bins, which is as much memory as the gradient needs anyway: the first
backward pass takes that tensor out of the graph and turns it into the gradient where it lies. Nobody has seen it
before, so nothing that was handed out is overwritten. A later backward pass of a retained graph finds it gone and
computes from the logits. Both ways give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core import backends, extension
from ...core.dtypes import as_dtype
from ...core.reduction import AVG_FACTOR_EPS, factor_and_norm, reduce_loss
from ...core.registry import define

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


def _fake_finish(*arguments: Any) -> None:
    return None


_SERVED = extension.serves("dfl_keep", "cpu")
if _SERVED:
    keep = f"({_INPUT}, bool distance, {_REDUCTION}) -> (Tensor, Tensor, Tensor kept, Tensor sums)"
    define("dfl_keep", keep, _fake_keep)
    finish = f"(Tensor(a!) kept, Tensor sums, Tensor grad_loss, Tensor? grad_distance, {_INPUT}, {_REDUCTION}) -> ()"
    define("dfl_finish", finish, _fake_finish)
    _keep = extension.eager_bypass("dfl_keep", "dfl_keep")
    _finish = extension.eager_bypass("dfl_finish", "dfl_finish")


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, target: Tensor, weight: Tensor | None, norm: Tensor | None, ignore: bool,
        with_distance: bool, factor: float, reduced: bool,
    ) -> Any:  # fmt: skip
        by = (weight, norm, factor, reduced)
        loss, distance, kept, sums = _keep(pred, target, ignore, with_distance, *by)
        ctx.save_for_backward(pred, target, sums, weight, norm)
        # Not among the saved tensors, which a retained graph would hold on to after it has been handed out.
        ctx.kept, ctx.constants = kept, (ignore, factor, reduced)
        return (loss, distance) if with_distance else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, sums, weight, norm = ctx.saved_tensors
        ignore, factor, reduced = ctx.constants
        kept, ctx.kept = ctx.kept, None
        if torch.is_grad_enabled():
            # A graph of the gradient is the operator's to refuse.
            operators = (torch.ops.gfl.dfl_bwd, torch.ops.gfl.dfl_integral_bwd)
            of_rows = grads[0]
            if reduced:
                of_rows = of_rows * factor if norm is None else of_rows * factor / (norm + AVG_FACTOR_EPS)
                of_rows = of_rows.expand(target.shape) if weight is None else of_rows * weight
            kept = operators[len(grads) - 1](of_rows, *grads[1:], pred, target, ignore, [True, False])[0]
        else:
            by, of_distance = (weight, norm, factor, reduced), grads[1] if len(grads) > 1 else None
            if kept is None:
                kept, sums = _keep(pred, target, ignore, False, *by)[2:]
            _finish(kept, sums, grads[0], of_distance, pred, target, ignore, *by)
        return kept, *[None] * 7


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
    if not (pred.requires_grad and pred.dtype == torch.float32 and pred.is_cpu and _SERVED):
        return None
    # A graph that is being compiled can't own a tensor, and transforms of functions have no rule for it.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    # The gradient reaches the logits alone; a subclass may stand for no numbers at all.
    if type(pred) not in (Tensor, nn.Parameter) or backends.serving(stem, "cpu") != "native":
        return None
    if not _plain(target):
        return None
    with_distance = stem == "dfl_integral"
    if reduction != "none" and _plain(weight) and _plain(avg_factor):
        factor, norm = factor_and_norm(reduction, avg_factor, pred.shape[0], pred, pred.dtype)
        weight = None if weight is None else as_dtype(weight, pred.dtype)
        return _Kept.apply(pred, target, weight, norm, ignore_out_of_range, with_distance, factor, True)
    results = _Kept.apply(pred, target, None, None, ignore_out_of_range, with_distance, 1.0, False)
    loss, *distance = results if with_distance else (results,)
    loss = reduce_loss(loss, weight, reduction, avg_factor)
    return (loss, *distance) if with_distance else loss


def _plain(x: object) -> bool:
    """Whether a kernel may read it: no gradient is wanted, and no subclass stands for it."""
    return not isinstance(x, Tensor) or (type(x) is Tensor and x.is_cpu and not x.requires_grad)
