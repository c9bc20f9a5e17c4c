# SPDX-License-Identifier: Apache-2.0
"""The losses of heads with their gradients from one pass over the maps; see core/grad_in_forward.py.

Such a loss takes the class maps and the box maps first, and gives the three losses first, with a gradient each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backends, extension
from ...core.dtypes import accumulator
from ...core.grad_in_forward import GradInForward, Grads, Inputs, Kernels, is_plain, wants_grad
from ...core.registry import SPECS, define

# Where a tensor belongs among the arguments that are none.
_TENSOR = object()


def _fake(
    cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor], *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    first = cls_scores[0]
    numbers = [first.new_empty((), dtype=accumulator(first.dtype)) for _ in range(5)]
    scales = first.new_empty((3,), dtype=torch.float64)
    gradients = [
        [torch.empty_like(m) if needed else m.new_empty((0,)) for m in maps]
        for maps, needed in zip((cls_scores, reg_preds), others[-1])
    ]
    return (*numbers, scales, *gradients)  # type: ignore[return-value]


def _arguments(inputs: Inputs, constants: Any) -> tuple[Any, ...]:
    """The operators' arguments from the maps, the other tensors and the rest."""
    maps, rest, needs = constants
    tensors = iter(inputs[2 * maps :])
    return inputs[:maps], inputs[maps : 2 * maps], *(next(tensors) if x is _TENSOR else x for x in rest), needs


def define_head_loss(stem: str, schema: str) -> Callable[..., tuple[Tensor, ...]]:
    """What gives the operator's results for its arguments, by one pass where a gradient is wanted."""
    taken = f"{schema[1 : schema.rindex(') ->')]}, bool[2] needs"
    devices = tuple(device for device in ("cpu", "cuda") if extension.serves(f"{stem}_fwd_and_grad", device))
    if devices:
        given = "Tensor scales, Tensor[] grad_cls_scores, Tensor[] grad_reg_preds)"
        define(f"{stem}_fwd_and_grad", f"({taken}) -> {schema[schema.rindex('(') : -1]}, {given}", _fake)
        finished = "(Tensor(a!)[] grad_cls_scores, Tensor(b!)[] grad_reg_preds, Tensor grad_0, Tensor grad_1"
        define(f"{stem}_finish", f"{finished}, Tensor grad_2, Tensor scales, {taken}) -> ()", lambda *arguments: None)

    def operator(name: str) -> Any:
        return getattr(torch.ops.gfl, f"{stem}_{name}")

    def forward(inputs: Inputs, constants: Any, store: bool) -> tuple[tuple[Tensor, ...], Any]:
        arguments = _arguments(inputs, constants)
        if not store:
            return operator("fwd")(*arguments[:-1]), None
        *losses, scales, grad_scores, grad_preds = operator("fwd_and_grad")(*arguments)
        return tuple(losses), (grad_scores, grad_preds, scales)

    def finish(buffers: Any, grads: Grads, inputs: Inputs, constants: Any) -> list[Tensor]:
        grad_scores, grad_preds, scales = buffers
        operator("finish")(grad_scores, grad_preds, *grads, scales, *_arguments(inputs, constants))
        return [*grad_scores, *grad_preds]

    def backward(grads: Grads, inputs: Inputs, constants: Any) -> list[Tensor]:
        grad_scores, grad_preds = operator("bwd")(*grads, *_arguments(inputs, constants))
        return [*grad_scores, *grad_preds]

    def reference(inputs: Inputs, constants: Any) -> tuple[Tensor, ...]:
        return SPECS[stem].reference(*_arguments(inputs, constants)[:-1])[:3]

    kernels = Kernels(forward, finish, backward, reference, differentiable=3)

    def head_loss(cls_scores: list[Tensor], reg_preds: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        device, maps = cls_scores[0].device.type, [*cls_scores, *reg_preds]
        needs = [wants_grad(cls_scores), wants_grad(reg_preds)]
        if any(needs) and device in devices and is_plain(maps) and backends.serving(stem, device) == "native":
            tensors = [x for x in rest if isinstance(x, Tensor)]
            constants = len(cls_scores), [_TENSOR if isinstance(x, Tensor) else x for x in rest], needs
            return GradInForward.apply(kernels, constants, *maps, *tensors)
        return SPECS[stem](device, cls_scores, reg_preds, *rest)

    return head_loss
