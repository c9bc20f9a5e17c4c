# SPDX-License-Identifier: Apache-2.0
"""Varifocal loss in Triton: t · BCE(x, t) where t > 0, else α |p − t|^γ · BCE(x, t)   (arXiv 2008.13367, eq. 2)

Tensors, layout, traffic, accumulator and repeatability: as `_elements` says, which walks over the elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._elements import load_elements, run_backward, run_forward
from ._focal import vfl_gradient, vfl_value


@triton.jit
def vfl_forward_kernel(
    pred, target, loss, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, IOU_WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, t, at, inside = load_elements(
        pred, target, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
        loss.dtype.element_ty, FLAT, BLOCK,
    )  # fmt: skip
    tl.store(loss + at, vfl_value(x, t, ALPHA, GAMMA, IOU_WEIGHTED, ACTIVATED), mask=inside)


@triton.jit
def vfl_backward_kernel(
    grad_loss, pred, target, grad_pred, grad_target,
    n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
    NEED_PRED: tl.constexpr, NEED_TARGET: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr, IOU_WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x, t, at, inside = load_elements(
        pred, target, n, columns, stride_pred_row, stride_pred, stride_target_row, stride_target,
        grad_loss.dtype.element_ty, FLAT, BLOCK,
    )  # fmt: skip
    scale = tl.load(grad_loss + at, mask=inside, other=0.0)
    grad_x, grad_t = vfl_gradient(x, t, ALPHA, GAMMA, IOU_WEIGHTED, ACTIVATED)
    if NEED_PRED:
        tl.store(grad_pred + at, (scale * grad_x).to(grad_pred.dtype.element_ty), mask=inside)
    if NEED_TARGET:
        tl.store(grad_target + at, scale * grad_t, mask=inside)


def forward(pred: Tensor, target: Tensor, alpha: float, gamma: float, iou_weighted: bool, activated: bool) -> Tensor:
    return run_forward(
        vfl_forward_kernel, pred, target, ALPHA=alpha, GAMMA=gamma, IOU_WEIGHTED=iou_weighted, ACTIVATED=activated
    )


def backward(
    grad_loss: Tensor,
    pred: Tensor,
    target: Tensor,
    alpha: float,
    gamma: float,
    iou_weighted: bool,
    activated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return run_backward(
        vfl_backward_kernel, grad_loss, pred, target, needs,
        ALPHA=alpha, GAMMA=gamma, IOU_WEIGHTED=iou_weighted, ACTIVATED=activated,
    )  # fmt: skip
