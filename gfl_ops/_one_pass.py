# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient in one walk over the logits, for losses on the CPU whose gradient can be foretold.

The gradient that reaches a row's loss follows from `weight`, `reduction` and `avg_factor`, unless what comes after the
loss scales it once more. The forward pass therefore computes the logits' gradient with what is expected, and the
backward pass returns it where exactly that arrives; whatever else arrives, it computes the gradient from the logits
anew. Both ways give the same bits. What has been handed out is never written again, so a second backward pass, a
retained graph and a gradient that is accumulated in place are as safe as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, _extension
from ._reduce import expected_gradient
from ._spec import SPECS, define

# In fp16 the gradients of most background logits would be stored as zero.
DTYPES = (torch.float32, torch.bfloat16)
# Below, the second walk costs less than the bookkeeping.
LEAST_ELEMENTS = 1 << 15


def _fake(
    pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool, scales: Tensor
) -> tuple[Tensor, Tensor]:
    return pred.new_empty(pred.shape[0], dtype=scales.dtype), pred.new_empty(pred.shape)


_SCHEMA = "(Tensor pred, Tensor? label, Tensor target, float beta, bool activated, Tensor scales) -> (Tensor, Tensor)"
if _extension.serves("qfl_fwd_and_grad", "cpu"):
    define("qfl_fwd_and_grad", _SCHEMA, _fake)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool, scales: Tensor
    ) -> Tensor:
        loss, gradient = torch.ops.gfl.qfl_fwd_and_grad(pred, label, target, beta, activated, scales)
        ctx.save_for_backward(pred, label, target, scales, gradient)
        ctx.constants = beta, activated
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        pred, label, target, scales, gradient = ctx.saved_tensors
        # A graph of the gradient is the operator's to refuse.
        if torch.is_grad_enabled() or not torch.equal(grad_loss, scales):
            arguments = (pred, label, target, *ctx.constants)
            gradient = torch.ops.gfl.qfl_bwd(grad_loss, *arguments, (True, False))[0]
        return gradient, None, None, None, None, None


def quality_focal_loss_rows(
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    beta: float,
    activated: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor:
    """``[N]``, as the operator `qfl` gives it; `weight` and what follows say how it will be reduced."""
    elsewhere = isinstance(avg_factor, Tensor) and avg_factor.device.type != "cpu"
    if reduction == "none" or elsewhere or not _can(pred, target):
        return SPECS["qfl"](pred.device.type, pred, label, target, beta, activated)
    scales = expected_gradient(pred.shape[0], target.dtype, weight, reduction, avg_factor)
    return _OnePass.apply(pred, label, target, beta, activated, scales)


def _can(pred: Tensor, target: Tensor) -> bool:
    if not (pred.requires_grad and torch.is_grad_enabled()) or pred.device.type != "cpu" or target.requires_grad:
        return False
    # A graph that is being compiled can't depend on what arrives; a subclass may stand for no numbers at all.
    if torch.compiler.is_compiling():
        return False
    plain = type(pred) in (Tensor, nn.Parameter) and type(target) is Tensor
    large = pred.dtype in DTYPES and pred.numel() >= LEAST_ELEMENTS and pred.stride(-1) == 1
    return plain and large and _backend.serving("qfl", "cpu") == "native"
