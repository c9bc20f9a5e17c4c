# SPDX-License-Identifier: Apache-2.0
"""Loss and distance from one softmax are the two functions' own."""

from __future__ import annotations

import pytest
import torch

import gfl_ops


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
