# SPDX-License-Identifier: Apache-2.0
"""Integral in Triton: distance[…, side] = Σ_j softmax(x[…, side])_j · j              (arXiv 2006.04388, eq. 5)

    pred      […, 4(R+1)]  fp32, fp16, bf16, fp64  read, any strides
    distance  […, 4]       A                       write, contiguous
    grad_pred […, 4(R+1)]  as pred                 write, contiguous

A program holds BLOCK_L locations and does their four sides in turn, the bins padded to a power of two; the second
axis of the grid walks over a leading dimension that can't be folded, the image of a permuted ``[B, 4(R+1), H, W]``.
Bytes an element: forward sizeof(pred), backward twice that. Accumulator A: fp32, fp64 for fp64. Repeatable bit for
bit: a row of bins is reduced by one fixed tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch
from ._bins import expected_bin, expected_bin_gradient, softmax_tile


@triton.jit
def integral_forward_kernel(
    pred, distance, inner, reg_max, stride_outer, stride_inner, stride_bin, BLOCK_L: tl.constexpr, BINS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = distance.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + outer * stride_outer + rows[:, None] * stride_inner + bin.to(tl.int64)[None, :] * stride_bin
    out = distance + (outer * inner + rows) * 4
    for side in tl.static_range(4):
        at_side = tl.full((), side, tl.int64) * (reg_max + 1) * stride_bin
        _x, e, total, _largest, _beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
        tl.store(out + side, expected_bin(e, total, bin), mask=inside)


@triton.jit
def integral_backward_kernel(
    grad_distance, pred, grad_pred, inner, reg_max, stride_outer, stride_inner, stride_bin,
    BLOCK_L: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = grad_distance.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + outer * stride_outer + rows[:, None] * stride_inner + bin.to(tl.int64)[None, :] * stride_bin
    row = (outer * inner + rows) * 4
    exists = inside[:, None] & (bin <= reg_max)[None, :]
    for side in tl.static_range(4):
        at_side = tl.full((), side, tl.int64) * (reg_max + 1) * stride_bin
        _x, e, total, _largest, beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
        grad = tl.load(grad_distance + row + side, mask=inside, other=0.0)
        gradient = expected_bin_gradient(e, total, bin, grad)
        gradient = tl.where(beyond, 0.0, gradient).to(grad_pred.dtype.element_ty)
        tl.store(grad_pred + (row + side)[:, None] * (reg_max + 1) + bin[None, :], gradient, mask=exists)


def tiles(at: _launch.Locations, reg_max: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile sizes for a walk over locations."""
    width = _launch.power_of_two(reg_max + 1)
    block = _launch.rows_per_program(at.inner, width)
    return (_launch.programs(at.inner, block), at.outer), {"BLOCK_L": block, "BINS": width}


def _locations(pred: Tensor) -> tuple[Tensor, _launch.Locations]:
    at = _launch.locations(pred.select(-1, 0))
    if at is None:
        pred = pred.contiguous()
        at = _launch.Locations(1, pred.numel() // pred.shape[-1], (0, pred.shape[-1]))
    return pred, at


def forward(pred: Tensor, reg_max: int) -> Tensor:
    distance = torch.empty((*pred.shape[:-1], 4), dtype=accumulator(pred.dtype), device=pred.device)
    pred, at = _locations(pred)
    grid, constants = tiles(at, reg_max)
    _launch.launch(
        integral_forward_kernel, grid, pred,
        pred, distance, at.inner, reg_max, *at.strides, pred.stride(-1), **constants,
    )  # fmt: skip
    return distance


def backward(grad_distance: Tensor, pred: Tensor, reg_max: int, needs: Sequence[bool]) -> Tensor:
    grad_pred = _launch.empty_gradient(pred, needs[0])
    if not needs[0]:
        return grad_pred
    walked, at = _locations(pred)
    grid, constants = tiles(at, reg_max)
    _launch.launch(
        integral_backward_kernel, grid, pred,
        grad_distance.contiguous(), walked, grad_pred, at.inner, reg_max, *at.strides, walked.stride(-1), **constants,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred)
