# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores that are summed over the classes: some against the code that they come from, and what holds
for each. Quality focal loss also has a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gfl_ops
from gfl_ops import matchability_aware_loss, quality_focal_loss, soft_target_bce

STEM = "mal"
Loss = Callable[..., Tensor]
ALL = pytest.mark.parametrize("loss", [matchability_aware_loss, soft_target_bce, quality_focal_loss])


@pytest.fixture
def drawn(generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some are background, scores above 0."""
    pred = torch.randn(33, 5, generator=generator, dtype=torch.float64) * 3
    label = torch.randint(0, 6, (33,), generator=generator)
    score = torch.rand(33, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    return pred.to(device), label.to(device), score.to(device)


def written_out(label: Tensor, score: Tensor, classes: int) -> Tensor:
    return F.one_hot(label, classes + 1)[:, :-1].to(score.dtype) * score[:, None]


def deim(pred: Tensor, label: Tensor, score: Tensor, gamma: float) -> Tensor:
    """As DEIM's criterion computes it, with the gradient to the score as well."""
    positive = written_out(label, torch.ones_like(score), pred.shape[1])
    target = written_out(label, score**gamma, pred.shape[1])
    weight = pred.sigmoid().detach() ** gamma * (1 - positive) + positive
    return F.binary_cross_entropy_with_logits(pred, target, weight=weight, reduction="none").sum(1)


def same_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    weight = torch.linspace(-1, 2, got.numel(), dtype=got.dtype, device=got.device)
    gradients = (torch.autograd.grad((value * weight).sum(), leaves, retain_graph=True) for value in (got, want))
    for g, w in zip(*gradients, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.5, 1.0, 2.2])
def test_matchability_aware_loss_is_deims(gamma: float, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    leaves = [pred.requires_grad_(), score.requires_grad_()]
    got = matchability_aware_loss(pred, (label, score), gamma, reduction="none")
    same_with_gradients(got, deim(pred, label, score, gamma), leaves)


def test_soft_target_bce_is_torchs(backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    leaves = [pred.requires_grad_(), score.requires_grad_()]
    got = soft_target_bce(pred, (label, score), reduction="none")
    target = written_out(label, score, 5)
    want = F.binary_cross_entropy_with_logits(pred, target, reduction="none").sum(1)
    same_with_gradients(got, want, leaves)
    same_with_gradients(got, quality_focal_loss(pred, (label, score), beta=0.0, reduction="none"), leaves)


@ALL
def test_labels_and_a_dense_target_say_the_same(loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    options: dict[str, Any] = {"weight": torch.rand_like(score), "avg_factor": 3.0}
    want = loss(pred, written_out(label, score, 5), **options)
    torch.testing.assert_close(loss(pred, (label, score), **options), want, rtol=1e-12, atol=1e-12)
    strange = torch.where(label == 5, -(2**62), label)
    torch.testing.assert_close(loss(pred, [strange, score], **options), want, rtol=1e-12, atol=0)
    probabilities = loss(pred.sigmoid(), (label, score), activated=True, **options)
    torch.testing.assert_close(probabilities, want, rtol=1e-9, atol=0)


@ALL
def test_nan_stays_in_its_row_and_infinity_costs_the_most(loss: Loss, backend: str, device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    pred = torch.tensor([[nan, 0.0], [-inf, -1e4], [inf, 0.0]], device=device, requires_grad=True)
    label = torch.tensor([2, 2, 0], device=device)
    value = loss(pred, (label, torch.ones(3, device=device)), reduction="none")
    value.sum().backward()
    assert value.isnan().tolist() == [True, False, False]
    assert value[1] == 0
    assert pred.grad is not None
    assert pred.grad[1].tolist() == [0, 0] and pred.grad[2, 0] == 0


def test_the_gradient_of_a_score_of_0(backend: str, device: torch.device) -> None:
    """A negative: it has the weight of one, and passes nothing on to the score."""
    pred, score = torch.zeros(1, 3, device=device), torch.zeros(1, device=device, requires_grad=True)
    positive, background = (torch.tensor([i], device=device) for i in (1, 3))
    value = matchability_aware_loss(pred, (positive, score))
    assert torch.equal(value, matchability_aware_loss(pred, (background, score)))
    assert torch.autograd.grad(value, score)[0].item() == 0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"gamma": -1}, ValueError, "`gamma` must be >= 0, got -1"),
        ({"pred": torch.zeros(4)}, ValueError, "`pred` must have shape"),
        ({"target": (torch.zeros(4), torch.zeros(4))}, TypeError, "`target[0]` must have one of the dtypes"),
        ({"weight": torch.zeros(4, 1)}, ValueError, "`weight` must have shape [N] = [4], got [4, 1]"),
        ({"reduction": "all"}, ValueError, "`reduction` must be one of"),
    ],
)
def test_errors_name_the_function_and_the_argument(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"pred": torch.zeros(4, 3), "target": (torch.zeros(4, dtype=torch.long), torch.zeros(4))} | change
    with pytest.raises(error) as raised:
        gfl_ops.matchability_aware_loss(**arguments)
    assert str(raised.value).startswith("gfl_ops.matchability_aware_loss: ") and text in str(raised.value)
