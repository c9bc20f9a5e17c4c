# SPDX-License-Identifier: Apache-2.0
"""What is special to distillation: the formula, equal distributions, the constant teacher, wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gfl_ops


def test_the_formula(generator: torch.Generator) -> None:
    """T²/n Σ q log(q/p), row by row; its gradient T/n (p − q)."""
    x = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    z = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    for t in (10.0, 1.0, 0.5):
        p, q = (x.detach() / t).softmax(1), (z / t).softmax(1)
        loss = gfl_ops.distillation_loss(x, z, temperature=t, reduction="none")
        torch.testing.assert_close(loss.detach(), t * t / 9 * (q * (q / p).log()).sum(1), rtol=1e-9, atol=1e-12)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad, t / 9 * (p - q), rtol=1e-9, atol=1e-12)


def test_equal_distributions_cost_nothing(generator: torch.Generator) -> None:
    x = torch.randn(5, 17, generator=generator, requires_grad=True)
    loss = gfl_ops.distillation_loss(x, x.detach() + 3.0)
    assert abs(float(loss.detach())) < 1e-5
    assert float(torch.autograd.grad(loss, x)[0].abs().max()) < 1e-6


def test_the_teacher_is_constant(generator: torch.Generator) -> None:
    x, z = (torch.randn(5, 17, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.rand(5, generator=generator, requires_grad=True)
    loss = gfl_ops.distillation_loss(x, z, weight, avg_factor=torch.tensor(2.0))
    grads = torch.autograd.grad(loss, [x, z, weight], allow_unused=True)
    assert grads[1] is None and grads[0] is not None and grads[2] is not None


def test_no_rows_stay_attached() -> None:
    x = torch.zeros(0, 17, requires_grad=True)
    for call in ({"reduction": "sum"}, {"avg_factor": 1.0}):
        loss = gfl_ops.distillation_loss(x, x.detach(), **call)
        loss.backward()
        assert loss == 0
    assert gfl_ops.distillation_loss(x, x.detach()).isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.zeros(3)}, ValueError, r"`pred` must have shape \[M, n\] with n >= 1, got \[3\]"),
        ({"teacher": torch.zeros(3, 4)}, ValueError, r"`teacher` must have shape \[M, n\] = \[3, 5\], got \[3, 4\]"),
        ({"teacher": torch.zeros(3, 5).long()}, TypeError, "`teacher` must have one of the dtypes"),
        ({"weight": torch.zeros(3, 1)}, ValueError, r"`weight` must have shape \[M\] = \[3\], got \[3, 1\]"),
        ({"temperature": 0}, ValueError, "`temperature` must be > 0, got 0"),
        ({"reduction": "all"}, ValueError, "`reduction` must be one of"),
        ({"reduction": "sum", "avg_factor": 2}, ValueError, "avg_factor can not be used"),
    ],
)
def test_wrong_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gfl_ops.distillation_loss(**{"pred": torch.zeros(3, 5), "teacher": torch.zeros(3, 5), **change})
