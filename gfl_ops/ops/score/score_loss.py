# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores down to one number, whose gradient is written in the forward pass.

A loss comes out of the kernel weighted and normalised, so that the gradient it receives is 1 unless what comes after
scales it once more. The forward pass therefore writes the scores' final gradient beside the loss, in one walk. The
first backward pass takes that tensor out of the graph and *finishes* it: a kernel that leaves at once if 1 arrives, and
else computes the gradient anew in its place; which of the two, the device decides, and the host waits for nothing.
Nobody has seen the tensor before, so nothing that was handed out is overwritten. A later backward pass of a retained
graph finds it gone and computes into a fresh one. fp16 stores no gradient, most of which would underflow, and always
computes.

The node that does so is written twice, here for every backend and in C++ for the extension: on a few rows a node in
Python takes a fifth of the time of both passes. Where a mode, a transform or a profiler wants to see the operators, the
one here serves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core import backends, extension
from ...core.dtypes import accumulator, as_dtype, device_type
from ...core.reduction import factor_and_norm
from ...core.registry import define

# What the operators call the losses.
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


def _fake_finish(*arguments: Any) -> None:
    return None


def _second(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the loss has no second derivative in this backend; gfl_ops.set_backend('reference') has one"
    )


class _Operators(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Tensor]
    finish: Callable[..., Any]
    # _GradInForward in C++, where the extension has it; gives None where the call is for the dispatcher to see.
    recorded: Callable[..., Tensor | None] | None = None


def _define(namespace: str, kernels: Callable[[str], Any] | None) -> _Operators:
    names = {"forward": "score_loss_fwd", "backward": "score_loss_bwd", "finish": "score_loss_finish"}
    for name, schema, fake in (
        ("forward", f"({_INPUT}, bool store) -> (Tensor loss, Tensor grad)", _fake_forward),
        ("backward", f"(Tensor grad_loss, {_INPUT}) -> Tensor", _fake_backward),
        ("finish", f"(Tensor(a!) grad, Tensor grad_loss, {_INPUT}) -> ()", _fake_finish),
    ):
        define(names[name], schema, fake, namespace, kernels(name) if kernels else None)
    torch.library.register_autograd(f"{namespace}::score_loss_bwd", _second)
    return _Operators(*(getattr(getattr(torch.ops, namespace), name) for name in names.values()))


def _triton(direction: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module("gfl_ops.triton.score_loss"), direction)(*arguments)

    return kernel


_DEVICES = tuple(device for device in ("cpu", "cuda") if extension.serves("score_loss_fwd", device))
_TRITON = _define("gfl_triton", _triton)
if _DEVICES:
    _NATIVE = _define("gfl", None)
    _NATIVE = _NATIVE._replace(
        forward=extension.eager_bypass("score_loss_forward", "score_loss_fwd"),
        finish=extension.eager_bypass("score_loss_finish", "score_loss_finish"),
        recorded=extension.direct("score_loss_recorded"),
    )


class _GradInForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operators: _Operators,
        pred: Tensor,
        label: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        norm: Tensor | None,
        constants: tuple[Any, ...],
    ) -> Tensor:
        store = pred.dtype != torch.float16
        loss, gradient = operators.forward(pred, label, target, weight, norm, *constants, store)
        ctx.save_for_backward(pred, label, target, weight, norm)
        ctx.operators, ctx.constants = operators, constants
        # Not among the saved tensors, which a retained graph would hold on to after it has been handed out.
        ctx.gradient = gradient if store else None
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad_loss, *ctx.saved_tensors, *ctx.constants)
        gradient, ctx.gradient = ctx.gradient, None
        # A graph of the gradient is the operator's to refuse.
        if gradient is None or torch.is_grad_enabled():
            gradient = ctx.operators.backward(*arguments)
        else:
            ctx.operators.finish(gradient, *arguments)
        return None, gradient, None, None, None, None, None


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
    """The reduced loss, or None where the way over the single losses has to be taken.

    Args:
        stem: of the operator that computes the single losses; the backend that serves it serves this too.
        kind: one of the above.
        pred: ``[N, C]`` or ``[B, C, P]``.
        label: ``[N]`` int64, of the quality focal loss, or None.
        target: in the accumulator's dtype; ``[N]`` with labels, else of pred's shape.
        weight: ``[N]``, ``[N, 1]`` or ``[B, P]``, or None.
    """
    operators = _operators(stem, pred, target, weight, reduction, avg_factor)
    if operators is None:
        return None
    acc = target.dtype
    count = pred.numel() if kind != QUALITY else pred.shape[:1].numel() * pred.shape[2:].numel()
    factor, norm = factor_and_norm(reduction, avg_factor, count, pred, acc)
    if weight is not None:
        weight = as_dtype(weight, acc).reshape(pred.shape[:1] + pred.shape[2:])
    tensors, constants = (pred, label, target, weight, norm), (factor, kind, alpha, exponent, activated)
    if pred.requires_grad and torch.is_grad_enabled():
        loss = operators.recorded(*tensors, *constants) if operators.recorded else None
        return _GradInForward.apply(operators, *tensors, constants) if loss is None else loss
    return operators.forward(*tensors, *constants, False)[0]


def _operators(
    stem: str,
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> _Operators | None:
    """The operators that can serve the call, or None."""
    # A graph that is being compiled can't own a tensor, and transforms of functions have no rule for it.
    if reduction == "none" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if pred.dim() not in (2, 3):
        return None
    if weight is not None:
        rows = pred.shape[:1] + pred.shape[2:]
        if weight.shape not in (rows, (*rows, 1)):
            return None
    # The gradient reaches the scores alone; a subclass may stand for no numbers at all.
    factor = avg_factor if isinstance(avg_factor, Tensor) else None
    for other in (target, weight, factor):
        if other is not None and (type(other) is not Tensor or other.requires_grad):
            return None
    if type(pred) not in (Tensor, nn.Parameter) or (
        factor is not None and factor.device.type not in ("cpu", pred.device.type)
    ):
        return None
    device = device_type(pred)
    backend = backends.serving(stem, device)
    if backend == "native" and device in _DEVICES:
        return _NATIVE
    return _TRITON if backend == "triton" else None
