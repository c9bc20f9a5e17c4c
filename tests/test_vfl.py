# SPDX-License-Identifier: Apache-2.0
"""Varifocal loss: what is special to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfl_ops import varifocal_loss

STEM = "vfl"


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
