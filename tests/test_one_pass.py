# SPDX-License-Identifier: Apache-2.0
"""The head's losses with their gradients from one pass: the same bits as from two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_gradients import REG_MAX, STRIDES, Operators, head
from torch import Tensor

from gfl_ops.core import extension

if not extension.serves("gfl_loss_fwd_and_grad", "cpu"):
    pytest.skip("the compiled extension is not there", allow_module_level=True)


@pytest.mark.parametrize("options", [{}, {"cls_norm": 3.5, "box_norm": 0.7}], ids=["norms", "given"])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_pass_has_the_bits_of_two(
    dtype: torch.dtype, layout: str, options: dict[str, Any], device: torch.device, generator: torch.Generator
) -> None:
    memory_format = torch.channels_last if layout == "channels-last" else torch.contiguous_format
    case = head(generator, device, lambda m: m.to(dtype).contiguous(memory_format=memory_format), **options)
    with Operators() as seen:
        losses, ordinary = case.call(case.leaves), case.ordinary()
        found, want = ([*o, *case.gradient(o, (1.0, 1.0, 1.0))] for o in (losses, ordinary))
    assert seen.names == ["gfl_loss_fwd_and_grad", "gfl_loss_fwd", "gfl_loss_finish", "gfl_loss_bwd"]
    for g, w in zip(found, want, strict=True):
        assert torch.equal(g, w) and g.stride() == w.stride() and g.dtype == w.dtype


def test_recomputing_has_the_bits_of_two_passes(device: torch.device, generator: torch.Generator) -> None:
    case = head(generator, device)
    for factor in case.factors:
        found = case.gradient(case.call(case.leaves), factor)
        for g, w in zip(found, case.gradient(case.ordinary(), factor), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def test_maps_that_need_no_gradient(device: torch.device, generator: torch.Generator) -> None:
    case = head(generator, device)
    want = case.gradient(case.call(case.leaves), (1.0, 1.0, 1.0))
    half = len(want) // 2
    for frozen in (range(half), range(half, 2 * half), range(0, 2 * half, 2)):
        maps = [m.detach() if i in frozen else m for i, m in enumerate(case.leaves)]
        with Operators() as seen:
            losses = case.call(maps)
            got = iter(torch.autograd.grad(losses[0] + losses[1] + losses[2], [m for m in maps if m.requires_grad]))
        assert seen.names == ["gfl_loss_fwd_and_grad", "gfl_loss_finish"]
        for i, g in enumerate(want):
            assert i in frozen or torch.equal(next(got), g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_opcheck(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    case = head(generator, device, lambda m: m.to(dtype))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    maps, half = [m.detach() for m in case.leaves], len(case.leaves) // 2
    labels, matched, gt_boxes = case.tensors
    constants = (None, None, REG_MAX, [1.0, 2.0, 0.25], 2.0, [0.0] * 3, False)
    arguments = (maps[:half], maps[half:], STRIDES, labels, matched, gt_boxes.to(acc), *constants)
    operators, needs = torch.ops.gfl, (True, True)
    torch.library.opcheck(operators.gfl_loss_fwd_and_grad, (*arguments, needs))
    *losses, scales, grad_scores, grad_preds = operators.gfl_loss_fwd_and_grad(*arguments, needs)
    for got, want in zip(losses, operators.gfl_loss_fwd(*arguments), strict=True):
        assert torch.equal(got, want)
    one = torch.ones((), dtype=acc, device=device)
    copies: list[list[Tensor]] = [[m.clone() for m in part] for part in (grad_scores, grad_preds)]
    torch.library.opcheck(operators.gfl_loss_finish, (*copies, one, 2 * one, one, scales, *arguments, needs))
    wanted = operators.gfl_loss_bwd(one, one, one, *arguments, needs)
    for got, want in zip(grad_scores + grad_preds, wanted[0] + wanted[1], strict=True):
        assert torch.equal(got, want)
