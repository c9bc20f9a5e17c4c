# SPDX-License-Identifier: Apache-2.0
"""Quality focal loss in Triton: loss[n] = Σ_c |t − σ(x[n,c])|^β · BCE(x[n,c], t)   (arXiv 2006.04388, eq. 2).

    pred       [N, C]                   fp32, fp16, bf16, fp64  read, any strides
    label      [N]                      int64                   read; absent for a dense target
    target     [N], or [N, C] if dense  A                       read, any strides
    loss       [N]                      A                       write
    grad_pred  [N, C]                   as pred                 write, contiguous
    grad_target as target               A                       write, contiguous

A program owns BLOCK_N rows and walks over the classes in tiles of BLOCK_C. Bytes an element: forward sizeof(pred),
backward twice that, the terms being computed again from the logits; a dense target adds sizeof(A), twice with its
gradient. Accumulator A: fp32, fp64 for fp64. Repeatable bit for bit: each lane adds its classes in order, and one
fixed tree adds the lanes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch
from ._focal import qfl_gradient, qfl_value


@triton.jit
def _target_tile(target, label, rows, columns, mask, stride_n, stride_c, score, SPARSE: tl.constexpr):
    if SPARSE:
        result = tl.where(label[:, None] == columns[None, :], score[:, None], 0.0)
    else:
        result = tl.load(
            target + rows[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_c, mask=mask, other=0.0
        )
    return result


@triton.jit
def _row_target(label, target, rows, inside, c, stride_label, stride_n, SPARSE: tl.constexpr):
    """Label, −1 for any background, and score of each row; stand-ins for a dense target."""
    if SPARSE:
        row_label = tl.load(label + rows * stride_label, mask=inside, other=-1)
        row_label = tl.where((row_label >= 0) & (row_label < c), row_label, -1).to(tl.int32)
        score = tl.load(target + rows * stride_n, mask=inside, other=0.0)
    else:
        row_label = rows
        score = rows
    return row_label, score


@triton.jit
def qfl_forward_kernel(
    pred, label, target, loss, n, c,
    stride_pred_n, stride_pred_c, stride_label, stride_target_n, stride_target_c,
    BETA: tl.constexpr, ACTIVATED: tl.constexpr, SPARSE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    acc: tl.constexpr = loss.dtype.element_ty
    row_label, score = _row_target(label, target, rows, inside, c, stride_label, stride_target_n, SPARSE)
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=acc)
    for first in range(0, TILES, UNROLL):
        for tile in tl.static_range(UNROLL):
            columns = tl.arange(0, BLOCK_C) + (first + tile) * BLOCK_C
            mask = inside[:, None] & (columns < c)[None, :]
            x = tl.load(
                pred + rows[:, None] * stride_pred_n + columns.to(tl.int64)[None, :] * stride_pred_c,
                mask=mask,
                other=0.0,
            )
            t = _target_tile(target, row_label, rows, columns, mask, stride_target_n, stride_target_c, score, SPARSE)
            total += tl.where(mask, qfl_value(x.to(acc), t, BETA, ACTIVATED), 0.0)
    tl.store(loss + rows, tl.sum(total, axis=1), mask=inside)


@triton.jit
def qfl_backward_kernel(
    grad_loss, pred, label, target, grad_pred, grad_target, n, c,
    stride_grad, stride_pred_n, stride_pred_c, stride_label, stride_target_n, stride_target_c,
    BETA: tl.constexpr, ACTIVATED: tl.constexpr, SPARSE: tl.constexpr,
    NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    acc: tl.constexpr = grad_loss.dtype.element_ty
    row_label, score = _row_target(label, target, rows, inside, c, stride_label, stride_target_n, SPARSE)
    scale = tl.load(grad_loss + rows * stride_grad, mask=inside, other=0.0)
    at_label = tl.zeros((BLOCK_N, BLOCK_C), dtype=acc)
    for first in range(0, TILES, UNROLL):
        for tile in tl.static_range(UNROLL):
            columns = tl.arange(0, BLOCK_C) + (first + tile) * BLOCK_C
            mask = inside[:, None] & (columns < c)[None, :]
            x = tl.load(
                pred + rows[:, None] * stride_pred_n + columns.to(tl.int64)[None, :] * stride_pred_c,
                mask=mask,
                other=0.0,
            )
            t = _target_tile(target, row_label, rows, columns, mask, stride_target_n, stride_target_c, score, SPARSE)
            grad_x, grad_t = qfl_gradient(x.to(acc), t, BETA, ACTIVATED)
            out = rows[:, None] * c + columns[None, :]
            if NEED_PRED:
                tl.store(grad_pred + out, (scale[:, None] * grad_x).to(grad_pred.dtype.element_ty), mask=mask)
            if NEED_TARGET:
                if SPARSE:
                    # At most one class of a row is its label, so this sum rounds nothing.
                    at_label += tl.where(mask & (row_label[:, None] == columns[None, :]), grad_t, 0.0)
                else:
                    tl.store(grad_target + out, scale[:, None] * grad_t, mask=mask)
    if NEED_TARGET and SPARSE:
        tl.store(grad_target + rows, scale * tl.sum(at_label, axis=1), mask=inside)


def _strides(pred: Tensor, label: Tensor | None, target: Tensor) -> tuple[int, ...]:
    dense = target.stride() if label is None else (target.stride(0), 0)
    return (*pred.stride(), 0 if label is None else label.stride(0), *dense)


def _tiles(n: int, c: int) -> dict[str, int]:
    return {"BLOCK_N": _launch.rows_per_program(n, _launch.column_block(c)), **_launch.column_tiles(c)}


def forward(pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool) -> Tensor:
    n, c = pred.shape
    loss = torch.empty(n, dtype=accumulator(pred.dtype), device=pred.device)
    tiles = _tiles(n, c)
    _launch.launch(
        qfl_forward_kernel, _launch.programs(n, tiles["BLOCK_N"]), pred,
        pred, target if label is None else label, target, loss, n, c, *_strides(pred, label, target),
        BETA=beta, ACTIVATED=activated, SPARSE=label is not None, **tiles,
    )  # fmt: skip
    return loss


def backward(
    grad_loss: Tensor,
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    beta: float,
    activated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    n, c = pred.shape
    grad_pred, grad_target = _launch.empty_gradient(pred, needs[0]), _launch.empty_gradient(target, needs[1])
    tiles = _tiles(n, c)
    _launch.launch(
        qfl_backward_kernel, _launch.programs(n, tiles["BLOCK_N"]), pred,
        grad_loss, pred, target if label is None else label, target, grad_pred, grad_target, n, c,
        grad_loss.stride(0), *_strides(pred, label, target),
        BETA=beta, ACTIVATED=activated, SPARSE=label is not None, NEED_PRED=needs[0], NEED_TARGET=needs[1], **tiles,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred), grad_target
