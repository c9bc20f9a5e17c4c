# SPDX-License-Identifier: Apache-2.0
"""Focal loss in Triton: α_t (1 − p_t)^γ · BCE(x, t), element by element   (arXiv 1708.02002, eq. 5)

Tensors, layout, traffic, accumulator and repeatability: as `_elements` says, which walks over the elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._elements import load_elements, run_backward, run_forward
from ._focal import focal_gradient, focal_value


@triton.jit
def focal_forward_kernel(
    pred, target, loss, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACTIVATED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, t, at, inside = load_elements(
        pred, target, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
        loss.dtype.element_ty, FLAT, BLOCK,
    )  # fmt: skip
    tl.store(loss + at, focal_value(x, t, ALPHA, GAMMA, ACTIVATED), mask=inside)


@triton.jit
def focal_backward_kernel(
    grad_loss, pred, target, grad_pred, grad_target,
    n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACTIVATED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, t, at, inside = load_elements(
        pred, target, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
        grad_loss.dtype.element_ty, FLAT, BLOCK,
    )  # fmt: skip
    scale = tl.load(grad_loss + at, mask=inside, other=0.0)
    grad_x, grad_t = focal_gradient(x, t, ALPHA, GAMMA, ACTIVATED)
    if NEED_PRED:
        tl.store(grad_pred + at, (scale * grad_x).to(grad_pred.dtype.element_ty), mask=inside)
    if NEED_TARGET:
        tl.store(grad_target + at, scale * grad_t, mask=inside)


def forward(pred: Tensor, target: Tensor, alpha: float, gamma: float, activated: bool) -> Tensor:
    return run_forward(focal_forward_kernel, pred, target, ALPHA=alpha, GAMMA=gamma, ACTIVATED=activated)


def backward(
    grad_loss: Tensor,
    pred: Tensor,
    target: Tensor,
    alpha: float,
    gamma: float,
    activated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return run_backward(
        focal_backward_kernel, grad_loss, pred, target, needs,
        ALPHA=alpha, GAMMA=gamma, ACTIVATED=activated,
    )  # fmt: skip
