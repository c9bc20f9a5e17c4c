# SPDX-License-Identifier: Apache-2.0
"""Distillation of distributions with a temperature T in Triton.

    loss[m] = T²/n Σ_j q_j·(log q_j − log p_j),   p = softmax(pred[m]/T),  q = softmax(teacher[m]/T)
    (arXiv 2102.12252, 1503.02531)

    pred, teacher  [M, n]  fp32, fp16, bf16, fp64  read, any strides
    loss           [M]     A                       write
    grad_pred      [M, n]  as pred                 write, contiguous

A program holds BLOCK_M whole rows of both sides, padded to a power of two of bins. Bytes an element: forward
2·sizeof(pred), backward 3·sizeof(pred). Accumulator A: fp32, fp64 for fp64. Repeatable bit for bit: a row is reduced
by one fixed tree. The temperature is compiled in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch
from ._bins import held, largest_logit


@triton.jit
def _softened(
    tensor, rows, inside, bin, n, stride_m, stride_bin, acc: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr
):
    """Logits less the row's largest over T, their exponentials, the sum of those, and which logits are beyond."""
    exists = inside[:, None] & (bin < n)[None, :]
    limit: tl.constexpr = largest_logit(acc) * SHARE
    pointers = tensor + rows[:, None] * stride_m + bin.to(tl.int64)[None, :] * stride_bin
    x, beyond = held(tl.load(pointers, mask=exists, other=0.0).to(acc), limit)
    # Rows and bins that are not there hold zeros, and weigh nothing: an infinity less itself would be a NaN.
    largest = tl.max(tl.where((bin < n)[None, :], x, float("-inf")), axis=1)
    x = tl.where((bin < n)[None, :], (x - largest[:, None]) * INVERSE, 0.0)
    e = tl.where((bin < n)[None, :], tl.exp(x), 0.0)
    return x, e, tl.sum(e, axis=1), beyond


@triton.jit
def ld_forward_kernel(
    pred, teacher, loss, m, n, stride_m, stride_bin, stride_teacher_m, stride_teacher_bin,
    T: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < m
    acc: tl.constexpr = loss.dtype.element_ty
    bin = tl.arange(0, BINS)
    a, _e, total, _beyond = _softened(pred, rows, inside, bin, n, stride_m, stride_bin, acc, INVERSE, SHARE)
    b, e, total_teacher, _beyond = _softened(
        teacher, rows, inside, bin, n, stride_teacher_m, stride_teacher_bin, acc, INVERSE, SHARE
    )
    divergence = tl.sum(e * (b - a), axis=1) / total_teacher + (tl.log(total) - tl.log(total_teacher))
    tl.store(loss + rows, divergence * (T * T / n.to(acc)), mask=inside)


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
    _a, e, total, beyond = _softened(pred, rows, inside, bin, n, stride_m, stride_bin, acc, INVERSE, SHARE)
    _b, e_teacher, total_teacher, _beyond = _softened(
        teacher, rows, inside, bin, n, stride_teacher_m, stride_teacher_bin, acc, INVERSE, SHARE
    )
    factor = tl.load(grad_loss + rows * stride_grad, mask=inside, other=0.0) * (T / n.to(acc))
    gradient = e * (factor / total)[:, None] - e_teacher * (factor / total_teacher)[:, None]
    gradient = tl.where(beyond, 0.0, gradient).to(grad_pred.dtype.element_ty)
    out = grad_pred + rows[:, None] * n + bin[None, :]
    tl.store(out, gradient, mask=inside[:, None] & (bin < n)[None, :])


def _constants(rows: int, bins: int, temperature: float) -> dict[str, float | int]:
    width = _launch.power_of_two(bins)
    return {
        "T": temperature,
        "INVERSE": 1.0 / temperature,
        "SHARE": min(temperature, 1.0),
        "BLOCK_M": _launch.rows_per_program(rows, width),
        "BINS": width,
        # A row is held in registers: 16 elements of each side a thread, where a block can have so many threads.
        "num_warps": max(4, min(width // 512, 32)),
    }


def forward(pred: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    m, bins = pred.shape
    loss = torch.empty(m, dtype=accumulator(pred.dtype), device=pred.device)
    constants = _constants(m, bins, temperature)
    _launch.launch(
        ld_forward_kernel, _launch.programs(m, int(constants["BLOCK_M"])), pred,
        pred, teacher, loss, m, bins, *pred.stride(), *teacher.stride(), **constants,
    )  # fmt: skip
    return loss


def backward(grad_loss: Tensor, pred: Tensor, teacher: Tensor, temperature: float, needs: Sequence[bool]) -> Tensor:
    m, bins = pred.shape
    grad_pred = _launch.empty_gradient(pred, needs[0])
    if needs[0]:
        constants = _constants(m, bins, temperature)
        _launch.launch(
            ld_backward_kernel, _launch.programs(m, int(constants["BLOCK_M"])), pred,
            grad_loss, pred, teacher, grad_pred, m, bins, grad_loss.stride(0), *pred.stride(), *teacher.stride(),
            **constants,
        )  # fmt: skip
    return _launch.finished(grad_pred, pred)
