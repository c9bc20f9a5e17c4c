# SPDX-License-Identifier: Apache-2.0
"""Operators on distributions over bins in Triton, p = softmax(pred[row]):

    integral  distance = Σ_j p_j·j                                                    arXiv 2006.04388, eq. 5
    decode    box = (x − s·d₀, y − s·d₁, x + s·d₂, y + s·d₃), d the distances, clipped to the image
    dfl       loss = −w_l·log p_l − w_r·log p_r, optionally with the distance; l, r and the weights from a position
              (arXiv 2006.04388, eq. 6) or given (arXiv 2410.13842, without the IoU weight)
    ld        loss = T²/n Σ_j q_j·(log q_j − log p_j), p and q the softmax of pred / T and teacher / T
              (arXiv 2102.12252, 1503.02531)

    pred, teacher             […, bins]  fp32, fp16, bf16, fp64  read, any strides; integral, decode: […, 4·bins]
    points, stride, max_shape […, 2]     A                       read, any strides; stride […], max_shape may be absent
    target                    [M]        A                       read; or these three:
    left                      [M]        int64                   read; a bin that does not exist becomes the nearest
    weight_left, weight_right [M]        A                       read
    loss, distance, boxes     [M], […, 4]  A                     write
    grad_pred                 as pred    as pred                 write, contiguous
    grad_points, grad_target, grad_weight_left, _right  A        write

A program holds whole rows, padded to a power of two of bins: BLOCK_M rows, or BLOCK_L locations, whose four sides it
does in turn; the second axis of the grid walks over a leading dimension that can't be folded, the image of a permuted
``[B, 4(R+1), H, W]``. Bytes per element of each tensor of logits: forward sizeof(pred), backward twice that for `pred`
(the softmax is recomputed). Accumulator A: fp32, fp64 for fp64. Repeatable bit for bit: a row is reduced by one fixed
tree. Without fused multiply-adds, so that a side is clipped here where it is on every backend; the temperature of ld is
compiled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import launch
from .bin_terms import (
    at_bin,
    bin_pointers,
    expected_bin,
    expected_bin_gradient,
    softened_tile,
    softmax_tile,
    store_gradient,
)

# ---- integral and decode ----


@triton.jit
def _box_side(distance, scale, at_point, at_limit, inside, stride_point, stride_limit, SIDE: tl.constexpr,
              CLIP: tl.constexpr):  # fmt: skip
    """One coordinate of the boxes, and where it was not clipped and passes a gradient."""
    point = tl.load(at_point + SIDE % 2 * stride_point, mask=inside, other=0.0)
    if SIDE < 2:
        value = point - distance * scale
    else:
        value = point + distance * scale
    free = inside
    if CLIP:
        # (height, width): x is clipped by the second. The upper bound last, so that one below 0 wins.
        limit = tl.load(at_limit + (1 - SIDE % 2) * stride_limit, mask=inside, other=0.0)
        above_zero = tl.where(value < 0.0, 0.0, value)
        free = ((value < 0.0) | (above_zero > limit)) == 0
        value = tl.where(above_zero > limit, limit, above_zero)
    return value, free


@triton.jit
def sides_forward_kernel(
    pred, points, stride, max_shape, out, inner, reg_max,
    stride_pred_outer, stride_pred_inner, stride_points_outer, stride_points_inner,
    stride_stride_outer, stride_stride_inner, stride_limit_outer, stride_limit_inner,
    stride_bin, stride_point, stride_limit,
    BOX: tl.constexpr, CLIP: tl.constexpr, BLOCK_L: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = out.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = bin_pointers(pred + outer * stride_pred_outer, rows, stride_pred_inner, bin, stride_bin)
    at_point = points + outer * stride_points_outer + rows * stride_points_inner
    at_limit = max_shape + outer * stride_limit_outer + rows * stride_limit_inner
    if BOX:
        scale = tl.load(stride + outer * stride_stride_outer + rows * stride_stride_inner, mask=inside, other=0.0)
    for side in tl.static_range(4):
        at_side = tl.full((), side, tl.int64) * (reg_max + 1) * stride_bin
        _x, e, total, _largest, _beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
        value = expected_bin(e, total, bin)
        if BOX:
            value, _free = _box_side(value, scale, at_point, at_limit, inside, stride_point, stride_limit, side, CLIP)
        tl.store(out + (outer * inner + rows) * 4 + side, value, mask=inside)


@triton.jit
def sides_backward_kernel(
    grad_out, pred, points, stride, max_shape, grad_pred, grad_points, inner, reg_max,
    stride_pred_outer, stride_pred_inner, stride_points_outer, stride_points_inner,
    stride_stride_outer, stride_stride_inner, stride_limit_outer, stride_limit_inner,
    stride_bin, stride_point, stride_limit,
    BOX: tl.constexpr, CLIP: tl.constexpr, NEED_PRED: tl.constexpr, NEED_POINTS: tl.constexpr,
    BLOCK_L: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    outer = tl.program_id(1).to(tl.int64)
    inside = rows < inner
    acc: tl.constexpr = grad_out.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = bin_pointers(pred + outer * stride_pred_outer, rows, stride_pred_inner, bin, stride_bin)
    at_point = points + outer * stride_points_outer + rows * stride_points_inner
    at_limit = max_shape + outer * stride_limit_outer + rows * stride_limit_inner
    if BOX:
        scale = tl.load(stride + outer * stride_stride_outer + rows * stride_stride_inner, mask=inside, other=0.0)
    row = (outer * inner + rows) * 4
    for axis in tl.static_range(2):
        grad_point = tl.zeros((BLOCK_L,), dtype=acc)
        for half in tl.static_range(2):
            at_side = tl.full((), axis + 2 * half, tl.int64) * (reg_max + 1) * stride_bin
            grad = tl.load(grad_out + row + axis + 2 * half, mask=inside, other=0.0)
            if NEED_PRED or CLIP:
                _x, e, total, _largest, beyond = softmax_tile(pointers + at_side, inside, bin, reg_max, acc)
                if CLIP:
                    _value, free = _box_side(
                        expected_bin(e, total, bin), scale, at_point, at_limit, inside, stride_point, stride_limit,
                        axis + 2 * half, CLIP,
                    )  # fmt: skip
                    grad = tl.where(free, grad, 0.0)
            grad_point += grad
            if NEED_PRED:
                if BOX:
                    grad = grad * (2 * half - 1) * scale
                gradient = expected_bin_gradient(e, total, bin, grad)
                to = grad_pred + (row + axis + 2 * half) * (reg_max + 1)
                store_gradient(to, gradient, beyond, inside, bin, reg_max)
        if NEED_POINTS:
            tl.store(grad_points + (outer * inner + rows) * 2 + axis, grad_point, mask=inside)


def _sides(
    pred: Tensor, reg_max: int, points: Tensor | None = None, stride: Tensor | None = None, limit: Tensor | None = None
) -> tuple[tuple[int, int], tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Grid, tensors, strides and constants of a walk over locations; what the operator doesn't have is never read."""
    box = points is not None and stride is not None
    places = [t for t in (points, stride, limit) if t is not None]
    corners = [t.select(-1, 0) if t is not stride else t for t in (pred, *places)]
    at = launch.locations(*corners)
    if at is None:
        # Their leading dimensions can't be walked together.
        pred, *places = (t.contiguous() for t in (pred, *places))
        widths = [1 if t.dim() < pred.dim() else t.shape[-1] for t in (pred, *places)]
        at = launch.Locations(1, pred.numel() // pred.shape[-1], tuple(s for w in widths for s in (0, w)))
    unread = [pred] * (3 - len(places))
    tensors = (pred, *places, *unread)
    strides = (*at.strides, *[0] * (2 * len(unread)), *(tensors[i].stride(-1) for i in (0, 1, 3)))
    width = launch.power_of_two(reg_max + 1)
    # Boxes of twice as many rows would spill registers on sm_80.
    block = launch.rows_per_program(at.inner, width, 512 if box else 1024)
    constants = {
        "BOX": box, "CLIP": limit is not None, "BLOCK_L": block, "BINS": width,
    }  # fmt: skip
    return (launch.programs(at.inner, block), at.outer), tensors, (at.inner, reg_max, *strides), constants


def integral_forward(pred: Tensor, reg_max: int) -> Tensor:
    return decode_forward(pred, None, None, reg_max, None)


def integral_backward(grad_distance: Tensor, pred: Tensor, reg_max: int, needs: Sequence[bool]) -> Tensor:
    return _sides_backward(grad_distance, pred, None, None, reg_max, None, (needs[0], False))[0]


def decode_forward(
    pred: Tensor, points: Tensor | None, stride: Tensor | None, reg_max: int, max_shape: Tensor | None
) -> Tensor:
    out = torch.empty((*pred.shape[:-1], 4), dtype=accumulator(pred.dtype), device=pred.device)
    grid, tensors, sizes, constants = _sides(pred, reg_max, points, stride, max_shape)
    launch.launch(sides_forward_kernel, grid, pred, *tensors, out, *sizes, **constants)
    return out


def decode_backward(
    grad_boxes: Tensor, pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _sides_backward(grad_boxes, pred, points, stride, reg_max, max_shape, needs)


def _sides_backward(
    grad_out: Tensor, pred: Tensor, points: Tensor | None, stride: Tensor | None, reg_max: int,
    max_shape: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_pred = launch.empty_gradient(pred, needs[0])
    grad_points = launch.empty_gradient(grad_out if points is None else points, needs[1])
    if needs[0] or needs[1]:
        grid, tensors, sizes, constants = _sides(pred, reg_max, points, stride, max_shape)
        launch.launch(
            sides_backward_kernel, grid, pred, grad_out.contiguous(), *tensors, grad_pred, grad_points, *sizes,
            NEED_PRED=needs[0], NEED_POINTS=needs[1], **constants,
        )  # fmt: skip
    return launch.finished(grad_pred, pred), grad_points


# ---- distribution focal loss ----


@triton.jit
def _two_bins(
    target, weight_left, weight_right, rows, inside, reg_max, stride_target, stride_left, stride_right,
    acc: tl.constexpr, GIVEN: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    """Both bins of each row and their weights, which rows count, and which pass a gradient to a position."""
    if GIVEN:
        left = tl.load(target + rows * stride_target, mask=inside, other=0)
        # Within [−1, R] before 1 is added, or the largest integer runs over.
        left = tl.where(left < -1, -1, tl.where(left > reg_max, reg_max, left)).to(tl.int32)
        right = tl.where(left < reg_max, left + 1, reg_max)
        left = tl.where(left < 0, 0, left)
        w_left = tl.load(weight_left + rows * stride_left, mask=inside, other=0.0)
        w_right = tl.load(weight_right + rows * stride_right, mask=inside, other=0.0)
        return left, right, w_left, w_right, inside, inside
    else:
        y = tl.load(target + rows * stride_target, mask=inside, other=0.0)
        within = (y >= 0.0) & (y <= reg_max)
        counted = within if IGNORE else y == y
        y = tl.where(counted, y, 0.0)
        y = tl.where(y < 0.0, 0.0, tl.where(y > reg_max, tl.zeros_like(y) + reg_max, y))
        left = y.to(tl.int32)
        left = tl.where(left < reg_max, left, reg_max - 1)
        lower = left.to(acc)
        return left, left + 1, lower + 1.0 - y, y - lower, counted, counted & within


@triton.jit
def dfl_forward_kernel(
    pred, target, weight_left, weight_right, loss, distance, m, reg_max,
    stride_m, stride_bin, stride_target, stride_left, stride_right,
    GIVEN: tl.constexpr, IGNORE: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = bin_pointers(pred, rows, stride_m, bin, stride_bin)
    x, e, total, largest, _beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    left, right, w_left, w_right, counted, _passes = _two_bins(
        target, weight_left, weight_right, rows, inside, reg_max, stride_target, stride_left, stride_right,
        acc, GIVEN, IGNORE,
    )  # fmt: skip
    log_total = tl.log(total)
    at_left = at_bin(x, bin, left) - largest - log_total
    at_right = at_bin(x, bin, right) - largest - log_total
    value = -(at_left * w_left + at_right * w_right)
    if not GIVEN:
        value = tl.where(counted, value, 0.0)
    tl.store(loss + rows, value, mask=inside)
    if DISTANCE:
        tl.store(distance + rows, expected_bin(e, total, bin), mask=inside)


@triton.jit
def dfl_backward_kernel(
    grad_loss, grad_distance, pred, target, weight_left, weight_right, grad_pred, grad_first, grad_second, m, reg_max,
    stride_grad_loss, stride_grad_distance, stride_m, stride_bin, stride_target, stride_left, stride_right,
    GIVEN: tl.constexpr, IGNORE: tl.constexpr, DISTANCE: tl.constexpr,
    NEED_PRED: tl.constexpr, NEED_FIRST: tl.constexpr, NEED_SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """grad_first is that of the position, or of the left weight, grad_second that of the right weight."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = grad_loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = bin_pointers(pred, rows, stride_m, bin, stride_bin)
    x, e, total, largest, beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    left, right, w_left, w_right, counted, passes = _two_bins(
        target, weight_left, weight_right, rows, inside, reg_max, stride_target, stride_left, stride_right,
        acc, GIVEN, IGNORE,
    )  # fmt: skip
    scale = tl.load(grad_loss + rows * stride_grad_loss, mask=inside, other=0.0)
    if NEED_PRED:
        # Both bins are one where the nearest that exists is the same: the weights add up.
        weight = tl.where(bin[None, :] == left[:, None], w_left[:, None], 0.0)
        weight += tl.where(bin[None, :] == right[:, None], w_right[:, None], 0.0)
        p = e / total[:, None]
        if GIVEN:
            p = (w_left + w_right)[:, None] * p
        gradient = scale[:, None] * (p - weight)
        if not GIVEN:
            gradient = tl.where(counted[:, None], gradient, 0.0)
        if DISTANCE:
            grad = tl.load(grad_distance + rows * stride_grad_distance, mask=inside, other=0.0)
            gradient += expected_bin_gradient(e, total, bin, grad)
        store_gradient(grad_pred + rows * (reg_max + 1), gradient, beyond, inside, bin, reg_max)
    if GIVEN:
        log_total = tl.log(total)
        if NEED_FIRST:
            tl.store(grad_first + rows, -scale * (at_bin(x, bin, left) - largest - log_total), mask=inside)
        if NEED_SECOND:
            tl.store(grad_second + rows, -scale * (at_bin(x, bin, right) - largest - log_total), mask=inside)
    elif NEED_FIRST:
        slope = at_bin(x, bin, left) - at_bin(x, bin, right)
        tl.store(grad_first + rows, tl.where(passes, scale * slope, 0.0), mask=inside)


def _rows(rows: int, bins: int) -> tuple[int, dict[str, int]]:
    """Programs and constants of a walk over rows."""
    width = launch.power_of_two(bins)
    block = launch.rows_per_program(rows, width)
    return launch.programs(rows, block), {"BLOCK_M": block, "BINS": width}


def _dfl_forward(pred: Tensor, bins: tuple[Tensor, ...], ignore: bool, with_distance: bool) -> tuple[Tensor, Tensor]:
    """`bins` is (target,) or (left, weight_left, weight_right)."""
    m, count = pred.shape
    loss = torch.empty(m, dtype=accumulator(pred.dtype), device=pred.device)
    distance = torch.empty_like(loss) if with_distance else loss
    given = len(bins) == 3
    bins = bins if given else bins * 3
    programs, constants = _rows(m, count)
    launch.launch(
        dfl_forward_kernel, programs, pred, pred, *bins, loss, distance, m, count - 1,
        *pred.stride(), *(t.stride(0) for t in bins), GIVEN=given, IGNORE=ignore, DISTANCE=with_distance, **constants,
    )  # fmt: skip
    return loss, distance


def _dfl_backward(
    grads: tuple[Tensor, ...], pred: Tensor, bins: tuple[Tensor, ...], ignore: bool, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`grads` is (grad_loss,) or (grad_loss, grad_distance). The gradients of pred, and of target or of the weights."""
    m, count = pred.shape
    given = len(bins) == 3
    grad_pred = launch.empty_gradient(pred, needs[0])
    found = [launch.empty_gradient(t, n) for t, n in zip(bins[1:] if given else bins, needs[1:])]
    bins = bins if given else bins * 3
    programs, constants = _rows(m, count)
    launch.launch(
        dfl_backward_kernel, programs, pred,
        grads[0], grads[-1], pred, *bins, grad_pred, found[0], found[-1], m, count - 1,
        grads[0].stride(0), grads[-1].stride(0), *pred.stride(), *(t.stride(0) for t in bins),
        GIVEN=given, IGNORE=ignore, DISTANCE=len(grads) == 2,
        NEED_PRED=needs[0], NEED_FIRST=needs[1], NEED_SECOND=needs[-1], **constants,
    )  # fmt: skip
    return launch.finished(grad_pred, pred), *found


def dfl_forward(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> Tensor:
    return _dfl_forward(pred, (target,), ignore_out_of_range, with_distance=False)[0]


def dfl_backward(
    grad_loss: Tensor, pred: Tensor, target: Tensor, ignore_out_of_range: bool, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _dfl_backward((grad_loss,), pred, (target,), ignore_out_of_range, needs)


def dfl_integral_forward(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> tuple[Tensor, Tensor]:
    return _dfl_forward(pred, (target,), ignore_out_of_range, with_distance=True)


def dfl_integral_backward(
    grad_loss: Tensor, grad_distance: Tensor, pred: Tensor, target: Tensor, ignore_out_of_range: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return _dfl_backward((grad_loss, grad_distance), pred, (target,), ignore_out_of_range, needs)


def dfl_two_bin_forward(pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor) -> Tensor:
    return _dfl_forward(pred, (left, weight_left, weight_right), False, with_distance=False)[0]


def dfl_two_bin_backward(
    grad_loss: Tensor, pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _dfl_backward((grad_loss,), pred, (left, weight_left, weight_right), False, needs)


# ---- distillation with a temperature ----


@triton.jit
def ld_forward_kernel(
    pred, teacher, loss, m, n, stride_m, stride_bin, stride_teacher_m, stride_teacher_bin,
    T: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    exists = (bin < n)[None, :]
    pointers = bin_pointers(pred, rows, stride_m, bin, stride_bin)
    a, _e, total, _beyond = softened_tile(pointers, inside, exists, acc, INVERSE, SHARE)
    pointers = bin_pointers(teacher, rows, stride_teacher_m, bin, stride_teacher_bin)
    b, e, total_teacher, _beyond = softened_tile(pointers, inside, exists, acc, INVERSE, SHARE)
    divergence = tl.sum(e * (b - a), axis=1) / total_teacher + (tl.log(total) - tl.log(total_teacher))
    # Not n.to(acc): Triton makes a Python int of an argument that is 1.
    tl.store(loss + rows, divergence * (T * T / tl.full((), n, acc)), mask=inside)


@triton.jit
def ld_backward_kernel(
    grad_loss, pred, teacher, grad_pred, m, n,
    stride_grad, stride_m, stride_bin, stride_teacher_m, stride_teacher_bin,
    T: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = grad_loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    exists = (bin < n)[None, :]
    pointers = bin_pointers(pred, rows, stride_m, bin, stride_bin)
    _a, e, total, beyond = softened_tile(pointers, inside, exists, acc, INVERSE, SHARE)
    pointers = bin_pointers(teacher, rows, stride_teacher_m, bin, stride_teacher_bin)
    _b, e_teacher, total_teacher, _beyond = softened_tile(pointers, inside, exists, acc, INVERSE, SHARE)
    factor = tl.load(grad_loss + rows * stride_grad, mask=inside, other=0.0) * (T / tl.full((), n, acc))
    gradient = e * (factor / total)[:, None] - e_teacher * (factor / total_teacher)[:, None]
    store_gradient(grad_pred + rows * n, gradient, beyond, inside, bin, n - 1)


def _ld(rows: int, bins: int, temperature: float) -> tuple[int, dict[str, Any]]:
    programs, constants = _rows(rows, bins)
    # A row is held in registers: 16 elements each of student and teacher per thread, up to a block's 32 warps.
    warps = max(4, min(constants["BINS"] // 512, 32))
    scales = {"T": temperature, "INVERSE": 1.0 / temperature, "SHARE": min(temperature, 1.0)}
    return programs, {**scales, **constants, "num_warps": warps}


def ld_forward(pred: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    m, bins = pred.shape
    loss = torch.empty(m, dtype=accumulator(pred.dtype), device=pred.device)
    programs, constants = _ld(m, bins, temperature)
    launch.launch(
        ld_forward_kernel, programs, pred, pred, teacher, loss, m, bins, *pred.stride(), *teacher.stride(), **constants
    )
    return loss


def ld_backward(grad_loss: Tensor, pred: Tensor, teacher: Tensor, temperature: float, needs: Sequence[bool]) -> Tensor:
    m, bins = pred.shape
    grad_pred = launch.empty_gradient(pred, needs[0])
    if needs[0]:
        programs, constants = _ld(m, bins, temperature)
        launch.launch(
            ld_backward_kernel, programs, pred, grad_loss, pred, teacher, grad_pred, m, bins,
            grad_loss.stride(0), *pred.stride(), *teacher.stride(), **constants,
        )  # fmt: skip
    return launch.finished(grad_pred, pred)
