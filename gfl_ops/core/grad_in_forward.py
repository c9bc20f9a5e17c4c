# SPDX-License-Identifier: Apache-2.0
"""The autograd node of the losses whose forward pass computes their gradient as well.

A loss comes out of its kernel weighted and normalised, so the gradient that it receives is nearly always 1. The forward
kernel therefore writes d loss / d input (or the exponentials that it is made of) while the input is in cache:

- *forward* returns the loss and keeps the buffer that holds the gradient.
- The first backward pass takes the buffer out of the graph and *finishes* it in place: the kernel returns at once where
  1 arrives and recomputes the gradient otherwise. The device decides, so the host never waits. Nobody else has seen
  the buffer, so no gradient that was handed out is ever overwritten.
- Any later *backward* pass over a retained graph finds the buffer gone and computes the gradient into a new tensor.

Both ways give the same bits. fp16 stores no gradient, since most of it would underflow. Under ``create_graph=True`` the
gradient comes from the backward operator, which refuses to be differentiated itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import transforms

Inputs = tuple[Tensor | None, ...]
Grads = tuple[Tensor, ...]


class Kernels(NamedTuple):
    """What one loss runs in each step. `constants` is whatever the loss needs besides its input tensors.

    Attributes:
        forward: (inputs, constants, store) -> (outputs, buffers). The buffers are None or ignored unless `store`.
        finish: (buffers, grads, inputs, constants) -> the gradients of the leading inputs.
        backward: (grads, inputs, constants) -> the same, without buffers.
        reference: (inputs, constants) -> the differentiable outputs in plain torch, for transforms of functions.
        differentiable: how many outputs, counted from the first, have a gradient.
    """

    forward: Callable[[Inputs, Any, bool], tuple[tuple[Tensor, ...], Any]]
    finish: Callable[[Any, Grads, Inputs, Any], Iterable[Tensor]]
    backward: Callable[[Grads, Inputs, Any], Iterable[Tensor]]
    reference: Callable[[Inputs, Any], Sequence[Tensor]]
    differentiable: int = 1


class GradInForward(torch.autograd.Function):
    """``GradInForward.apply(kernels, constants, *inputs)`` returns the outputs as a tuple; see above."""

    @staticmethod
    def forward(ctx: Any, kernels: Kernels, constants: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        store = torch.float16 not in [x.dtype for x in inputs if x is not None]
        outputs, buffers = kernels.forward(inputs, constants, store)
        ctx.save_for_backward(*inputs)
        # Not saved tensors: a retained graph would hold on to the buffers after they have been handed out.
        ctx.buffers = buffers if store else None
        ctx.kernels, ctx.constants = kernels, constants
        if len(outputs) > 1:
            # Missing gradients are made below: torch would also make some for outputs that have none.
            ctx.set_materialize_grads(False)
            ctx.expected = [(o.shape, o.dtype, o.device) for o in outputs[: kernels.differentiable]]
            ctx.mark_non_differentiable(*outputs[kernels.differentiable :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: Any = arriving
        if len(arriving) > 1:
            grads = tuple(
                torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
                for grad, (shape, dtype, device) in zip(arriving, ctx.expected)
            )
        if transforms.active_in_backward():
            return _pull_back(ctx, grads)
        inputs, (buffers, ctx.buffers) = ctx.saved_tensors, (ctx.buffers, None)
        if buffers is None or torch.is_grad_enabled():
            found = ctx.kernels.backward(grads, inputs, ctx.constants)
        else:
            found = ctx.kernels.finish(buffers, grads, inputs, ctx.constants)
        found = tuple(found)
        return None, None, *found, *[None] * (len(inputs) - len(found))


def _pull_back(ctx: Any, grads: Grads) -> tuple[Tensor | None, ...]:
    """The gradients of a node by the reference."""
    inputs, wanted = ctx.saved_tensors, [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

    def outputs_of(*leaves: Tensor) -> Sequence[Tensor]:
        given = list(inputs)
        for i, leaf in zip(wanted, leaves):
            given[i] = leaf
        return ctx.kernels.reference(tuple(given), ctx.constants)

    found: list[Tensor | None] = [None] * len(inputs)
    grads = grads[: ctx.kernels.differentiable]
    for i, gradient in zip(wanted, transforms.pull_back(outputs_of, [inputs[i] for i in wanted], grads)):
        found[i] = gradient
    return None, None, *found


def wants_grad(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd records what happens to any of the tensors."""
    # Here and below loops rather than any(…) and all(…): a generator costs a microsecond.
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def is_plain(differentiable: Iterable[Tensor], others: Iterable[object] = ()) -> bool:
    """Whether a kernel that autograd does not see may compute the loss of these tensors.

    Not while a graph is compiled or traced, since it can't own a buffer; not under transforms of functions and where
    tangents are propagated, for which the node has no rule; not for subclasses, which may stand for no numbers; not if
    a gradient must reach one of `others`.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or transforms.active():
        return False
    for x in differentiable:
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return False
    for other in others:
        if isinstance(other, Tensor) and (type(other) is not Tensor or other.requires_grad):
            return False
    return True
