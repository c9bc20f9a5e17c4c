# SPDX-License-Identifier: Apache-2.0
"""What is special to distillation: the formula, equal distributions, the constant teacher, any length of row, infinite
logits, dtypes that differ, wrong input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gfl_ops
from gfl_ops.core import backends

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = [b for b in ("native", "triton", "reference") if backends.unavailable(b, "ld", "cpu") is None]


def by_definition(pred: torch.Tensor, teacher: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """T²/n Σ q log(q/p) and T/n (p − q), in fp64."""
    p, q = (x.detach().double().div(t).log_softmax(1) for x in (pred, teacher))
    n = pred.shape[1]
    return t * t / n * (q.exp() * (q - p)).sum(1), t / n * (p.exp() - q.exp())


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


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("bins", [17, 80, 1203])
def test_kernels_take_equal_logits_for_equal_to_the_last_bit(
    backend: str, bins: int, generator: torch.Generator
) -> None:
    x = (torch.randn(19, bins, generator=generator) * 1e3).requires_grad_()
    with gfl_ops.set_backend(backend):
        loss = gfl_ops.distillation_loss(x, x.detach().clone(), temperature=0.5, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == 0 and torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    bins=st.one_of(st.integers(1, 130), st.sampled_from([1203, 2047, 2049, 4500])),
    temperature=st.sampled_from([0.5, 1.0, 2.5, 10.0]),
    layout=st.sampled_from(["dense", "padded", "transposed"]),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    draw=st.integers(0, 2**31),
)
def test_any_length_of_row_in_any_layout(
    backend: str, rows: int, bins: int, temperature: float, layout: str, scale: float, draw: int
) -> None:
    generator = torch.Generator().manual_seed(draw)
    if layout == "transposed":
        x, z = (torch.randn(bins, rows, generator=generator).mul(scale).t() for _ in range(2))
    else:
        room = 7 if layout == "padded" else 0
        x, z = (torch.randn(rows, bins + room, generator=generator).mul(scale)[:, room // 2 :][:, :bins] for _ in "xz")
    want, slope = by_definition(x, z, temperature)
    x.requires_grad_()
    arriving = torch.randn(rows, generator=generator)
    with gfl_ops.set_backend(backend):
        loss = gfl_ops.distillation_loss(x, z, temperature=temperature, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, arriving)
    # 64 roundings of the terms that cancel: log-probabilities of up to log n plus the logits' range over T, times T²/n.
    size = temperature**2 / bins * (9 + 10 * scale / temperature)
    torch.testing.assert_close(loss.detach().double(), want, rtol=8e-6, atol=8e-6 * max(size, 1e-3))
    # A probability errs by as many roundings as its logarithm is large.
    roundings = 8e-6 * (1 + scale / temperature)
    torch.testing.assert_close(
        grad.double(), arriving[:, None].double() * slope, rtol=roundings, atol=roundings * 4 * temperature / bins
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("bins", [2, 90])
def test_infinite_logits(backend: str, temperature: float, bins: int) -> None:
    """A certain teacher, a certain student, classes that both rule out: no NaN, and no gradient at the infinities."""
    inf = float("inf")
    rest = torch.full((4, bins - 2), -inf)
    x = torch.cat([torch.tensor([[1.0, 3.0], [inf, 0.0], [-inf, 0.0], [1e4, -1e4]]), rest], 1).requires_grad_()
    z = torch.cat([torch.tensor([[inf, 0.0], [0.0, -inf], [-inf, 0.0], [1e4, -1e4]]), rest], 1)
    with gfl_ops.set_backend(backend):
        loss = gfl_ops.distillation_loss(x, z, temperature=temperature, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), x)
    t, n = temperature, bins
    second = torch.tensor([1.0, 3.0]).div(t).softmax(0)[1]
    torch.testing.assert_close(loss.detach(), t * t / n * torch.stack([-(1 - second).log(), *[second * 0] * 3]))
    want = torch.zeros(4, bins)
    want[0, :2] = t / n * torch.stack([-second, second])
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("of_student", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_teacher", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_teacher_of_another_dtype(
    of_student: torch.dtype, of_teacher: torch.dtype, generator: torch.Generator
) -> None:
    """Nothing of what it says is rounded away: a 16-bit student takes all of an fp32 teacher."""
    x = torch.randn(9, 17, generator=generator).to(of_student).requires_grad_()
    z = torch.randn(9, 17, generator=generator).to(of_teacher)
    loss = gfl_ops.distillation_loss(x, z, temperature=2.0, reduction="none")
    acc = torch.float64 if of_student == torch.float64 else torch.float32
    assert loss.dtype == acc
    want, slope = by_definition(x, z.to(acc), 2.0)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.dtype == of_student
    # The gradient is rounded once to the student's dtype, subnormal halves to multiples of 6e-8.
    torch.testing.assert_close(grad.double(), slope, rtol=max(torch.finfo(of_student).eps, 1e-5), atol=2e-6)


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
