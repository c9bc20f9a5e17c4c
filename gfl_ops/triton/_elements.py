# SPDX-License-Identifier: Apache-2.0
"""What the element-by-element losses share: a walk over two tensors of one shape, in any strides.

    pred        any shape   fp32, fp16, bf16, fp64  read, any strides
    target      as pred     A                       read, any strides
    loss        as pred     A                       write, contiguous
    grad_pred   as pred     as pred                 write, contiguous
    grad_target as pred     A                       write, contiguous

A program owns BLOCK elements of the flattened shape. Bytes an element: forward sizeof(pred) + 2 sizeof(A), backward 2
sizeof(pred) + 2 sizeof(A), the terms being computed again. Accumulator A: fp32, fp64 for fp64. Repeatable bit for
bit: nothing is summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import _launch


@triton.jit
def load_elements(
    pred, target, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    acc: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score and target of this program's elements, their places in contiguous memory, and which of them exist."""
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
    return x.to(acc), t, at, inside


def _walk(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    folded = _launch.fold(pred, target)
    if len(folded) > 2:
        pred, target = pred.contiguous(), target.contiguous()
        folded = _launch.fold(pred, target)
    flat = len(folded) < 2
    (_, pred_row, target_row), (columns, pred_stride, target_stride) = [(1, 0, 0)] * (2 - len(folded)) + folded
    block = _launch.rows_per_program(pred.numel(), 1)
    sizes = (pred.numel(), columns, pred_row, pred_stride, target_row, target_stride)
    return pred, target, sizes, {"FLAT": flat, "BLOCK": block}


def run_forward(kernel: Any, pred: Tensor, target: Tensor, **options: Any) -> Tensor:
    loss = torch.empty(pred.shape, dtype=accumulator(pred.dtype), device=pred.device)
    pred, target, sizes, constants = _walk(pred, target)
    programs = _launch.programs(sizes[0], constants["BLOCK"])
    _launch.launch(kernel, programs, pred, pred, target, loss, *sizes, **options, **constants)
    return loss


def run_backward(
    kernel: Any, grad_loss: Tensor, pred: Tensor, target: Tensor, needs: Sequence[bool], **options: Any
) -> tuple[Tensor, Tensor]:
    grad_pred, grad_target = _launch.empty_gradient(pred, needs[0]), _launch.empty_gradient(target, needs[1])
    dense_pred, dense_target, sizes, constants = _walk(pred, target)
    _launch.launch(
        kernel, _launch.programs(sizes[0], constants["BLOCK"]), pred,
        grad_loss.contiguous(), dense_pred, dense_target, grad_pred, grad_target, *sizes,
        NEED_PRED=needs[0], NEED_TARGET=needs[1], **options, **constants,
    )  # fmt: skip
    return _launch.finished(grad_pred, pred), grad_target
