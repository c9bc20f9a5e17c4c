# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores down to one number in Triton, with the gradient from the same walk.

    pred       [B, C, P] or [N, C]          fp32, fp16, bf16, fp64  read, any strides
    label      [N]                          int64                   read; absent for a dense target
    target     [N], or pred's shape         A                       read, any strides
    weight     [B, P] or [N]                A                       read, contiguous
    grad       as pred                      as pred                 write, any strides
    partial    one a program                A                       write, read
    loss, norm, grad_loss: single numbers of A

A program owns BLOCK_N rows and walks over the classes in tiles of BLOCK_C; another launch adds up what they found.
Bytes an element: loss and gradient 2 sizeof(pred), the loss alone sizeof(pred), the gradient anew 2 sizeof(pred), or
nothing where it was grad_stored and 1 arrives; a dense target adds sizeof(A). Accumulator A: fp32, fp64 for fp64, and fp64
over the programs. Repeatable bit for bit: every sum has a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from ..core.reduction import AVG_FACTOR_EPS
from ..ops.score.score_loss import FOCAL, QUALITY, VARIFOCAL
from . import _launch
from ._focal import focal_gradient, focal_value, qfl_gradient, qfl_value, vfl_gradient, vfl_value

# As the kernels see them.
_QUALITY, _FOCAL, _VARIFOCAL = tl.constexpr(QUALITY), tl.constexpr(FOCAL), tl.constexpr(VARIFOCAL)
_EPS = tl.constexpr(AVG_FACTOR_EPS)
SUM_BLOCK = 1024


@triton.jit
def _value(x, t, KIND: tl.constexpr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr, ACTIVATED: tl.constexpr):
    if KIND == _QUALITY:
        result = qfl_value(x, t, EXPONENT, ACTIVATED)
    elif KIND == _FOCAL:
        result = focal_value(x, t, ALPHA, EXPONENT, ACTIVATED)
    else:
        result = vfl_value(x, t, ALPHA, EXPONENT, KIND == _VARIFOCAL, ACTIVATED)
    return result


@triton.jit
def _gradient(x, t, KIND: tl.constexpr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr, ACTIVATED: tl.constexpr):
    if KIND == _QUALITY:
        result, _by_target = qfl_gradient(x, t, EXPONENT, ACTIVATED)
    elif KIND == _FOCAL:
        result, _by_target = focal_gradient(x, t, ALPHA, EXPONENT, ACTIVATED)
    else:
        result, _by_target = vfl_gradient(x, t, ALPHA, EXPONENT, KIND == _VARIFOCAL, ACTIVATED)
    return result


@triton.jit
def _scale(norm, factor_high, factor_low, acc: tl.constexpr, NORMED: tl.constexpr):
    """The factor, which arrives as two fp32 numbers that add up to it, over the norm."""
    scale = tl.full((), factor_high, acc) + tl.full((), factor_low, acc)
    if NORMED:
        scale = scale / (tl.load(norm) + _EPS)
    return scale


@triton.jit
def _walk(
    pred, label, target, weight, scale, partial, grad, n, c, locations,
    stride_pred_b, stride_pred_c, stride_pred_p, stride_label, stride_target_b, stride_target_c, stride_target_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    KIND: tl.constexpr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr, ACTIVATED: tl.constexpr,
    SPARSE: tl.constexpr, WEIGHTED: tl.constexpr, LOSS: tl.constexpr, GRAD: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
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
    from_grad = image * stride_grad_b + location * stride_grad_p
    if SPARSE:
        row_label = tl.load(label + rows * stride_label, mask=inside, other=-1)
        row_label = tl.where((row_label >= 0) & (row_label < c), row_label, -1).to(tl.int32)
        score = tl.load(target + from_target, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=acc)
    by_row = tl.full((BLOCK_N,), 1.0, dtype=acc)
    if WEIGHTED:
        by_row = tl.load(weight + rows, mask=inside, other=0.0)
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
            if LOSS:
                value = _value(x, t, KIND, ALPHA, EXPONENT, ACTIVATED)
                total += tl.where(mask, by_row[:, None] * value, 0.0)
            if GRAD:
                slope = (scale * by_row)[:, None] * _gradient(x, t, KIND, ALPHA, EXPONENT, ACTIVATED)
                tl.store(grad + from_grad[:, None] + at * stride_grad_c, slope.to(grad.dtype.element_ty), mask=mask)
    if LOSS:
        tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit
def score_loss_forward_kernel(
    pred, label, target, weight, norm, factor_high, factor_low, partial, grad, n, c, locations,
    stride_pred_b, stride_pred_c, stride_pred_p, stride_label, stride_target_b, stride_target_c, stride_target_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    NORMED: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr, ACTIVATED: tl.constexpr,
    SPARSE: tl.constexpr, WEIGHTED: tl.constexpr, GRAD: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    scale = _scale(norm, factor_high, factor_low, target.dtype.element_ty, NORMED)
    _walk(
        pred, label, target, weight, scale, partial, grad, n, c, locations,
        stride_pred_b, stride_pred_c, stride_pred_p, stride_label, stride_target_b, stride_target_c, stride_target_p,
        stride_grad_b, stride_grad_c, stride_grad_p,
        KIND, ALPHA, EXPONENT, ACTIVATED, SPARSE, WEIGHTED, True, GRAD, IMAGES, BLOCK_N, BLOCK_C, TILES, UNROLL,
    )  # fmt: skip


@triton.jit
def score_loss_backward_kernel(
    grad_loss, pred, label, target, weight, norm, factor_high, factor_low, grad, n, c, locations,
    stride_pred_b, stride_pred_c, stride_pred_p, stride_label, stride_target_b, stride_target_c, stride_target_p,
    stride_grad_b, stride_grad_c, stride_grad_p,
    GRAD_STORED: tl.constexpr, NORMED: tl.constexpr,
    KIND: tl.constexpr, ALPHA: tl.constexpr, EXPONENT: tl.constexpr, ACTIVATED: tl.constexpr,
    SPARSE: tl.constexpr, WEIGHTED: tl.constexpr, IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    arriving = tl.load(grad_loss)
    if (not GRAD_STORED) or arriving != 1.0:
        scale = arriving * _scale(norm, factor_high, factor_low, target.dtype.element_ty, NORMED)
        _walk(
            pred, label, target, weight, scale, grad, grad, n, c, locations,
            stride_pred_b, stride_pred_c, stride_pred_p,
            stride_label, stride_target_b, stride_target_c, stride_target_p,
            stride_grad_b, stride_grad_c, stride_grad_p,
            KIND, ALPHA, EXPONENT, ACTIVATED, SPARSE, WEIGHTED, False, True, IMAGES, BLOCK_N, BLOCK_C, TILES, UNROLL,
        )  # fmt: skip


@triton.jit
def score_loss_sum_kernel(
    partial, norm, factor_high, factor_low, loss, count, NORMED: tl.constexpr, BLOCK: tl.constexpr
):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0).to(tl.float64)
    scale = _scale(norm, factor_high, factor_low, loss.dtype.element_ty, NORMED)
    tl.store(loss, (scale.to(tl.float64) * tl.sum(total, axis=0)).to(loss.dtype.element_ty))


class _Call:
    """The arguments that all kernels share."""

    def __init__(
        self,
        pred: Tensor,
        label: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        norm: Tensor | None,
        factor: float,
        kind: int,
        alpha: float,
        exponent: float,
        activated: bool,
    ) -> None:
        self.pred, self.target = pred, target
        self.label = target if label is None else label
        self.weight = target if weight is None else weight.contiguous()
        self.norm = target if norm is None else norm
        high = float(torch.tensor(factor, dtype=torch.float32))
        self.factor = high, factor - high if abs(high) < float("inf") else 0.0
        self.classes = pred.shape[1]
        self.rows = pred.shape[0] * (pred.shape[2] if pred.dim() == 3 else 1)
        tiles = _launch.column_tiles(self.classes)
        block = _launch.rows_per_program(self.rows, tiles["BLOCK_C"])
        self.programs = _launch.programs(self.rows, block) if self.classes else 0
        self.constants: dict[str, Any] = {
            "NORMED": norm is not None, "KIND": kind, "ALPHA": alpha, "EXPONENT": exponent, "ACTIVATED": activated,
            "SPARSE": label is not None, "WEIGHTED": weight is not None, "IMAGES": pred.dim() == 3,
            "BLOCK_N": block, **tiles,
        }  # fmt: skip

    def sizes(self, grad: Tensor) -> tuple[int, ...]:
        by_label = self.label.stride(0) if self.constants["SPARSE"] else 0
        aim = (0, 0, self.target.stride(0)) if self.constants["SPARSE"] else _strides(self.target)
        locations = self.pred.shape[2] if self.pred.dim() == 3 else self.rows
        return (self.rows, self.classes, locations, *_strides(self.pred), by_label, *aim, *_strides(grad))

    def differentiate(self, grad: Tensor, grad_loss: Tensor, grad_stored: bool) -> None:
        _launch.launch(
            score_loss_backward_kernel, self.programs, self.pred,
            grad_loss, self.pred, self.label, self.target, self.weight, self.norm, *self.factor, grad,
            *self.sizes(grad), GRAD_STORED=grad_stored, **self.constants,
        )  # fmt: skip


def _strides(t: Tensor) -> tuple[int, int, int]:
    return (0, t.stride(1), t.stride(0)) if t.dim() == 2 else (t.stride(0), t.stride(1), t.stride(2))


def _written(pred: Tensor) -> Tensor:
    """Where a kernel writes the gradient; in fp32 where the interpreter would truncate."""
    wide = _launch.INTERPRETS and pred.dtype == torch.bfloat16
    return torch.empty_like(pred, dtype=torch.float32 if wide else pred.dtype)


def forward(pred: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *arguments, store = others
    call = _Call(pred, *arguments)
    acc = accumulator(pred.dtype)
    loss = torch.empty((), dtype=acc, device=pred.device)
    partial = torch.empty(call.programs, dtype=acc, device=pred.device)
    grad = _written(pred) if store else None
    written = loss if grad is None else grad
    sizes = call.sizes(pred if grad is None else grad)
    _launch.launch(
        score_loss_forward_kernel, call.programs, pred,
        pred, call.label, call.target, call.weight, call.norm, *call.factor, partial, written, *sizes,
        GRAD=store, **call.constants,
    )  # fmt: skip
    _launch.launch(
        score_loss_sum_kernel, 1, pred, partial, call.norm, *call.factor, loss, call.programs,
        NORMED=call.constants["NORMED"], BLOCK=SUM_BLOCK,
    )  # fmt: skip
    return loss, pred.new_empty((0,)) if grad is None else _launch.finished(grad, pred)


def backward(grad_loss: Tensor, pred: Tensor, *arguments: Any) -> Tensor:
    grad = _written(pred)
    _Call(pred, *arguments).differentiate(grad, grad_loss, grad_stored=False)
    return _launch.finished(grad, pred)


def finish(grad: Tensor, grad_loss: Tensor, pred: Tensor, *arguments: Any) -> None:
    written = _written(pred)
    if written.dtype == grad.dtype:
        written = grad
    else:
        written.copy_(grad)
    _Call(pred, *arguments).differentiate(written, grad_loss, grad_stored=True)
    if written is not grad:
        grad.copy_(written)
