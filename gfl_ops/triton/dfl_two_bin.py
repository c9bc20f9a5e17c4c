# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss with given bins and weights in Triton: D-FINE's fine-grained localisation loss.

    loss[m] = −w_left·log p_l − w_right·log p_{l+1},   p = softmax(x[m])  (arXiv 2410.13842, without the IoU weight)

    pred                      [M, R+1]  fp32, fp16, bf16, fp64  read, any strides
    left                      [M]       int64                   read; a bin that doesn't exist becomes the nearest
    weight_left, weight_right [M]       A                       read
    loss                      [M]       A                       write
    grad_pred                 [M, R+1]  as pred                 write, contiguous
    grad_weight_left, _right  [M]       A                       write

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
from ._bins import at_bin, softmax_tile
from .dfl import tiles


@triton.jit
def _bins(left, rows, inside, stride_left, reg_max):
    """The two bins of each row, each moved to the nearest that exists."""
    first = tl.load(left + rows * stride_left, mask=inside, other=0)
    # Held within [−1, R] before 1 is added, or the largest integer runs over.
    first = tl.where(first < -1, -1, tl.where(first > reg_max, reg_max, first)).to(tl.int32)
    second = tl.where(first < reg_max, first + 1, reg_max)
    return tl.where(first < 0, 0, first), second


@triton.jit
def dfl_two_bin_forward_kernel(
    pred, left, weight_left, weight_right, loss, m, reg_max,
    stride_m, stride_bin, stride_left, stride_weight_left, stride_weight_right,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + rows[:, None] * stride_m + bin.to(tl.int64)[None, :] * stride_bin
    x, _e, total, largest, _beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    first, second = _bins(left, rows, inside, stride_left, reg_max)
    w_first = tl.load(weight_left + rows * stride_weight_left, mask=inside, other=0.0)
    w_second = tl.load(weight_right + rows * stride_weight_right, mask=inside, other=0.0)
    log_total = tl.log(total)
    at_first = at_bin(x, bin, first) - largest - log_total
    at_second = at_bin(x, bin, second) - largest - log_total
    tl.store(loss + rows, -(at_first * w_first + at_second * w_second), mask=inside)


@triton.jit
def dfl_two_bin_backward_kernel(
    grad_loss, pred, left, weight_left, weight_right, grad_pred, grad_left, grad_right, m, reg_max,
    stride_grad, stride_m, stride_bin, stride_left, stride_weight_left, stride_weight_right,
    NEED_PRED: tl.constexpr, NEED_LEFT: tl.constexpr, NEED_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = grad_loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    pointers = pred + rows[:, None] * stride_m + bin.to(tl.int64)[None, :] * stride_bin
    x, e, total, largest, beyond = softmax_tile(pointers, inside, bin, reg_max, acc)
    first, second = _bins(left, rows, inside, stride_left, reg_max)
    scale = tl.load(grad_loss + rows * stride_grad, mask=inside, other=0.0)
    if NEED_PRED:
        w_first = tl.load(weight_left + rows * stride_weight_left, mask=inside, other=0.0)
        w_second = tl.load(weight_right + rows * stride_weight_right, mask=inside, other=0.0)
        # The two bins are one where the nearest that exists is the same: the weights add up.
        weight = tl.where(bin[None, :] == first[:, None], w_first[:, None], 0.0)
        weight += tl.where(bin[None, :] == second[:, None], w_second[:, None], 0.0)
        gradient = scale[:, None] * ((w_first + w_second)[:, None] * (e / total[:, None]) - weight)
        gradient = tl.where(beyond, 0.0, gradient).to(grad_pred.dtype.element_ty)
        out = grad_pred + rows[:, None] * (reg_max + 1) + bin[None, :]
        tl.store(out, gradient, mask=inside[:, None] & (bin <= reg_max)[None, :])
    log_total = tl.log(total)
    if NEED_LEFT:
        tl.store(grad_left + rows, -scale * (at_bin(x, bin, first) - largest - log_total), mask=inside)
    if NEED_RIGHT:
        tl.store(grad_right + rows, -scale * (at_bin(x, bin, second) - largest - log_total), mask=inside)


def forward(pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor) -> Tensor:
    m, bins = pred.shape
    loss = torch.empty(m, dtype=accumulator(pred.dtype), device=pred.device)
    constants = tiles(m, bins)
    _launch.launch(
        dfl_two_bin_forward_kernel, _launch.programs(m, constants["BLOCK_M"]), pred,
        pred, left, weight_left, weight_right, loss, m, bins - 1,
        *pred.stride(), left.stride(0), weight_left.stride(0), weight_right.stride(0), **constants,
    )  # fmt: skip
    return loss


def backward(
    grad_loss: Tensor, pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    m, bins = pred.shape
    grad_pred = _launch.empty_gradient(pred, needs[0])
    grad_left, grad_right = (_launch.empty_gradient(w, n) for w, n in zip((weight_left, weight_right), needs[1:]))
    constants = tiles(m, bins)
    _launch.launch(
        dfl_two_bin_backward_kernel, _launch.programs(m, constants["BLOCK_M"]), pred,
        grad_loss, pred, left, weight_left, weight_right, grad_pred, grad_left, grad_right, m, bins - 1,
        grad_loss.stride(0), *pred.stride(), left.stride(0), weight_left.stride(0), weight_right.stride(0),
        NEED_PRED=needs[0], NEED_LEFT=needs[1], NEED_RIGHT=needs[2], **constants,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred), grad_left, grad_right
