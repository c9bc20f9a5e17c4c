# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient in one walk over the logits, for losses on the CPU whose gradient can be foretold.

The gradient that reaches a row's loss follows from `weight`, `reduction` and `avg_factor`, unless what comes after the
loss scales it once more; that of the head's losses, which come out weighted and normalised, is 1. The forward pass
therefore computes the logits' gradient with what is expected, and the backward pass returns it where exactly that
arrives; whatever else arrives, it computes the gradient from the logits anew. Both ways give the same bits. What has
been handed out is never written again, so a second backward pass, a retained graph and a gradient that is accumulated
in place are as safe as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, _extension
from ._reduce import expected_gradient
from ._spec import SPECS, define
from ._types import accumulator

# In fp16 the gradients of most background logits would be stored as zero.
DTYPES = (torch.float32, torch.bfloat16)
# Below, the second walk costs less than the bookkeeping.
LEAST_ELEMENTS = 1 << 15


def _fake(
    pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return pred.new_empty(pred.shape[0], dtype=scales.dtype), pred.new_empty(pred.shape)


_SCHEMA = "(Tensor pred, Tensor? label, Tensor target, float beta, bool activated, Tensor scales) -> (Tensor, Tensor)"
if _extension.serves("qfl_fwd_and_grad", "cpu"):
    define("qfl_fwd_and_grad", _SCHEMA, _fake)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool, scales: Tensor
    ) -> Tensor:
        loss, gradient = torch.ops.gfl.qfl_fwd_and_grad(pred, label, target, beta, activated, scales)
        ctx.save_for_backward(pred, label, target, scales, gradient)
        ctx.constants = beta, activated
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        pred, label, target, scales, gradient = ctx.saved_tensors
        # A graph of the gradient is the operator's to refuse.
        if torch.is_grad_enabled() or not torch.equal(grad_loss, scales):
            arguments = (pred, label, target, *ctx.constants)
            gradient = torch.ops.gfl.qfl_bwd(grad_loss, *arguments, (True, False))[0]
        return gradient, None, None, None, None, None


def quality_focal_loss_rows(
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    beta: float,
    activated: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor:
    """``[N]``, as the operator `qfl` gives it; `weight` and what follows say how it will be reduced."""
    elsewhere = isinstance(avg_factor, Tensor) and avg_factor.device.type != "cpu"
    if reduction == "none" or elsewhere or not _can(pred, target):
        return SPECS["qfl"](pred.device.type, pred, label, target, beta, activated)
    scales = expected_gradient(pred.shape[0], target.dtype, weight, reduction, avg_factor)
    return _OnePass.apply(pred, label, target, beta, activated, scales)


_HEAD_SCHEMA = (
    "(Tensor[] cls_scores, Tensor[] reg_preds, float[] strides, Tensor labels, Tensor matched, Tensor gt_boxes,"
    " Tensor? cls_norm, Tensor? box_norm, int reg_max, float[] loss_weights, float beta, float[] center_offset,"
    " bool legacy, bool[2] needs)"
    " -> (Tensor cls, Tensor box, Tensor dfl, Tensor num_pos, Tensor box_weight, Tensor[] grad_cls_scores,"
    " Tensor[] grad_reg_preds)"
)


def _fake_head(
    cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    numbers = [cls_scores[0].new_empty((), dtype=accumulator(cls_scores[0].dtype)) for _ in range(5)]
    gradients = [
        [torch.empty_like(m) if needed else m.new_empty((0,)) for m in maps]
        for maps, needed in zip((cls_scores, reg_preds), others[-1])
    ]
    return (*numbers, *gradients)  # type: ignore[return-value]


if _extension.serves("gfl_loss_fwd_and_grad", "cpu"):
    define("gfl_loss_fwd_and_grad", _HEAD_SCHEMA, _fake_head)


class _HeadOnePass(torch.autograd.Function):
    """`maps` are those of the classes, then those of the distributions; `others` what else the operator takes."""

    @staticmethod
    def forward(ctx: Any, others: tuple[Any, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        levels = len(maps) // 2
        needs = [any(m.requires_grad for m in part) for part in (maps[:levels], maps[levels:])]
        with torch._C._AutoDispatchBelowAutograd():
            *losses, of_scores, of_preds = torch.ops.gfl.gfl_loss_fwd_and_grad(
                maps[:levels], maps[levels:], *others, needs
            )
        tensors = [v for v in others if isinstance(v, Tensor)]
        ctx.save_for_backward(*maps, *tensors, *of_scores, *of_preds)
        ctx.layout = levels, needs, tuple(None if isinstance(v, Tensor) else (v,) for v in others)
        ctx.mark_non_differentiable(*losses[3:])
        ctx.set_materialize_grads(False)
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        levels, needs, constants = ctx.layout
        saved = list(ctx.saved_tensors)
        maps, rest, stored = saved[: 2 * levels], iter(saved[2 * levels : -2 * levels]), saved[-2 * levels :]
        arriving = grads[:3]
        if torch.is_grad_enabled() or any(g is None or g.item() != 1.0 for g in arriving):
            acc = accumulator(maps[0].dtype)
            arriving = tuple(maps[0].new_zeros((), dtype=acc) if g is None else g for g in arriving)
            others = [next(rest) if c is None else c[0] for c in constants]
            of_scores, of_preds = torch.ops.gfl.gfl_loss_bwd(*arriving, maps[:levels], maps[levels:], *others, needs)
            stored = [*of_scores, *of_preds]
        wanted = [
            g if needs[i >= levels] and n else None for i, (g, n) in enumerate(zip(stored, ctx.needs_input_grad[1:]))
        ]
        return None, *wanted


def head_loss(cls_scores: list[Tensor], reg_preds: list[Tensor], *others: Any) -> tuple[Tensor, ...]:
    """What the operator `gfl_loss` gives for the same arguments."""
    maps = [*cls_scores, *reg_preds]
    if _foretellable(maps) and _backend.serving("gfl_loss", "cpu") == "native":
        return _HeadOnePass.apply(others, *maps)
    return SPECS["gfl_loss"](cls_scores[0].device.type, cls_scores, reg_preds, *others)


def _can(pred: Tensor, target: Tensor) -> bool:
    if target.requires_grad or type(target) is not Tensor or pred.stride(-1) != 1:
        return False
    return _foretellable([pred]) and _backend.serving("qfl", "cpu") == "native"


def _foretellable(preds: list[Tensor]) -> bool:
    # A graph that is being compiled can't depend on what arrives.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not any(p.requires_grad for p in preds) or sum(p.numel() for p in preds) < LEAST_ELEMENTS:
        return False
    # A subclass may stand for no numbers at all.
    return all(p.device.type == "cpu" and p.dtype in DTYPES and type(p) in (Tensor, nn.Parameter) for p in preds)
