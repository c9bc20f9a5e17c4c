# SPDX-License-Identifier: Apache-2.0
"""The losses of class scores in Triton, for every term of `terms`: per row, per element, or down to one number.

    pred        [B, C, P], [N, C]; elements any shape  fp32, fp16, bf16, fp64  read, any strides
    label       [B, P], [N]; absent for a dense target int64                   read, contiguous
    target      as label, or as pred if dense          A                       read, any strides if dense
    weight      [B, P], [N]; reduced alone             A                       read, contiguous
    loss        [N], elements, or one number           A                       write
    grad_pred   as pred                                as pred                 write; reduced in any strides
    grad_target as target                              A                       write, contiguous
    partial     one per program; reduced alone         A                       write, read
    norm, and the grad_loss of the reduced form: one number of A each

Rows: a program owns BLOCK_N rows and walks over the classes in tiles of BLOCK_C. The reduced form is the same walk with
weights; another launch adds up what the programs found. Elements: a program owns BLOCK elements of the flattened shape.
Bytes per element: forward sizeof(pred), backward twice that, the terms being computed again; reduced with its gradient
2 sizeof(pred), and nothing backward where it was stored and 1 arrives; a dense target adds sizeof(A), and elements a
loss of sizeof(A). Accumulator A: fp32, fp64 for fp64, and fp64 over the programs. Repeatable bit for bit: each lane
adds its classes in order, and one fixed tree adds the lanes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from ..core.reduction import AVG_FACTOR_EPS
from . import launch, terms

_EPS = tl.constexpr(AVG_FACTOR_EPS)
SUM_BLOCK = 1024


@triton.jit
def _scale(norm, factor_high, factor_low, acc: tl.constexpr, NORMED: tl.constexpr):
    """The factor, which arrives as two fp32 numbers that add up to it, over the norm."""
    scale = tl.full((), factor_high, acc) + tl.full((), factor_low, acc)
    if NORMED:
        scale = scale / (tl.load(norm) + _EPS)
    return scale


@triton.jit
def _walk(
    pred, label, target, weight, scale, grad_loss, loss, grad_pred, grad_target, n, c, locations, stride_grad_loss,
    stride_pred_b, stride_pred_c, stride_pred_p, stride_target_b, stride_target_c, stride_target_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, ACTIVATED: tl.constexpr,
    SPARSE: tl.constexpr, WEIGHTED: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr,
    LOSS: tl.constexpr, GRAD_PRED: tl.constexpr, GRAD_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The rows of a program. Reduced, rows count by their weight and the gradient is `scale` times; else each by its
    own number of `grad_loss`."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    acc: tl.constexpr = target.dtype.element_ty
    if IMAGES:
        image = rows // locations
        location = rows % locations
    else:
        image = rows * 0
        location = rows
    from_pred = image * stride_pred_b + location * stride_pred_p
    from_target = image * stride_target_b + location * stride_target_p
    to_grad = image * stride_grad_b + location * stride_grad_p
    if SPARSE:
        row_label = tl.load(label + rows, mask=inside, other=-1)
        row_label = tl.where((row_label >= 0) & (row_label < c), row_label, -1).to(tl.int32)
        score = tl.load(target + rows, mask=inside, other=0.0)
    by_row = tl.full((BLOCK_N,), 1.0, dtype=acc)
    if WEIGHTED:
        by_row = tl.load(weight + rows, mask=inside, other=0.0)
    if GRAD_PRED or GRAD_TARGET:
        if REDUCED:
            by_grad = scale * by_row
        else:
            by_grad = tl.load(grad_loss + rows * stride_grad_loss, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=acc)
    at_label = tl.zeros((BLOCK_N, BLOCK_C), dtype=acc)
    for first in range(0, TILES, UNROLL):
        for tile in tl.static_range(UNROLL):
            columns = tl.arange(0, BLOCK_C) + (first + tile) * BLOCK_C
            mask = inside[:, None] & (columns < c)[None, :]
            at = columns.to(tl.int64)[None, :]
            x = tl.load(pred + from_pred[:, None] + at * stride_pred_c, mask=mask, other=0.0).to(acc)
            if SPARSE:
                t = tl.where(row_label[:, None] == columns[None, :], score[:, None], 0.0)
            else:
                t = tl.load(target + from_target[:, None] + at * stride_target_c, mask=mask, other=0.0)
            value, grad_x, grad_t = TERM(x, t, EXPONENT, SECOND, THIRD, ACTIVATED)
            if LOSS:
                total += tl.where(mask, by_row[:, None] * value, 0.0)
            if GRAD_PRED:
                slope = (by_grad[:, None] * grad_x).to(grad_pred.dtype.element_ty)
                tl.store(grad_pred + to_grad[:, None] + at * stride_grad_c, slope, mask=mask)
            if GRAD_TARGET:
                if SPARSE:
                    # At most one class of a row is its label, so this sum rounds nothing.
                    at_label += tl.where(mask & (row_label[:, None] == columns[None, :]), grad_t, 0.0)
                else:
                    tl.store(grad_target + rows[:, None] * c + at, by_grad[:, None] * grad_t, mask=mask)
    if LOSS:
        if REDUCED:
            tl.store(loss + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))
        else:
            tl.store(loss + rows, tl.sum(total, axis=1), mask=inside)
    if GRAD_TARGET and SPARSE:
        tl.store(grad_target + rows, by_grad * tl.sum(at_label, axis=1), mask=inside)


@triton.jit
def score_kernel(
    pred, label, target, weight, norm, factor_high, factor_low, grad_loss, loss, grad_pred, grad_target,
    n, c, locations, stride_grad_loss,
    stride_pred_b, stride_pred_c, stride_pred_p, stride_target_b, stride_target_c, stride_target_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, ACTIVATED: tl.constexpr,
    SPARSE: tl.constexpr, WEIGHTED: tl.constexpr, IMAGES: tl.constexpr, REDUCED: tl.constexpr, NORMED: tl.constexpr,
    STORED: tl.constexpr, LOSS: tl.constexpr, GRAD_PRED: tl.constexpr, GRAD_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows, or the reduced form, forward (LOSS) or backward. STORED: `grad_pred` already holds the gradient for 1."""
    scale = _scale(norm, factor_high, factor_low, target.dtype.element_ty, NORMED)
    wanted = True
    if REDUCED and not LOSS:
        arriving = tl.load(grad_loss)
        scale = arriving * scale
        if STORED:
            wanted = arriving != 1.0
    if wanted:
        _walk(
            pred, label, target, weight, scale, grad_loss, loss, grad_pred, grad_target,
            n, c, locations, stride_grad_loss,
            stride_pred_b, stride_pred_c, stride_pred_p, stride_target_b, stride_target_c, stride_target_p,
            stride_grad_b, stride_grad_c, stride_grad_p,
            TERM, EXPONENT, SECOND, THIRD, ACTIVATED, SPARSE, WEIGHTED, IMAGES, REDUCED, LOSS, GRAD_PRED, GRAD_TARGET,
            BLOCK_N, BLOCK_C, TILES, UNROLL,
        )  # fmt: skip


@triton.jit
def score_sum_kernel(partial, norm, factor_high, factor_low, loss, count, NORMED: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0).to(tl.float64)
    scale = _scale(norm, factor_high, factor_low, loss.dtype.element_ty, NORMED)
    tl.store(loss, (scale.to(tl.float64) * tl.sum(total, axis=0)).to(loss.dtype.element_ty))


@triton.jit
def score_elements_kernel(
    pred, target, grad_loss, loss, grad_pred, grad_target,
    n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    TERM: tl.constexpr, EXPONENT: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, ACTIVATED: tl.constexpr,
    LOSS: tl.constexpr, GRAD_PRED: tl.constexpr, GRAD_TARGET: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if FLAT:
        x = tl.load(pred + at * stride_pred, mask=inside, other=0.0)
        t = tl.load(target + at * stride_target, mask=inside, other=0.0)
    else:
        row = at // columns
        column = at % columns
        x = tl.load(pred + row * stride_pred_row + column * stride_pred, mask=inside, other=0.0)
        t = tl.load(target + row * stride_target_row + column * stride_target, mask=inside, other=0.0)
    value, grad_x, grad_t = TERM(x.to(t.dtype), t, EXPONENT, SECOND, THIRD, ACTIVATED)
    if LOSS:
        tl.store(loss + at, value, mask=inside)
    if GRAD_PRED or GRAD_TARGET:
        scale = tl.load(grad_loss + at, mask=inside, other=0.0)
        if GRAD_PRED:
            tl.store(grad_pred + at, (scale * grad_x).to(grad_pred.dtype.element_ty), mask=inside)
        if GRAD_TARGET:
            tl.store(grad_target + at, scale * grad_t, mask=inside)


def _term(stem: str, params: Sequence[float], activated: bool) -> dict[str, Any]:
    exponent, second, third = (*params, 0.0, 0.0, 0.0)[:3]
    options = {"TERM": getattr(terms, stem), "EXPONENT": exponent, "SECOND": second, "THIRD": third}
    return {**options, "ACTIVATED": activated}


def _strides(t: Tensor) -> tuple[int, int, int]:
    return (0, t.stride(1), t.stride(0)) if t.dim() == 2 else (t.stride(0), t.stride(1), t.stride(2))


class _Rows:
    """A call on rows of classes, [N, C] or [B, C, P], that may be reduced."""

    def __init__(
        self,
        stem: str,
        pred: Tensor,
        label: Tensor | None,
        target: Tensor,
        params: Sequence[float],
        activated: bool,
        weight: Tensor | None = None,
        norm: Tensor | None = None,
        factor: float = 1.0,
        reduced: bool = False,
    ) -> None:
        self.pred = pred
        self.target = target if label is None else target.contiguous()
        self.tensors = [
            pred, self.target if label is None else label.contiguous(), self.target,
            self.target if weight is None else weight.contiguous(), self.target if norm is None else norm,
        ]  # fmt: skip
        high = float(torch.tensor(factor, dtype=torch.float32))
        self.factor = high, factor - high if abs(high) < float("inf") else 0.0
        self.classes = pred.shape[1]
        self.rows = pred.shape[0] * (pred.shape[2] if pred.dim() == 3 else 1)
        tiles = launch.column_tiles(self.classes)
        block = launch.rows_per_program(self.rows, tiles["BLOCK_C"])
        self.programs = launch.programs(self.rows, block) if self.classes or not reduced else 0
        self.constants = _term(stem, params, activated) | {
            "SPARSE": label is not None, "WEIGHTED": weight is not None, "IMAGES": pred.dim() == 3, "REDUCED": reduced,
            "NORMED": norm is not None, "BLOCK_N": block, **tiles,
        }  # fmt: skip

    def run(
        self,
        grad_loss: Tensor | None = None,
        loss: Tensor | None = None,
        grad_pred: Tensor | None = None,
        grad_target: Tensor | None = None,
        stored: bool = False,
    ) -> None:
        """Compute what there is a tensor for."""
        outputs = [self.target if t is None else t for t in (grad_loss, loss, grad_pred, grad_target)]
        strides = (0, 0, 0) if self.constants["SPARSE"] else _strides(self.target)
        of_grad_loss = grad_loss.stride(0) if grad_loss is not None and grad_loss.dim() else 0
        launch.launch(
            score_kernel, self.programs, self.pred, *self.tensors, *self.factor, *outputs,
            self.rows, self.classes, self.pred.shape[2] if self.pred.dim() == 3 else self.rows, of_grad_loss,
            *_strides(self.pred), *strides, *_strides(self.pred if grad_pred is None else grad_pred),
            STORED=stored, LOSS=loss is not None, GRAD_PRED=grad_pred is not None, GRAD_TARGET=grad_target is not None,
            **self.constants,
        )  # fmt: skip


def rows_forward(
    stem: str, pred: Tensor, label: Tensor | None, target: Tensor, params: Sequence[float], activated: bool
) -> Tensor:
    loss = torch.empty(len(pred), dtype=accumulator(pred.dtype), device=pred.device)
    _Rows(stem, pred, label, target, params, activated).run(loss=loss)
    return loss


def rows_backward(
    stem: str,
    grad_loss: Tensor,
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    params: Sequence[float],
    activated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_pred, grad_target = launch.empty_gradient(pred, needs[0]), launch.empty_gradient(target, needs[1])
    wanted = (grad_pred if needs[0] else None, grad_target if needs[1] else None)
    _Rows(stem, pred, label, target, params, activated).run(grad_loss, None, *wanted)
    return launch.finished(grad_pred, pred), grad_target


def _elements(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    """Two tensors of one shape, made contiguous where the walk needs it, and its sizes and constants."""
    folded = launch.fold(pred, target)
    if len(folded) > 2:
        pred, target = pred.contiguous(), target.contiguous()
        folded = launch.fold(pred, target)
    (_, pred_row, target_row), (columns, pred_stride, target_stride) = [(1, 0, 0)] * (2 - len(folded)) + folded
    sizes = (pred.numel(), columns, pred_row, pred_stride, target_row, target_stride)
    return pred, target, sizes, {"FLAT": len(folded) < 2, "BLOCK": launch.rows_per_program(pred.numel(), 1)}


def elements_forward(
    stem: str, pred: Tensor, label: None, target: Tensor, params: Sequence[float], activated: bool
) -> Tensor:
    loss = torch.empty(pred.shape, dtype=accumulator(pred.dtype), device=pred.device)
    pred, target, sizes, constants = _elements(pred, target)
    launch.launch(
        score_elements_kernel, launch.programs(sizes[0], constants["BLOCK"]), pred,
        pred, target, target, loss, pred, target, *sizes,
        LOSS=True, GRAD_PRED=False, GRAD_TARGET=False, **_term(stem, params, activated), **constants,
    )  # fmt: skip
    return loss


def elements_backward(
    stem: str,
    grad_loss: Tensor,
    pred: Tensor,
    label: None,
    target: Tensor,
    params: Sequence[float],
    activated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_pred, grad_target = launch.empty_gradient(pred, needs[0]), launch.empty_gradient(target, needs[1])
    dense_pred, dense_target, sizes, constants = _elements(pred, target)
    launch.launch(
        score_elements_kernel, launch.programs(sizes[0], constants["BLOCK"]), pred,
        dense_pred, dense_target, grad_loss.contiguous(), dense_target, grad_pred, grad_target, *sizes,
        LOSS=False, GRAD_PRED=needs[0], GRAD_TARGET=needs[1], **_term(stem, params, activated), **constants,
    )  # fmt: skip
    return launch.finished(grad_pred, pred), grad_target


def _reduced(
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    norm: Tensor | None,
    factor: float,
    loss: str,
    params: Sequence[float],
    activated: bool,
) -> _Rows:
    return _Rows(loss, pred, label, target, params, activated, weight, norm, factor, reduced=True)


def _written(pred: Tensor) -> Tensor:
    """Where a kernel writes the gradient; in fp32 where the interpreter would truncate."""
    wide = launch.INTERPRETS and pred.dtype == torch.bfloat16
    return torch.empty_like(pred, dtype=torch.float32 if wide else pred.dtype)


def score_loss_forward(pred: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *arguments, store = others
    call = _reduced(pred, *arguments)
    loss, partial = (torch.empty(s, dtype=accumulator(pred.dtype), device=pred.device) for s in ((), call.programs))
    grad = _written(pred) if store else None
    call.run(None, partial, grad)
    launch.launch(
        score_sum_kernel, 1, pred, partial, call.tensors[-1], *call.factor, loss, call.programs,
        NORMED=call.constants["NORMED"], BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return loss, pred.new_empty((0,)) if grad is None else launch.finished(grad, pred)


def score_loss_backward(grad_loss: Tensor, pred: Tensor, *arguments: Any) -> Tensor:
    grad = _written(pred)
    _reduced(pred, *arguments).run(grad_loss, None, grad)
    return launch.finished(grad, pred)


def score_loss_finish(grad: Tensor, grad_loss: Tensor, pred: Tensor, *arguments: Any) -> None:
    written = _written(pred)
    if written.dtype == grad.dtype:
        written = grad
    else:
        written.copy_(grad)
    _reduced(pred, *arguments).run(grad_loss, None, written, stored=True)
    if written is not grad:
        grad.copy_(written)


def __getattr__(name: str) -> Any:
    """``<stem>_forward`` and ``<stem>_backward`` of every loss in `terms`, by the form that its spec names."""
    from ..ops.score.score_loss import SUMMED

    stem, _, direction = name.rpartition("_")
    if direction not in ("forward", "backward") or stem not in SUMMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(globals()[f"{'rows' if SUMMED[stem] else 'elements'}_{direction}"], stem)
