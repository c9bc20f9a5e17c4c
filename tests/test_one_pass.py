# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient in one walk on the CPU: the same bits as in two, whatever is done with them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl_ops import _extension, _one_pass, quality_focal_loss, set_backend

pytestmark = pytest.mark.skipif(
    not _extension.serves("qfl_fwd_and_grad", "cpu"), reason="the compiled extension is not there"
)
Inputs = tuple[Tensor, tuple[Tensor, Tensor], Tensor]


@pytest.fixture
def inputs(generator: torch.Generator) -> Inputs:
    """More rows than the least number, of 37 classes: registers are filled in part."""
    n = _one_pass.LEAST_ELEMENTS // 37 + 5
    pred = torch.randn(n, 37, generator=generator) * 3
    label = torch.randint(-2, 41, (n,), generator=generator)
    return pred, (label, torch.rand(n, generator=generator)), torch.rand(n, generator=generator)


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An entry for each gradient that was stored, and for each that was computed from the logits."""
    told: list[str] = []

    def watch(name: str, operator: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            told.append(name)
            return operator(*arguments)

        return call

    class Operators:
        qfl_fwd_and_grad = staticmethod(watch("stored", torch.ops.gfl.qfl_fwd_and_grad))
        qfl_bwd = staticmethod(watch("computed", torch.ops.gfl.qfl_bwd))

    class Torch:
        ops = type("Ops", (), {"gfl": Operators})

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(_one_pass, "torch", Torch())
    return told


def in_two_passes(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(_one_pass, "LEAST_ELEMENTS", 1 << 62)
        return call()


REDUCTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "mean-factor": {"avg_factor": 3.3},
    "mean-tensor": {"avg_factor": torch.tensor([7.7])},
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("dtype", _one_pass.DTYPES, ids=["fp32", "bf16"])
def test_it_has_the_bits_of_two_passes(
    inputs: Inputs,
    recomputed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    how: str,
    weighted: bool,
) -> None:
    pred, target, weight = inputs
    pred = pred.to(dtype).requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        loss = quality_focal_loss(pred, target, weight if weighted else None, **REDUCTIONS[how])
        return loss.detach(), torch.autograd.grad(loss, pred)[0]

    loss, gradient = call()
    assert recomputed == ["stored"]
    want_loss, want_gradient = in_two_passes(monkeypatch, call)
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradient, want_gradient)


def test_every_gradient_that_arrives_is_served(
    inputs: Inputs, recomputed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass, another factor, 0 after it, and a gradient that was overwritten in between."""
    pred, target, weight = inputs
    pred.requires_grad_()

    def call() -> list[Tensor]:
        loss = quality_focal_loss(pred, target, weight, avg_factor=2.0)
        found = []
        for factor in (1.0, 1.0, -3.5, 0.0, 1.0):
            gradient = torch.autograd.grad(loss, pred, torch.tensor(factor), retain_graph=True)[0]
            found.append(gradient.clone())
        return found

    found = call()
    assert recomputed == ["stored", "computed", "computed"]
    for got, want in zip(found, in_two_passes(monkeypatch, call)):
        assert torch.equal(got, want)


def test_a_gradient_that_was_overwritten_is_not_handed_out_again(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    loss = quality_focal_loss(pred, target)
    torch.autograd.grad(loss, pred, retain_graph=True)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulation_over_two_passes_adds_up(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    loss = quality_focal_loss(pred, target)
    loss.backward(retain_graph=True)
    first = pred.grad.clone()
    loss.backward()
    assert torch.equal(pred.grad, first + first)


def test_what_the_gradient_reaches_besides(inputs: Inputs, recomputed: list[str]) -> None:
    """The weight's gradient needs nothing; the score's goes the long way."""
    pred, (label, score), weight = inputs
    pred.requires_grad_()
    weight.requires_grad_()
    quality_focal_loss(pred, (label, score), weight).backward()
    assert weight.grad is not None and recomputed == ["stored"]
    score.requires_grad_()
    quality_focal_loss(pred, (label, score), weight).backward()
    assert score.grad is not None and recomputed == ["stored"]


def test_where_it_is_not_used(inputs: Inputs, recomputed: list[str]) -> None:
    pred, target, _ = inputs
    quality_focal_loss(pred, target)
    wanted = pred.clone().requires_grad_()
    quality_focal_loss(wanted, target, reduction="none")
    quality_focal_loss(wanted.half(), target)
    quality_focal_loss(wanted.double(), target)
    quality_focal_loss(wanted[:3], (target[0][:3], target[1][:3]))
    with set_backend("reference"):
        quality_focal_loss(wanted, target)
    with torch.no_grad():
        quality_focal_loss(wanted, target)
    torch.compile(quality_focal_loss, fullgraph=True, backend="aot_eager")(wanted, target).backward()
    assert recomputed == []


def test_a_second_derivative_is_refused(inputs: Inputs) -> None:
    pred, target, _ = inputs
    pred.requires_grad_()
    gradient = torch.autograd.grad(quality_focal_loss(pred, target), pred, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_the_operator_keeps_torchs_rules(generator: torch.Generator) -> None:
    pred = torch.randn(33, 20, generator=generator)
    label, score = torch.randint(0, 21, (33,), generator=generator), torch.rand(33, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for beta, activated in ((2.0, False), (1.5, False), (2.0, True)):
            x = (pred.sigmoid() if activated else pred).to(dtype)
            arguments = (x, label, score.to(acc), beta, activated, torch.ones(33, dtype=acc))
            torch.library.opcheck(torch.ops.gfl.qfl_fwd_and_grad, arguments)
            loss, gradient = torch.ops.gfl.qfl_fwd_and_grad(*arguments)
            assert torch.equal(loss, torch.ops.gfl.qfl_fwd(*arguments[:-1]))
            assert torch.equal(gradient, torch.ops.gfl.qfl_bwd(arguments[-1], *arguments[:-1], (True, False))[0])
