# SPDX-License-Identifier: Apache-2.0
"""The head's losses and their gradients in one walk over the logits.

The losses come out weighted and normalised, so that the gradient each receives is 1 unless what comes after scales it
once more. What is done with the gradients that the forward pass writes is what ops/score/score_loss.py says: the first backward
pass takes them out of the graph and finishes them, a later one computes anew. Both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...core import backends, extension
from ...core.dtypes import accumulator
from ...core.registry import SPECS, define

_INPUT = (
    "Tensor[] cls_scores, Tensor[] reg_preds, float[] strides, Tensor labels, Tensor matched, Tensor gt_boxes,"
    " Tensor? cls_norm, Tensor? box_norm, int reg_max, float[] loss_weights, float beta, float[] center_offset,"
    " bool legacy, bool[2] needs"
)
_SCHEMA = (
    f"({_INPUT}) -> (Tensor cls, Tensor box, Tensor dfl, Tensor num_pos, Tensor box_weight, Tensor scales,"
    " Tensor[] grad_cls_scores, Tensor[] grad_reg_preds)"
)
_FINISH_SCHEMA = (
    "(Tensor(a!)[] grad_cls_scores, Tensor(b!)[] grad_reg_preds, Tensor grad_cls, Tensor grad_box, Tensor grad_dfl,"
    f" Tensor scales, {_INPUT}) -> ()"
)


def _fake(
    cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    first = cls_scores[0]
    numbers = [first.new_empty((), dtype=accumulator(first.dtype)) for _ in range(5)]
    scales = first.new_empty((3,), dtype=torch.float64)
    gradients = [
        [torch.empty_like(m) if needed else m.new_empty((0,)) for m in maps]
        for maps, needed in zip((cls_scores, reg_preds), others[-1])
    ]
    return (*numbers, scales, *gradients)  # type: ignore[return-value]


def _fake_finish(*arguments: Any) -> None:
    return None


_DEVICES = tuple(device for device in ("cpu", "cuda") if extension.serves("gfl_loss_fwd_and_grad", device))
if _DEVICES:
    define("gfl_loss_fwd_and_grad", _SCHEMA, _fake)
    define("gfl_loss_finish", _FINISH_SCHEMA, _fake_finish)


class _HeadOnePass(torch.autograd.Function):
    """`maps` are those of the classes, then those of the distributions; `others` what else the operator takes."""

    @staticmethod
    def forward(ctx: Any, others: tuple[Any, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        levels = len(maps) // 2
        needs = [any(m.requires_grad for m in part) for part in (maps[:levels], maps[levels:])]
        with torch._C._AutoDispatchBelowAutograd():
            *losses, scales, of_scores, of_preds = torch.ops.gfl.gfl_loss_fwd_and_grad(
                maps[:levels], maps[levels:], *others, needs
            )
        tensors = [v for v in others if isinstance(v, Tensor)]
        ctx.save_for_backward(*maps, scales, *tensors)
        ctx.layout = levels, needs, tuple(None if isinstance(v, Tensor) else (v,) for v in others)
        # Not among the saved tensors, which a retained graph would hold on to after they have been handed out.
        ctx.gradients = of_scores, of_preds
        ctx.mark_non_differentiable(*losses[3:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        levels, needs, constants = ctx.layout
        saved = iter(ctx.saved_tensors)
        maps, scales = [next(saved) for _ in range(2 * levels)], next(saved)
        others = [next(saved) if c is None else c[0] for c in constants]
        arguments = (maps[:levels], maps[levels:], *others, needs)
        zero = maps[0].new_zeros((), dtype=accumulator(maps[0].dtype)) if any(g is None for g in grads[:3]) else None
        arriving = [zero if g is None else g for g in grads[:3]]
        gradients, ctx.gradients = ctx.gradients, None
        # A graph of the gradient is the operator's to refuse.
        if gradients is None or torch.is_grad_enabled():
            gradients = torch.ops.gfl.gfl_loss_bwd(*arriving, *arguments)
        else:
            torch.ops.gfl.gfl_loss_finish(*gradients, *arriving, scales, *arguments)
        found = [*gradients[0], *gradients[1]]
        return None, *(g if n else None for g, n in zip(found, ctx.needs_input_grad[1:]))


def head_loss(cls_scores: list[Tensor], reg_preds: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    """What the operator `gfl_loss` gives for the same arguments."""
    device = cls_scores[0].device.type
    maps = [*cls_scores, *reg_preds]
    if device in _DEVICES and _can_store_grad(maps) and backends.serving("gfl_loss", device) == "native":
        return _HeadOnePass.apply(others, *maps)
    return SPECS["gfl_loss"](device, cls_scores, reg_preds, *others)


def _can_store_grad(maps: list[Tensor]) -> bool:
    # A graph that is being compiled can't own a tensor, and transforms of functions have no rule for it.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    # In fp16 the gradients of most background logits would be stored as zero; a subclass may stand for no numbers.
    plain = all(m.dtype != torch.float16 and type(m) in (Tensor, nn.Parameter) for m in maps)
    return plain and any(m.requires_grad for m in maps)
