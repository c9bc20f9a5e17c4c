# SPDX-License-Identifier: Apache-2.0
"""The softmax that forward keeps for backward: the same bits as computing it twice, whatever is done with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stored_gradients import Operators, Subclass
from torch import Tensor

import gfl_ops
from gfl_ops.core import extension
from gfl_ops.core.reduction import reduce_loss

if not extension.serves("dfl_keep", "cpu"):
    pytest.skip("the compiled extension is not there", allow_module_level=True)


def logits(layout: str, rows: int, bins: int, generator: torch.Generator) -> Tensor:
    """With a row that has a NaN, and some with logits beyond what counts."""
    if layout == "dense":
        pred = torch.randn(rows, bins, generator=generator) * 3
    elif layout == "sliced":
        pred = torch.randn(rows, bins + 9, generator=generator)[:, 4 : 4 + bins] * 3
    else:
        pred = (torch.randn(bins, rows, generator=generator) * 3).t()
    for row, values in ((5, [float("inf")]), (18, [-float("inf"), 1e38]), (40, [float("nan"), float("inf")])):
        for j, value in enumerate(values if row < rows else []):
            pred[row, j] = value
    return pred


def targets(rows: int, bins: int, generator: torch.Generator) -> Tensor:
    target = torch.rand(rows, generator=generator) * (bins + 3) - 2
    target[3::7] = float("nan")
    return target


@pytest.mark.parametrize("layout", ["dense", "sliced", "planar"])
@pytest.mark.parametrize(("rows", "bins"), [(0, 17), (1, 2), (15, 17), (16, 3), (53, 17), (2005, 17), (300, 129)])
@pytest.mark.parametrize("out_of_range", ["clamp", "ignore"])
@pytest.mark.parametrize("with_distance", [False, True])
def test_kept_or_computed_twice_is_the_same(
    layout: str, rows: int, bins: int, out_of_range: str, with_distance: bool,
    generator: torch.Generator,
) -> None:  # fmt: skip
    leaf = logits(layout, rows, bins, generator).requires_grad_()
    target, mixed = targets(rows, bins, generator), torch.randn(2, rows, generator=generator)

    def results(pred: Tensor) -> list[Tensor]:
        function = gfl_ops.dfl_integral if with_distance else gfl_ops.distribution_focal_loss
        outputs = function(pred, target, reduction="none", out_of_range=out_of_range)
        outputs = tuple(o.as_subclass(Tensor) for o in (outputs if with_distance else (outputs,)))
        gradients = [
            torch.autograd.grad(outputs, leaf, mixed[: len(outputs)].unbind(), retain_graph=True)[0] for _ in range(2)
        ]
        return [*(o.detach() for o in outputs), *gradients]

    with Operators() as seen:
        got = results(leaf)
    assert seen.names == ["dfl_keep", "dfl_finish"] * 2
    assert got[-1].data_ptr() != got[-2].data_ptr() or rows == 0
    for ours, theirs in zip(got, results(leaf.as_subclass(Subclass)), strict=True):  # type: ignore[arg-type]
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def test_threads_change_no_bit(generator: torch.Generator) -> None:
    leaf = logits("dense", 5003, 17, generator).requires_grad_()
    target = targets(5003, 17, generator)
    mixed = torch.randn(2, 5003, generator=generator).unbind()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            outputs = gfl_ops.dfl_integral(leaf, target, reduction="none")
            found.append([*outputs, *torch.autograd.grad(outputs, leaf, mixed)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_opcheck(generator: torch.Generator) -> None:
    pred, target = torch.randn(35, 17, generator=generator), torch.rand(35, generator=generator) * 16
    grad = torch.randn(35, generator=generator)
    rows, one = (None, None, 1.0, False), (grad.abs(), torch.tensor(3.0), 0.5, True)
    for with_distance in (False, True):
        for by, of_loss in ((rows, grad), (one, grad[0])):
            torch.library.opcheck(torch.ops.gfl.dfl_keep, (pred, target, False, with_distance, *by))
            kept, sums = torch.ops.gfl.dfl_keep(pred, target, False, with_distance, *by)[2:]
            of_distance = grad if with_distance else None
            given = (kept, sums, of_loss, of_distance, pred, target, False, *by)
            torch.library.opcheck(torch.ops.gfl.dfl_finish, given)


def test_what_does_not_fit_is_refused(generator: torch.Generator) -> None:
    pred, target = torch.randn(8, 17, generator=generator), torch.rand(8, generator=generator)
    rows, keep, finish = (None, None, 1.0, False), torch.ops.gfl.dfl_keep, torch.ops.gfl.dfl_finish
    kept, sums = keep(pred, target, False, False, *rows)[2:]
    with pytest.raises(TypeError, match="`pred` must be"):
        keep(pred.half(), target, False, False, *rows)
    with pytest.raises(ValueError, match="`weight` must have shape"):
        keep(pred, target, False, False, target[:5], None, 1.0, True)
    with pytest.raises(ValueError, match="`sums` must have shape"):
        finish(kept, sums[:1], target, None, pred, target, False, *rows)
    with pytest.raises(ValueError, match="`grad_loss` must have shape"):
        finish(kept, sums, target, None, pred, target, False, None, None, 1.0, True)
    with pytest.raises(ValueError, match="`kept` must be contiguous"):
        finish(kept.t().contiguous().t(), sums, target, None, pred, target, False, *rows)


@pytest.mark.parametrize(
    ("reduction", "avg_factor"), [("sum", None), ("mean", None), ("mean", 7.5), ("mean", "tensor")]
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 37, 2011])
def test_one_number_is_the_reduced_rows(
    reduction: str, avg_factor: Any, weighted: bool, rows: int, generator: torch.Generator
) -> None:
    """Loss, gradient, a second gradient and the gradient of a graph, against the single losses reduced by torch."""
    leaf = (torch.randn(rows, 17, generator=generator) * 2).requires_grad_()
    target, mixed = torch.rand(rows, generator=generator) * 16, torch.randn(rows, generator=generator)
    weight = torch.rand(rows, generator=generator) if weighted else None
    factor = torch.tensor(rows * 0.7) if avg_factor == "tensor" else avg_factor
    loss, distance = gfl_ops.dfl_integral(leaf, target, weight, reduction, factor)
    single, want_distance = gfl_ops.dfl_integral(leaf, target, reduction="none")
    want = reduce_loss(single, weight, reduction, factor)
    # Sums of fp32 in another order: sqrt(2011) roundings of terms of one sign stay below 16 ulp.
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    assert torch.equal(distance, want_distance)
    (want_gradient,) = torch.autograd.grad(2.5 * want + (want_distance * mixed).sum(), leaf)
    total = 2.5 * loss + (distance * mixed).sum()
    found = [
        torch.autograd.grad(total, leaf, retain_graph=True, create_graph=graph)[0] for graph in (False, False, True)
    ]
    assert torch.equal(found[0], found[1])
    for gradient in found:
        # A row's factor is rounded two or three times more, and a gradient is a difference of terms up to its size.
        scale = float(want_gradient.abs().max())
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-6, atol=1e-6 * scale)


def test_a_weight_that_wants_a_gradient_gets_it(generator: torch.Generator) -> None:
    leaf = torch.randn(33, 17, generator=generator, requires_grad=True)
    target, weight = torch.rand(33, generator=generator) * 16, torch.rand(33, generator=generator, requires_grad=True)
    loss = gfl_ops.distribution_focal_loss(leaf, target, weight, "sum")
    (got,) = torch.autograd.grad(loss, weight)
    assert torch.equal(got, gfl_ops.distribution_focal_loss(leaf, target, reduction="none"))
