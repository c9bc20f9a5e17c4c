# SPDX-License-Identifier: Apache-2.0
"""The head's losses with their gradients from one pass over the maps; see core/grad_in_forward.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backends, extension
from ...core.dtypes import accumulator
from ...core.grad_in_forward import GradInForward, Grads, Inputs, Kernels, is_plain, wants_grad
from ...core.registry import SPECS, define

_INPUT = (
    "Tensor[] cls_scores, Tensor[] reg_preds, float[] strides, Tensor labels, Tensor matched, Tensor gt_boxes,"
    " Tensor? cls_norm, Tensor? box_norm, int reg_max, float[] loss_weights, float beta, float[] center_offset,"
    " bool legacy, bool[2] needs"
)
_SCHEMA = (
    f"({_INPUT}) -> (Tensor cls, Tensor box, Tensor dfl, Tensor num_pos, Tensor box_weight, Tensor scales,"
    " Tensor[] grad_cls_scores, Tensor[] grad_reg_preds)"
)
_FINISH_SCHEMA = (
    "(Tensor(a!)[] grad_cls_scores, Tensor(b!)[] grad_reg_preds, Tensor grad_cls, Tensor grad_box, Tensor grad_dfl,"
    f" Tensor scales, {_INPUT}) -> ()"
)


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


_DEVICES = tuple(device for device in ("cpu", "cuda") if extension.serves("gfl_loss_fwd_and_grad", device))
if _DEVICES:
    define("gfl_loss_fwd_and_grad", _SCHEMA, _fake)
    define("gfl_loss_finish", _FINISH_SCHEMA, lambda *arguments: None)


def _arguments(inputs: Inputs, constants: Any) -> tuple[Any, ...]:
    """The operators' arguments from the maps, the other tensors and the rest."""
    levels, strides, options, needs = constants
    return inputs[:levels], inputs[levels : 2 * levels], strides, *inputs[2 * levels :], *options, needs


def _forward(inputs: Inputs, constants: Any, store: bool) -> tuple[tuple[Tensor, ...], Any]:
    arguments = _arguments(inputs, constants)
    if not store:
        return torch.ops.gfl.gfl_loss_fwd(*arguments[:-1]), None
    *losses, scales, grad_scores, grad_preds = torch.ops.gfl.gfl_loss_fwd_and_grad(*arguments)
    return tuple(losses), (grad_scores, grad_preds, scales)


def _finish(buffers: Any, grads: Grads, inputs: Inputs, constants: Any) -> list[Tensor]:
    grad_scores, grad_preds, scales = buffers
    torch.ops.gfl.gfl_loss_finish(grad_scores, grad_preds, *grads, scales, *_arguments(inputs, constants))
    return [*grad_scores, *grad_preds]


def _backward(grads: Grads, inputs: Inputs, constants: Any) -> list[Tensor]:
    grad_scores, grad_preds = torch.ops.gfl.gfl_loss_bwd(*grads, *_arguments(inputs, constants))
    return [*grad_scores, *grad_preds]


def _reference(inputs: Inputs, constants: Any) -> tuple[Tensor, ...]:
    return SPECS["gfl_loss"].reference(*_arguments(inputs, constants)[:-1])[:3]


_KERNELS = Kernels(_forward, _finish, _backward, _reference, differentiable=3)


def head_loss(
    cls_scores: list[Tensor],
    reg_preds: list[Tensor],
    strides: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    cls_norm: Tensor | None,
    box_norm: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """What the operator `gfl_loss` gives for the same arguments."""
    device, maps = cls_scores[0].device.type, [*cls_scores, *reg_preds]
    tensors = (labels, matched, gt_boxes, cls_norm, box_norm)
    needs = [wants_grad(cls_scores), wants_grad(reg_preds)]
    if any(needs) and device in _DEVICES and is_plain(maps) and backends.serving("gfl_loss", device) == "native":
        constants = (len(cls_scores), strides, options, needs)
        return GradInForward.apply(_KERNELS, constants, *maps, *tensors)
    return SPECS["gfl_loss"](device, cls_scores, reg_preds, strides, *tensors, *options)
