# SPDX-License-Identifier: Apache-2.0
"""What holds for every loss of class scores, and some of them against the code that they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gfl_ops
from gfl_ops import (
    matchability_aware_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    soft_target_bce,
    varifocal_loss,
)

STEM = "mal"
Loss = Callable[..., Tensor]
ROWS = (matchability_aware_loss, soft_target_bce, quality_focal_loss)  # summed over the classes; labels too
ELEMENTS = (sigmoid_focal_loss, varifocal_loss)
EACH = pytest.mark.parametrize("loss", [*ROWS, *ELEMENTS])
EACH_OF_ROWS = pytest.mark.parametrize("loss", ROWS)
EACH_OF_ELEMENTS = pytest.mark.parametrize("loss", ELEMENTS)
# torchvision's signature has neither weights nor an average factor nor probabilities.
EACH_BUT_FOCAL = pytest.mark.parametrize("loss", [*ROWS, varifocal_loss])


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


@EACH_OF_ROWS
def test_labels_and_a_dense_target_say_the_same(loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    options: dict[str, Any] = {"weight": torch.rand_like(score), "avg_factor": 3.0}
    want = loss(pred, written_out(label, score, 5), **options)
    torch.testing.assert_close(loss(pred, (label, score), **options), want, rtol=1e-12, atol=1e-12)
    strange = torch.where(label == 5, -(2**62), label)
    torch.testing.assert_close(loss(pred, [strange, score], **options), want, rtol=1e-12, atol=0)
    probabilities = loss(pred.sigmoid(), (label, score), activated=True, **options)
    torch.testing.assert_close(probabilities, want, rtol=1e-9, atol=0)


@EACH_OF_ROWS
def test_a_label_outside_the_classes_is_background(
    loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]
) -> None:
    pred, _, score = (t[:7] for t in drawn)
    background = loss(pred, (torch.full_like(score, 5, dtype=torch.long), score), reduction="none")
    strange = torch.tensor([-1, -2, 6, 255, 2**40, -(2**62), 5], device=pred.device)
    assert torch.equal(loss(pred, (strange, score), reduction="none"), background)


@EACH
def test_nan_stays_in_its_element(loss: Loss, backend: str, device: torch.device) -> None:
    """Of the logits as of the target; in its row, where losses are summed."""
    nan = float("nan")
    pred = torch.tensor([[0.0, nan], [1.0, 2.0], [3.0, 4.0]], device=device, requires_grad=True)
    targets: list[Any] = [torch.tensor([[0.0, 0], [nan, 1], [1, 0]], device=device)]
    if loss in ROWS:
        label = torch.tensor([2, 0, 1], device=device)
        targets.append((label, torch.tensor([0.5, nan, 0.5], device=device)))
    wanted = torch.tensor([[False, True], [True, False], [False, False]])
    for target in targets:
        value = loss(pred, target, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), pred)
        assert grad.isnan().tolist() == wanted.tolist()
        assert value.isnan().tolist() == (wanted.any(1) if loss in ROWS else wanted).tolist()


@EACH
def test_empty_input(loss: Loss, backend: str, device: torch.device) -> None:
    pred = torch.zeros(0, 80, device=device, requires_grad=True)
    targets: list[Any] = [pred.detach()]
    if loss in ROWS:
        targets.append((torch.zeros(0, dtype=torch.long, device=device), torch.zeros(0, device=device)))
    reductions: list[dict[str, Any]] = [{"reduction": "sum"}]
    if loss is not sigmoid_focal_loss:
        reductions += [{"avg_factor": 1.0}, {"avg_factor": 0.0}]
    for target in targets:
        assert loss(pred, target, reduction="none").shape == ((0,) if loss in ROWS else (0, 80))
        assert loss(pred, target, reduction="mean").isnan()
        for options in reductions:
            value = loss(pred, target, **options)
            assert value == 0 and value.requires_grad
            assert torch.autograd.grad(value, pred)[0].shape == (0, 80)


@EACH
@pytest.mark.parametrize("activated", [False, True])
def test_autocast_changes_nothing(
    loss: Loss, activated: bool, backend: str, drawn: tuple[Tensor, Tensor, Tensor]
) -> None:
    pred, label, score = drawn
    options = {"activated": True} if activated else {}
    if activated and loss is sigmoid_focal_loss:
        pytest.skip("sigmoid_focal_loss takes logits alone")
    pred = (pred.sigmoid() if activated else pred).bfloat16()
    dense = written_out(label, score.float(), 5)
    for target in [dense, dense.bfloat16(), *([(label, score.float())] if loss in ROWS else [])]:
        for reduction in ("none", "mean"):
            want = loss(pred, target, reduction=reduction, **options)
            with torch.autocast(pred.device.type, dtype=torch.bfloat16):
                got = loss(pred, target, reduction=reduction, **options)
            assert got.dtype == torch.float32
            assert torch.equal(got, want)


@EACH_BUT_FOCAL
def test_probabilities(loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    dense = written_out(label, score, 5)
    want = loss(pred, dense, reduction="none")
    torch.testing.assert_close(
        loss(pred.sigmoid(), dense, reduction="none", activated=True), want, rtol=1e-9, atol=1e-9
    )
    assert loss(pred.abs() + 1.0001, dense, reduction="none", activated=True).isnan().all()


@EACH_BUT_FOCAL
def test_reductions(loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    eps = torch.finfo(torch.float32).eps
    dense = written_out(label, score, 5)
    for target in [dense, *([(label, score)] if loss in ROWS else [])]:
        single = loss(pred, target, reduction="none")
        torch.testing.assert_close(loss(pred, target), single.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss(pred, target, reduction="sum"), single.sum(), rtol=1e-12, atol=0)
        for factor in (7, 7.0, torch.tensor(7.0), torch.tensor([7]), torch.tensor([[7.0]], dtype=torch.float16)):
            given = factor.to(pred.device) if isinstance(factor, Tensor) else factor
            got = loss(pred, target, avg_factor=given)
            assert got.shape == ()
            torch.testing.assert_close(got, single.sum() / (7 + eps), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss(pred, target, avg_factor=0.0), single.sum() / eps)
        assert torch.equal(loss(pred, target, reduction="none", avg_factor=7.0), single)
        with pytest.raises(ValueError, match=r'^avg_factor can not be used with reduction="sum"$'):
            loss(pred, target, reduction="sum", avg_factor=7.0)


@EACH_BUT_FOCAL
def test_weights_of_rows(loss: Loss, backend: str, drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, label, score = drawn
    weight = score.flip(0).clone().requires_grad_()
    chosen = label != 4
    dense = written_out(label, score, 5)
    for target in [dense, *([(label, score)] if loss in ROWS else [])]:
        rows = loss(pred, target, reduction="none").reshape(33, -1)
        got = loss(pred, target, weight=weight)
        torch.testing.assert_close(got, (rows * weight[:, None]).mean())
        torch.testing.assert_close(torch.autograd.grad(got, weight)[0], rows.sum(1) / rows.numel())
        torch.testing.assert_close(loss(pred, target, weight=chosen, reduction="sum"), rows[chosen].sum())


@EACH_OF_ELEMENTS
def test_extreme_logits_of_elements(loss: Loss, backend: str, device: torch.device) -> None:
    inf, largest = float("inf"), torch.finfo(torch.float32).max
    pred = torch.tensor([1e4, -1e4, 1e4, -1e4, inf, -inf, inf, -inf], device=device, requires_grad=True)
    target = torch.tensor([0, 1, 1, 0, 0, 1, 1, 0.0], device=device)
    value = loss(pred, target, alpha=0.5, reduction="none")
    value.sum().backward()
    positive = 0.5 if loss is sigmoid_focal_loss else 1.0
    # A probability that is 0 in all but name may leave a last subnormal.
    want = [5e3, positive * 1e4, 0, 0, largest / 2, positive * largest, 0, 0]
    assert value.tolist() == pytest.approx(want, rel=0, abs=1e-37)
    assert pred.grad is not None
    assert pred.grad.tolist() == [0.5, -positive, 0, 0, 0, 0, 0, 0]


@EACH_OF_ELEMENTS
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_small_gamma_has_finite_gradients(loss: Loss, gamma: float, backend: str, device: torch.device) -> None:
    pred = torch.tensor([-90.0, -103, -1e4, 90, 103, 1e4], device=device, requires_grad=True)
    for target in (0.0, 1.0):
        value = loss(pred, torch.full_like(pred, target), gamma=gamma, reduction="sum")
        (grad,) = torch.autograd.grad(value, pred)
        assert value.isfinite() and grad.isfinite().all()


@EACH_OF_ROWS
def test_an_infinite_logit_costs_the_most(loss: Loss, backend: str, device: torch.device) -> None:
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
