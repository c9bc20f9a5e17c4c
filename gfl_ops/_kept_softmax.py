# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss on the CPU in fp32, whose backward pass needs no second softmax.

The forward pass keeps the exponentials of all bins, which is as much memory as the gradient needs anyway: the first
backward pass takes that tensor out of the graph and turns it into the gradient where it lies. Nobody has seen it
before, so nothing that was handed out is overwritten. A later backward pass of a retained graph finds it gone and
computes from the logits. Both ways give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _backend, _extension
from ._spec import define

_INPUT = "Tensor pred, Tensor target, bool ignore_out_of_range"


def _fake_keep(pred: Tensor, target: Tensor, ignore: bool, distance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = pred.shape[0]
    return (
        pred.new_empty(rows), pred.new_empty(rows if distance else 0), pred.new_empty(pred.shape),
        pred.new_empty((2, rows)),
    )  # fmt: skip


def _fake_settle(*arguments: Any) -> None:
    return None


_SERVED = _extension.serves("dfl_keep", "cpu")
if _SERVED:
    define("dfl_keep", f"({_INPUT}, bool distance) -> (Tensor, Tensor, Tensor kept, Tensor sums)", _fake_keep)
    settle = f"(Tensor(a!) kept, Tensor sums, Tensor grad_loss, Tensor? grad_distance, {_INPUT}) -> ()"
    define("dfl_settle", settle, _fake_settle)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, ignore: bool, with_distance: bool) -> Any:
        loss, distance, kept, sums = torch.ops.gfl.dfl_keep(pred, target, ignore, with_distance)
        ctx.save_for_backward(pred, target, sums)
        # Not among the saved tensors, which a retained graph would hold on to after it has been handed out.
        ctx.kept, ctx.ignore = kept, ignore
        return (loss, distance) if with_distance else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, sums = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        # A graph of the gradient is the operator's to refuse.
        if kept is None or torch.is_grad_enabled():
            operators = (torch.ops.gfl.dfl_bwd, torch.ops.gfl.dfl_integral_bwd)
            kept = operators[len(grads) - 1](*grads, pred, target, ctx.ignore, [True, False])[0]
        else:
            of_distance = grads[1] if len(grads) > 1 else None
            torch.ops.gfl.dfl_settle(kept, sums, grads[0], of_distance, pred, target, ctx.ignore)
        return kept, None, None, None


def dfl(stem: str, pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> Any:
    """What the operator `stem`, "dfl" or "dfl_integral", gives; None where it has to be called itself."""
    if not (pred.requires_grad and pred.dtype == torch.float32 and pred.is_cpu and _SERVED):
        return None
    # A graph that is being compiled can't own a tensor, and transforms of functions have no rule for it.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    # The gradient reaches the logits alone; a subclass may stand for no numbers at all.
    if type(pred) not in (Tensor, nn.Parameter) or type(target) is not Tensor or target.requires_grad:
        return None
    if _backend.serving(stem, "cpu") != "native":
        return None
    return _Kept.apply(pred, target, ignore_out_of_range, stem == "dfl_integral")
