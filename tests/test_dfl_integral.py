# SPDX-License-Identifier: Apache-2.0
"""Loss and distance from one softmax are the two functions' own."""

from __future__ import annotations

import pytest
import torch

import gfl_ops

pytestmark = pytest.mark.usefixtures("everywhere")


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("out_of_range", ["clamp", "ignore"])
def test_it_is_both_functions(backend: str, out_of_range: str, generator: torch.Generator) -> None:
    pred = torch.randn(36, 17, generator=generator, dtype=torch.float64) * 3
    target = torch.rand(36, generator=generator, dtype=torch.float64) * 24 - 4
    target[5] = float("nan")
    weight = torch.rand(36, generator=generator, dtype=torch.float64)
    leaves = [pred.clone().requires_grad_(), target.clone().requires_grad_()]
    others = [pred.clone().requires_grad_(), target.clone().requires_grad_()]
    mixed = torch.randn(36, generator=generator, dtype=torch.float64)
    with gfl_ops.set_backend(backend):
        loss, distance = gfl_ops.dfl_integral(*leaves, weight, avg_factor=9.0, out_of_range=out_of_range)
        want_loss = gfl_ops.distribution_focal_loss(*others, weight, avg_factor=9.0, out_of_range=out_of_range)
        want_distance = gfl_ops.integral(others[0].reshape(9, 68), 16).reshape(36)
        torch.testing.assert_close(loss, want_loss)
        torch.testing.assert_close(distance, want_distance)
        (loss + (distance * mixed).sum()).backward()
        (want_loss + (want_distance * mixed).sum()).backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_either_result_may_be_left_out(generator: torch.Generator) -> None:
    pred = torch.randn(8, 17, generator=generator, requires_grad=True)
    target = torch.rand(8, generator=generator) * 16
    loss, distance = gfl_ops.dfl_integral(pred, target)
    (alone,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (want,) = torch.autograd.grad(gfl_ops.distribution_focal_loss(pred, target), pred)
    torch.testing.assert_close(alone, want)
    (alone,) = torch.autograd.grad(distance.sum(), pred)
    (want,) = torch.autograd.grad(gfl_ops.integral(pred.reshape(2, 68), 16).sum(), pred)
    torch.testing.assert_close(alone, want)


@pytest.mark.parametrize("value", [-31.0, 88.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("layout", ["dense", "planar"])
def test_a_row_does_not_feel_its_neighbours(value: float, layout: str, generator: torch.Generator) -> None:
    """Kernels that take rows together go another way where one has large logits; the others keep their bits."""
    calm = torch.randn(37, 17, generator=generator) * 3
    target, mixed = torch.rand(37, generator=generator) * 16, torch.randn(2, 37, generator=generator).unbind()
    wild = calm.clone()
    disturbed = torch.randperm(37, generator=generator)[:6]
    wild[disturbed, torch.randint(17, (6,), generator=generator)] = value
    kept = torch.ones(37, dtype=torch.bool)
    kept[disturbed] = False

    def results(pred: torch.Tensor) -> list[torch.Tensor]:
        leaf = (pred if layout == "dense" else pred.t().contiguous().t()).requires_grad_()
        outputs = gfl_ops.dfl_integral(leaf, target, reduction="none")
        return [x.detach()[kept] for x in (*outputs, *torch.autograd.grad(outputs, leaf, mixed))]

    for got, want in zip(results(wild), results(calm), strict=True):
        assert torch.equal(got, want)
