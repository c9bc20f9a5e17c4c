# SPDX-License-Identifier: Apache-2.0
"""Varifocal loss: what is special to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfl_ops import varifocal_loss

STEM = "vfl"
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("iou_weighted", [True, False])
def test_it_is_the_formula(iou_weighted: bool, backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = (torch.randn(7, 3, generator=generator, dtype=torch.float64) * 3).to(device).requires_grad_()
    quality = torch.rand(7, 3, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    target = (quality * (torch.rand(7, 3, generator=generator) < 0.3)).to(device).requires_grad_()
    got = varifocal_loss(pred, target, iou_weighted=iou_weighted, reduction="none")
    p = pred.sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log())
    want = torch.where(target > 0, target if iou_weighted else 1.0, 0.75 * (p - target) ** 2) * bce
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(device)
    inputs = (pred, target)
    for g, w in zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)
    ):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_extreme_logits(backend: str, device: torch.device) -> None:
    pred = torch.tensor([1e4, -1e4, 1e4, -1e4, INF, -INF, INF, -INF], device=device, requires_grad=True)
    target = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0.0], device=device)
    loss = varifocal_loss(pred, target, alpha=0.5, reduction="none")
    loss.sum().backward()
    largest = torch.finfo(torch.float32).max
    # A probability that is 0 in all but name may leave a last subnormal.
    assert loss.tolist() == pytest.approx([5e3, 1e4, 0, 0, largest / 2, largest, 0, 0], rel=0, abs=1e-37)
    assert pred.grad is not None
    assert pred.grad.tolist() == [0.5, -1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_small_gamma_has_finite_gradients(gamma: float, backend: str, device: torch.device) -> None:
    pred = torch.tensor([-90.0, -103, -1e4, 90, 1e4], device=device, requires_grad=True)
    loss = varifocal_loss(pred, torch.zeros_like(pred), gamma=gamma, reduction="sum")
    (grad,) = torch.autograd.grad(loss, pred)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_nan_stays_in_its_element(backend: str, device: torch.device) -> None:
    pred = torch.tensor([[0.0, NAN], [1.0, 2.0]], device=device, requires_grad=True)
    loss = varifocal_loss(pred, torch.tensor([[0.0, 0], [NAN, 1]], device=device), reduction="none")
    loss.sum().backward()
    assert pred.grad is not None
    for value in (loss, pred.grad):
        assert torch.isnan(value).tolist() == [[False, True], [True, False]]


def test_probabilities(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(device)
    target = (torch.rand(7, 3, generator=generator, dtype=torch.float64) - 0.6).clamp(min=0).to(device)
    want = varifocal_loss(pred, target, reduction="none")
    torch.testing.assert_close(varifocal_loss(pred.sigmoid(), target, reduction="none", activated=True), want)
    assert torch.isnan(varifocal_loss(pred + 10, target, reduction="none", activated=True)).all()


def test_weights(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(5, 3, generator=generator).to(device)
    target = torch.rand(5, 3, generator=generator).to(device)
    elements = varifocal_loss(pred, target, reduction="none")
    weight = torch.rand(5, 3, generator=generator).to(device)
    torch.testing.assert_close(varifocal_loss(pred, target, weight), (elements * weight).mean())
    rows = weight[:, 0]
    for form in (rows, rows[:, None]):
        got = varifocal_loss(pred, target, form, reduction="none")
        torch.testing.assert_close(got, elements * rows[:, None])
    square = varifocal_loss(pred[:3], target[:3], rows[:3], reduction="none")
    torch.testing.assert_close(square, elements[:3] * rows[:3, None])


def test_reductions(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(5, 3, generator=generator).to(device)
    target = torch.rand(5, 3, generator=generator).to(device)
    elements = varifocal_loss(pred, target, reduction="none")
    torch.testing.assert_close(varifocal_loss(pred, target), elements.sum() / 15)
    torch.testing.assert_close(varifocal_loss(pred, target, reduction="sum"), elements.sum())
    factor = torch.tensor(2.0, device=device)
    torch.testing.assert_close(varifocal_loss(pred, target, avg_factor=factor), elements.sum() / 2)
    assert torch.equal(varifocal_loss(pred, target, reduction="none", avg_factor=2), elements)
    with pytest.raises(ValueError, match=r'^avg_factor can not be used with reduction="sum"$'):
        varifocal_loss(pred, target, reduction="sum", avg_factor=2)


def test_empty_input(backend: str, device: torch.device) -> None:
    pred = torch.zeros(0, 3, device=device, requires_grad=True)
    target = pred.detach()
    assert varifocal_loss(pred, target, reduction="none").shape == (0, 3)
    assert torch.isnan(varifocal_loss(pred, target))
    for loss in (varifocal_loss(pred, target, reduction="sum"), varifocal_loss(pred, target, avg_factor=0.0)):
        assert loss == 0 and loss.requires_grad


def test_mixed_dtypes_and_autocast(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(5, 3, generator=generator).to(device)
    target = (torch.rand(5, 3, generator=generator) > 0.5).to(device)
    want = varifocal_loss(pred, target.float())
    for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64):
        assert torch.equal(varifocal_loss(pred, target.to(dtype)), want)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(varifocal_loss(pred, target.bfloat16()), want)
    assert varifocal_loss(pred.half(), target).dtype == torch.float32


PRED = torch.zeros(7, 3)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("pred integer", {"pred": PRED.long()}, TypeError, "`pred` must have one of the dtypes"),
    ("target labels", {"target": torch.zeros(7)}, ValueError, "`target` must have the shape of `pred`, [7, 3]"),
    ("weight", {"weight": torch.ones(3)}, ValueError, "`weight` must have shape [N] = [7] or pred's, [7, 3], got [3]"),
    ("weight list", {"weight": [1.0]}, TypeError, "`weight` must be a tensor, got list"),
    ("alpha", {"alpha": -1}, ValueError, "`alpha` must be >= 0, got -1"),
    ("gamma", {"gamma": -1}, ValueError, "`gamma` must be >= 0, got -1"),
    ("reduction", {"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ("device", {"target": PRED.to("meta")}, ValueError, "`target` must be on the device of `pred`, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_said(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        varifocal_loss(**{"pred": PRED, "target": PRED, **change})
    assert str(raised.value).startswith("gfl_ops.varifocal_loss: ")
    assert text in str(raised.value)
