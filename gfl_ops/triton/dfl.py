# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss with unit bins in Triton, alone or with the expected distance from the same softmax.

    loss[m] = −(l+1−y)·log p_l − (y−l)·log p_{l+1},   distance[m] = Σ_j p_j·j,   p = softmax(x[m]),  l = ⌊y⌋
    (arXiv 2006.04388, eq. 6 and 5)

    pred        [M, R+1]  fp32, fp16, bf16, fp64  read, any strides
    target      [M]       A                       read
    loss        [M]       A                       write
    distance    [M]       A                       write, for dfl_integral
    grad_pred   [M, R+1]  as pred                 write, contiguous
    grad_target [M]       A                       write

A program holds BLOCK_M whole rows, padded to a power of two of bins. Bytes an element: forward sizeof(pred), backward
twice that. Accumulator A: fp32, fp64 for fp64. Repeatable bit for bit: a row is reduced by one fixed tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch
from ._bins import at_bin, expected_bin, expected_bin_gradient, softmax_tile


@triton.jit
def _position(target, rows, inside, stride_target, reg_max, IGNORE: tl.constexpr):
    """Target held within the bins, its lower bin, and which rows count and which pass a gradient to the target."""
    y = tl.load(target + rows * stride_target, mask=inside, other=0.0)
    within = (y >= 0.0) & (y <= reg_max)
    if IGNORE:
        counted = within
    else:
        counted = y == y
    y = tl.where(counted, y, 0.0)
    y = tl.where(y < 0.0, 0.0, tl.where(y > reg_max, tl.zeros_like(y) + reg_max, y))
    left = y.to(tl.int32)
    left = tl.where(left < reg_max, left, reg_max - 1)
    return y, left, counted, within


@triton.jit
def dfl_forward_kernel(
    pred, target, loss, distance, m, reg_max, stride_m, stride_bin, stride_target,
    IGNORE: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + rows[:, None] * stride_m + bin.to(tl.int64)[None, :] * stride_bin
    x, e, total, largest, _beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    y, left, counted, _within = _position(target, rows, inside, stride_target, reg_max, IGNORE)
    log_total = tl.log(total)
    at_left = at_bin(x, bin, left) - largest - log_total
    at_right = at_bin(x, bin, left + 1) - largest - log_total
    lower = left.to(acc)
    value = -(at_left * (lower + 1.0 - y) + at_right * (y - lower))
    tl.store(loss + rows, tl.where(counted, value, 0.0), mask=inside)
    if DISTANCE:
        tl.store(distance + rows, expected_bin(e, total, bin), mask=inside)


@triton.jit
def dfl_backward_kernel(
    grad_loss, grad_distance, pred, target, grad_pred, grad_target, m, reg_max,
    stride_grad_loss, stride_grad_distance, stride_m, stride_bin, stride_target,
    IGNORE: tl.constexpr, DISTANCE: tl.constexpr, NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = grad_loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + rows[:, None] * stride_m + bin.to(tl.int64)[None, :] * stride_bin
    x, e, total, _largest, beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    y, left, counted, within = _position(target, rows, inside, stride_target, reg_max, IGNORE)
    scale = tl.load(grad_loss + rows * stride_grad_loss, mask=inside, other=0.0)
    if NEED_PRED:
        lower = left.to(acc)[:, None]
        weight = tl.where(bin[None, :] == left[:, None], lower + 1.0 - y[:, None], 0.0)
        weight = tl.where(bin[None, :] == left[:, None] + 1, y[:, None] - lower, weight)
        gradient = tl.where(counted[:, None], scale[:, None] * (e / total[:, None] - weight), 0.0)
        if DISTANCE:
            grad = tl.load(grad_distance + rows * stride_grad_distance, mask=inside, other=0.0)
            gradient += expected_bin_gradient(e, total, bin, grad)
        gradient = tl.where(beyond, 0.0, gradient).to(grad_pred.dtype.element_ty)
        out = grad_pred + rows[:, None] * (reg_max + 1) + bin[None, :]
        tl.store(out, gradient, mask=inside[:, None] & (bin <= reg_max)[None, :])
    if NEED_TARGET:
        slope = at_bin(x, bin, left) - at_bin(x, bin, left + 1)
        tl.store(grad_target + rows, tl.where(counted & within, scale * slope, 0.0), mask=inside)


def tiles(rows: int, bins: int) -> dict[str, int]:
    width = _launch.power_of_two(bins)
    return {"BLOCK_M": _launch.rows_per_program(rows, width), "BINS": width}


def run_forward(pred: Tensor, target: Tensor, ignore: bool, with_distance: bool) -> tuple[Tensor, Tensor]:
    m, bins = pred.shape
    loss = torch.empty(m, dtype=accumulator(pred.dtype), device=pred.device)
    distance = torch.empty_like(loss) if with_distance else loss
    constants = tiles(m, bins)
    _launch.launch(
        dfl_forward_kernel, _launch.programs(m, constants["BLOCK_M"]), pred,
        pred, target, loss, distance, m, bins - 1, *pred.stride(), target.stride(0),
        IGNORE=ignore, DISTANCE=with_distance, **constants,
    )  # fmt: skip
    return loss, distance


def run_backward(
    grad_loss: Tensor, grad_distance: Tensor | None, pred: Tensor, target: Tensor, ignore: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    m, bins = pred.shape
    grad_pred, grad_target = _launch.empty_gradient(pred, needs[0]), _launch.empty_gradient(target, needs[1])
    constants = tiles(m, bins)
    with_distance = grad_distance is not None
    if grad_distance is None:
        grad_distance = grad_loss
    _launch.launch(
        dfl_backward_kernel, _launch.programs(m, constants["BLOCK_M"]), pred,
        grad_loss, grad_distance, pred, target, grad_pred, grad_target, m, bins - 1,
        grad_loss.stride(0), grad_distance.stride(0), *pred.stride(), target.stride(0),
        IGNORE=ignore, DISTANCE=with_distance, NEED_PRED=needs[0], NEED_TARGET=needs[1], **constants,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred), grad_target


def forward(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> Tensor:
    return run_forward(pred, target, ignore_out_of_range, with_distance=False)[0]


def backward(
    grad_loss: Tensor, pred: Tensor, target: Tensor, ignore_out_of_range: bool, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return run_backward(grad_loss, None, pred, target, ignore_out_of_range, needs)
