# SPDX-License-Identifier: Apache-2.0
"""Boxes from distributions in Triton: softmax, expected distance, stride, box and clipping in one kernel.

    box = (x − s·d₀, y − s·d₁, x + s·d₂, y + s·d₃),   d[side] = Σ_j softmax(pred[side])_j · j  (arXiv 2006.04388, eq. 5)

    pred        […, 4(R+1)]  fp32, fp16, bf16, fp64  read, any strides
    points      […, 2]       A                       read, any strides: x, y
    stride      […]          A                       read, any strides: s
    max_shape   […, 2]       A                       read, any strides: height, width; or absent
    boxes       […, 4]       A                       write, contiguous
    grad_pred   […, 4(R+1)]  as pred                 write, contiguous
    grad_points […, 2]       A                       write, contiguous

A program holds BLOCK_L locations and does their four sides in turn, the bins padded to a power of two; the second
axis of the grid walks over a leading dimension that can't be folded, the image of a permuted ``[B, 4(R+1), H, W]``.
Bytes an element of pred: forward sizeof(pred), backward twice that. Accumulator A: fp32, fp64 for fp64. No fused
multiply-adds, so that a side is clipped here where it is on every backend. Repeatable bit for bit: a row of bins is
reduced by one fixed tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch
from ._bins import expected_bin, expected_bin_gradient, softmax_tile
from .integral import tiles


@triton.jit
def _corner(point, distance, max_shape, inside, stride_limit_k, SIDE: tl.constexpr, CLIP: tl.constexpr):
    """One coordinate of the boxes, and whether it was left as it came: a clipped one passes no gradient."""
    if SIDE < 2:
        value = point - distance
    else:
        value = point + distance
    if CLIP:
        # (height, width): x is held by the second.
        limit = tl.load(max_shape + (1 - SIDE % 2) * stride_limit_k, mask=inside, other=0.0)
        held = tl.where(value < 0.0, 0.0, value)
        over = held > limit
        free = ((value < 0.0) | over) == 0
        value = tl.where(over, limit, held)
    else:
        free = inside
    return value, free


@triton.jit
def decode_forward_kernel(
    pred, points, stride, max_shape, boxes, inner, reg_max,
    stride_pred_outer, stride_pred_inner, stride_points_outer, stride_points_inner,
    stride_stride_outer, stride_stride_inner, stride_limit_outer, stride_limit_inner,
    stride_bin, stride_points_k, stride_limit_k,
    CLIP: tl.constexpr, BLOCK_L: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = boxes.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + outer * stride_pred_outer + rows[:, None] * stride_pred_inner
    pointers += bin.to(tl.int64)[None, :] * stride_bin
    scale = tl.load(stride + outer * stride_stride_outer + rows * stride_stride_inner, mask=inside, other=0.0)
    at_point = points + outer * stride_points_outer + rows * stride_points_inner
    at_limit = max_shape + outer * stride_limit_outer + rows * stride_limit_inner
    out = boxes + (outer * inner + rows) * 4
    for side in tl.static_range(4):
        at_side = tl.full((), side, tl.int64) * (reg_max + 1) * stride_bin
        _x, e, total, _largest, _beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
        point = tl.load(at_point + side % 2 * stride_points_k, mask=inside, other=0.0)
        distance = expected_bin(e, total, bin) * scale
        value, _free = _corner(point, distance, at_limit, inside, stride_limit_k, side, CLIP)
        tl.store(out + side, value, mask=inside)


@triton.jit
def decode_backward_kernel(
    grad_boxes, pred, points, stride, max_shape, grad_pred, grad_points, inner, reg_max,
    stride_pred_outer, stride_pred_inner, stride_points_outer, stride_points_inner,
    stride_stride_outer, stride_stride_inner, stride_limit_outer, stride_limit_inner,
    stride_bin, stride_points_k, stride_limit_k,
    CLIP: tl.constexpr, NEED_PRED: tl.constexpr, NEED_POINTS: tl.constexpr, BLOCK_L: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = grad_boxes.dtype.element_ty
    bin = tl.arange(0, BINS)
    exists = inside[:, None] & (bin <= reg_max)[None, :]
    pointers = pred + outer * stride_pred_outer + rows[:, None] * stride_pred_inner
    pointers += bin.to(tl.int64)[None, :] * stride_bin
    scale = tl.load(stride + outer * stride_stride_outer + rows * stride_stride_inner, mask=inside, other=0.0)
    at_point = points + outer * stride_points_outer + rows * stride_points_inner
    at_limit = max_shape + outer * stride_limit_outer + rows * stride_limit_inner
    row = (outer * inner + rows) * 4
    for axis in tl.static_range(2):
        point = tl.load(at_point + axis * stride_points_k, mask=inside, other=0.0)
        grad_point = tl.zeros((BLOCK_L,), dtype=acc)
        for half in tl.static_range(2):
            at_side = tl.full((), axis + 2 * half, tl.int64) * (reg_max + 1) * stride_bin
            grad = tl.load(grad_boxes + row + axis + 2 * half, mask=inside, other=0.0)
            if NEED_PRED or CLIP:
                _x, e, total, _largest, beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
                distance = expected_bin(e, total, bin) * scale
                _value, free = _corner(point, distance, at_limit, inside, stride_limit_k, axis + 2 * half, CLIP)
                grad = tl.where(free, grad, 0.0)
            grad_point += grad
            if NEED_PRED:
                signed = grad * (2 * half - 1) * scale
                gradient = expected_bin_gradient(e, total, bin, signed)
                gradient = tl.where(beyond, 0.0, gradient).to(grad_pred.dtype.element_ty)
                out = grad_pred + (row + axis + 2 * half)[:, None] * (reg_max + 1) + bin[None, :]
                tl.store(out, gradient, mask=exists)
        if NEED_POINTS:
            tl.store(grad_points + (outer * inner + rows) * 2 + axis, grad_point, mask=inside)


def _walk(
    pred: Tensor, points: Tensor, stride: Tensor, max_shape: Tensor | None
) -> tuple[tuple[Tensor, ...], _launch.Locations]:
    """The four tensors, copied where their leading dimensions can't be walked together, and the walk."""
    limit = points if max_shape is None else max_shape
    at = _launch.locations(pred.select(-1, 0), points.select(-1, 0), stride, limit.select(-1, 0))
    if at is None:
        rows = stride.numel()
        pred, points, stride, limit = (t.contiguous() for t in (pred, points, stride, limit))
        at = _launch.Locations(1, rows, (0, pred.shape[-1], 0, 2, 0, 1, 0, 2))
    return (pred, points, stride, limit), at


def forward(pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: Tensor | None) -> Tensor:
    boxes = torch.empty((*pred.shape[:-1], 4), dtype=accumulator(pred.dtype), device=pred.device)
    tensors, at = _walk(pred, points, stride, max_shape)
    grid, constants = tiles(at, reg_max)
    _launch.launch(
        decode_forward_kernel, grid, pred,
        *tensors, boxes, at.inner, reg_max, *at.strides, *(tensors[i].stride(-1) for i in (0, 1, 3)),
        CLIP=max_shape is not None, **constants, enable_fp_fusion=False,
    )  # fmt: skip
    return boxes


def backward(
    grad_boxes: Tensor,
    pred: Tensor,
    points: Tensor,
    stride: Tensor,
    reg_max: int,
    max_shape: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    grad_pred, grad_points = _launch.empty_gradient(pred, needs[0]), _launch.empty_gradient(points, needs[1])
    tensors, at = _walk(pred, points, stride, max_shape)
    grid, constants = tiles(at, reg_max)
    _launch.launch(
        decode_backward_kernel, grid, pred,
        grad_boxes.contiguous(), *tensors, grad_pred, grad_points, at.inner, reg_max,
        *at.strides, *(tensors[i].stride(-1) for i in (0, 1, 3)),
        CLIP=max_shape is not None, NEED_PRED=needs[0], NEED_POINTS=needs[1], **constants, enable_fp_fusion=False,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred), grad_points
