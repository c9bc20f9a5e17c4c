# SPDX-License-Identifier: Apache-2.0
"""Focal loss: what is special to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfl_ops import sigmoid_focal_loss

STEM = "focal"


def test_it_is_the_formula(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = (torch.randn(7, 3, generator=generator, dtype=torch.float64) * 3).to(device).requires_grad_()
    target = (torch.rand(7, 3, generator=generator) < 0.3).double().to(device)
    got = sigmoid_focal_loss(pred, target)
    p = pred.sigmoid()
    positive, negative = -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()
    want = torch.where(target == 1, positive, negative)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    weight = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(device)
    for g, w in zip(torch.autograd.grad((got * weight).sum(), pred), torch.autograd.grad((want * weight).sum(), pred)):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_any_alpha_is_taken(backend: str, device: torch.device, generator: torch.Generator) -> None:
    """Below 0 none, above 1 a negative weight of the negatives."""
    pred = torch.randn(7, 3, generator=generator).to(device)
    target = (torch.rand(7, 3, generator=generator) < 0.3).float().to(device)
    plain = sigmoid_focal_loss(pred, target, alpha=-1)
    torch.testing.assert_close(sigmoid_focal_loss(pred, target, alpha=-0.5), plain, rtol=0, atol=0)
    balance = torch.where(target == 1, 1.5, -0.5)
    torch.testing.assert_close(sigmoid_focal_loss(pred, target, alpha=1.5), plain * balance, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_the_loss_of_a_sure_logit_keeps_its_digits(
    backend: str, device: torch.device, generator: torch.Generator, dtype: torch.dtype, rtol: float
) -> None:
    logits = (torch.rand(400, generator=generator) * 60 - 30).to(device, dtype)
    right = (logits > 0).to(dtype)
    got = sigmoid_focal_loss(logits, right, alpha=-1, gamma=0)
    want = torch.log1p(torch.exp(-logits.double().abs())).to(dtype)
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_targets_of_every_type(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    pred = torch.tensor([0.5, -2.0, 3.0], dtype=torch.bfloat16, device=device)
    target = torch.tensor([1, 0, 1], device=device)
    got = sigmoid_focal_loss(pred, target.to(dtype))
    assert got.dtype == torch.float32
    assert torch.equal(got, sigmoid_focal_loss(pred, target.float()))


def test_any_shape_and_memory_format(backend: str, device: torch.device, generator: torch.Generator) -> None:
    pred = torch.randn(2, 3, 4, 5, generator=generator).to(device)
    target = torch.rand(2, 3, 4, 5, generator=generator).to(device)
    want = sigmoid_focal_loss(pred.reshape(-1), target.reshape(-1)).reshape(pred.shape)
    got = sigmoid_focal_loss(pred.to(memory_format=torch.channels_last), target)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sigmoid_focal_loss(pred[0, 0, 0, 0], target[0, 0, 0, 0]), want[0, 0, 0, 0])
    torch.testing.assert_close(sigmoid_focal_loss(pred[:, ::2], target[:, ::2], reduction="sum"), want[:, ::2].sum())
    torch.testing.assert_close(sigmoid_focal_loss(pred, target, reduction="mean"), want.mean())


def test_more_elements_than_one_pass_of_a_grid(backend: str, device: torch.device, generator: torch.Generator) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter would take minutes")
    pred = torch.randn(1024, generator=generator).to(device)
    target = (torch.rand(1024, generator=generator) < 0.5).float().to(device)
    want = sigmoid_focal_loss(pred, target)
    got = sigmoid_focal_loss(pred.repeat(16_500), target.repeat(16_500)).reshape(16_500, 1024)
    torch.testing.assert_close(got, want.expand(16_500, 1024), rtol=1e-6, atol=1e-7)


PRED = torch.zeros(7, 3)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("inputs integer", {"inputs": PRED.long()}, TypeError, "`inputs` must have one of the dtypes"),
    ("targets list", {"targets": [0.0]}, TypeError, "`targets` must be a tensor, got list"),
    ("targets narrow", {"targets": PRED[:, :2]}, ValueError, "`targets` must have the shape of `inputs`, [7, 3]"),
    ("alpha", {"alpha": "0.5"}, TypeError, "`alpha` must be a number, got str"),
    ("gamma", {"gamma": -1}, ValueError, "`gamma` must be >= 0, got -1"),
    ("reduction", {"reduction": "max"}, ValueError, "`reduction` must be one of 'none', 'mean', 'sum', got 'max'"),
    ("device", {"targets": PRED.to("meta")}, ValueError, "`targets` must be on the device of `inputs`, cpu, got meta"),
]


@pytest.mark.parametrize(("change", "error", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_said(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        sigmoid_focal_loss(**{"inputs": PRED, "targets": PRED, **change})
    assert str(raised.value).startswith("gfl_ops.sigmoid_focal_loss: ")
    assert text in str(raised.value)
