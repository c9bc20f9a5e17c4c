# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores, reduced to one number, with the gradient from the same pass; see core/grad_in_forward.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core import backends, extension
from ...core.dtypes import accumulator, as_dtype, device_type
from ...core.grad_in_forward import GradInForward, Grads, Inputs, Kernels, is_plain, wants_grad
from ...core.reduction import factor_and_norm
from ...core.registry import define, triton_kernel

# The values of the operators' argument `kind`.
QUALITY, FOCAL, VARIFOCAL, VARIFOCAL_UNWEIGHTED = range(4)

_INPUT = (
    "Tensor pred, Tensor? label, Tensor target, Tensor? weight, Tensor? norm, float factor, int kind, float alpha,"
    " float exponent, bool activated"
)


def _fake_forward(pred: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty((), dtype=accumulator(pred.dtype))
    return loss, torch.empty_like(pred) if others[-1] else pred.new_empty((0,))


def _fake_backward(grad_loss: Tensor, pred: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(pred)


def _second(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the loss has no second derivative in this backend; gfl_ops.set_backend('reference') has one"
    )


def _define(namespace: str, kernel: Callable[[str], Any] | None) -> Kernels:
    """Define the three operators. `kernel` gives the function for a direction; by default the extension has it."""
    for direction, suffix, schema, fake in (
        ("forward", "fwd", f"({_INPUT}, bool store) -> (Tensor loss, Tensor grad)", _fake_forward),
        ("backward", "bwd", f"(Tensor grad_loss, {_INPUT}) -> Tensor", _fake_backward),
        ("finish", "finish", f"(Tensor(a!) grad, Tensor grad_loss, {_INPUT}) -> ()", lambda *arguments: None),
    ):
        define(f"score_loss_{suffix}", schema, fake, namespace, kernel(direction) if kernel else None)
    torch.library.register_autograd(f"{namespace}::score_loss_bwd", _second)
    operators = getattr(torch.ops, namespace)

    def forward(inputs: Inputs, constants: Any, store: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        loss, grad = operators.score_loss_fwd(*inputs, *constants, store)
        return (loss,), grad

    def finish(grad: Tensor, grads: Grads, inputs: Inputs, constants: Any) -> tuple[Tensor]:
        operators.score_loss_finish(grad, *grads, *inputs, *constants)
        return (grad,)

    def backward(grads: Grads, inputs: Inputs, constants: Any) -> tuple[Tensor]:
        return (operators.score_loss_bwd(*grads, *inputs, *constants),)

    return Kernels(forward, finish, backward)


_DEVICES = tuple(device for device in ("cpu", "cuda") if extension.serves("score_loss_fwd", device))
_TRITON = _define("gfl_triton", lambda direction: triton_kernel("score_loss", direction))
_NATIVE = _define("gfl", None) if _DEVICES else None


def score_loss(
    stem: str,
    kind: int,
    pred: Tensor,
    label: Tensor | None,
    target: Tensor,
    alpha: float,
    exponent: float,
    activated: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor | None:
    """The reduced loss, or None where the caller has to compute the single losses and reduce them itself.

    Args:
        stem: of the operator that computes the single losses; its backend runs this too.
        kind: one of the above.
        pred: ``[N, C]`` or ``[B, C, P]``.
        label: ``[N]`` int64, of the quality focal loss, or None.
        target: in the accumulator's dtype; ``[N]`` with labels, else of pred's shape.
        weight: ``[N]``, ``[N, 1]`` or ``[B, P]``, or None.
    """
    kernels = _kernels(stem, pred, target, weight, reduction, avg_factor)
    if kernels is None:
        return None
    acc = target.dtype
    count = pred.numel() if kind != QUALITY else pred.shape[:1].numel() * pred.shape[2:].numel()
    factor, norm = factor_and_norm(reduction, avg_factor, count, pred, acc)
    if weight is not None:
        weight = as_dtype(weight, acc).reshape(pred.shape[:1] + pred.shape[2:])
    inputs, constants = (pred, label, target, weight, norm), (factor, kind, alpha, exponent, activated)
    if wants_grad([pred]):
        return GradInForward.apply(kernels, constants, *inputs)[0]
    return kernels.forward(inputs, constants, False)[0][0]


def _kernels(
    stem: str,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Kernels | None:
    """The kernels that can run the call, or None."""
    factor = avg_factor if isinstance(avg_factor, Tensor) else None
    if reduction == "none" or pred.dim() not in (2, 3) or not is_plain([pred], [target, weight, factor]):
        return None
    if weight is not None:
        rows = pred.shape[:1] + pred.shape[2:]
        if weight.shape not in (rows, (*rows, 1)):
            return None
    if factor is not None and factor.device.type not in ("cpu", pred.device.type):
        return None
    device = device_type(pred)
    backend = backends.serving(stem, device)
    if backend == "native" and device in _DEVICES:
        return _NATIVE
    return _TRITON if backend == "triton" else None
