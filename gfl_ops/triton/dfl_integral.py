# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss and the expected distance from one softmax, in Triton: the kernels of `dfl` with both
results."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .dfl import run_backward, run_forward


def forward(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> tuple[Tensor, Tensor]:
    return run_forward(pred, target, ignore_out_of_range, with_distance=True)


def backward(
    grad_loss: Tensor,
    grad_distance: Tensor,
    pred: Tensor,
    target: Tensor,
    ignore_out_of_range: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    return run_backward(grad_loss, grad_distance, pred, target, ignore_out_of_range, needs)
