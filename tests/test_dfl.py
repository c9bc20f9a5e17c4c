# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss: against mmdet's formula written as loops, targets out of range, given bins, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import distribution_focal_loss as dfl
from gfl_ops.core import checks

pytestmark = pytest.mark.usefixtures("everywhere")

INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and gfl_ops.core.backends.unavailable("native", "dfl", "cpu") is not None:
        pytest.skip("the extension is not built")
    with gfl_ops.set_backend(request.param):
        yield request.param


def loops(pred: Tensor, target: Tensor) -> Tensor:
    """mmdet's formula, one row and one bin at a time."""
    losses = []
    for row, y in zip(pred.double().tolist(), target.double().tolist(), strict=True):
        total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
        left = int(y)
        losses.append((total - row[left]) * (left + 1 - y) + (total - row[left + 1]) * (y - left))
    return torch.tensor(losses, dtype=torch.float64)


def drawn(generator: torch.Generator, m: int = 40, bins: int = 17) -> tuple[Tensor, Tensor]:
    pred = torch.randn(m, bins, generator=generator, dtype=torch.float64) * 3
    return pred, torch.rand(m, generator=generator, dtype=torch.float64) * (bins - 1.1)


def test_it_is_mmdets_formula(backend: str, generator: torch.Generator) -> None:
    pred, target = drawn(generator)
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    want = loops(pred, target)
    torch.testing.assert_close(dfl(pred, target, reduction="none"), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dfl(pred, target), want.mean())
    torch.testing.assert_close(dfl(pred, target, weight, "sum"), (want * weight).sum())
    torch.testing.assert_close(
        dfl(pred, target, weight, avg_factor=7.0), (want * weight).sum() / (7 + torch.finfo(torch.float32).eps)
    )


def test_at_the_last_bin_the_whole_weight_is_on_it(backend: str, generator: torch.Generator) -> None:
    pred, _ = drawn(generator, 3, 17)
    target = torch.tensor([16.0, 15.0, 0.0], dtype=torch.float64)
    log_p = pred.log_softmax(1)
    torch.testing.assert_close(dfl(pred, target, reduction="none"), -log_p[torch.arange(3), target.long()])


OUTSIDE = [(-0.5, 0.0), (-1e30, 0.0), (-INFINITY, 0.0), (16.01, 16.0), (1e30, 16.0), (INFINITY, 16.0)]


def test_clamp_takes_the_nearest_end_without_gradient(backend: str, generator: torch.Generator) -> None:
    pred = torch.randn(len(OUTSIDE), 17, generator=generator, requires_grad=True)
    target = torch.tensor([y for y, _ in OUTSIDE], requires_grad=True)
    at_the_end = dfl(pred.detach(), torch.tensor([end for _, end in OUTSIDE]), reduction="none")
    loss = dfl(pred, target, reduction="none")
    torch.testing.assert_close(loss, at_the_end, rtol=0, atol=0)
    loss.sum().backward()
    assert target.grad.abs().max() == 0 and pred.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("out_of_range", ["clamp", "ignore"])
def test_rows_that_do_not_count(backend: str, out_of_range: str, generator: torch.Generator) -> None:
    """NaN, and anything outside under "ignore": zero loss and gradient, even beside NaN logits; still in the mean."""
    positions = [NAN] + [y for y, _ in OUTSIDE] * (out_of_range == "ignore")
    pred = torch.randn(len(positions) + 1, 17, generator=generator)
    pred[0] = NAN
    pred.requires_grad_()
    target = torch.tensor([*positions, 3.25], requires_grad=True)
    loss = dfl(pred, target, reduction="none", out_of_range=out_of_range)
    assert (loss[:-1] == 0).all() and loss[-1] > 0
    torch.testing.assert_close(dfl(pred, target, out_of_range=out_of_range), loss[-1] / len(loss))
    loss.sum().backward()
    assert (pred.grad[:-1] == 0).all() and (target.grad[:-1] == 0).all()
    assert (pred.grad[-1] != 0).all() and target.grad[-1] != 0


def test_error_looks_only_when_asked_to(
    backend: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pred = torch.randn(3, 17, generator=generator)
    target = torch.tensor([1.0, 16.5, 2.0])
    left, ones = torch.tensor([1, 16, 2]), torch.ones(3)
    clamped = dfl(pred, target)
    torch.testing.assert_close(dfl(pred, target, out_of_range="error"), clamped, rtol=0, atol=0)
    dfl(pred, (left, ones, ones), out_of_range="error")
    monkeypatch.setattr(checks, "SYNCHRONISING", True)
    with pytest.raises(ValueError, match=r"`target` must lie in \[0, R\] = \[0, 16\], got 16.5 at row 1"):
        dfl(pred, target, out_of_range="error")
    with pytest.raises(ValueError, match=r"got nan at row 0"):
        dfl(pred, torch.tensor([NAN, 1.0, 1.0]), out_of_range="error")
    with pytest.raises(ValueError, match=r"`target\[0\]` and the bin after it.*got 16 at row 1"):
        dfl(pred, (left, ones, ones), out_of_range="error")
    dfl(pred, (left, ones, torch.tensor([1.0, 0.0, 1.0])), out_of_range="error")
    dfl(pred, target.clamp(max=16), out_of_range="error")
    torch.testing.assert_close(dfl(pred, target, out_of_range="clamp"), clamped, rtol=0, atol=0)


def test_given_bins_say_the_same_as_positions(backend: str, generator: torch.Generator) -> None:
    pred, target = drawn(generator)
    left = target.long()
    given = (left.int(), left + 1 - target, target - left)
    want = dfl(pred, target, reduction="none")
    torch.testing.assert_close(dfl(pred, given, reduction="none"), want)
    torch.testing.assert_close(dfl(pred, list(given), reduction="none", out_of_range="ignore"), want)


def test_given_bins_that_do_not_exist(backend: str, generator: torch.Generator) -> None:
    pred = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    log_p = pred.log_softmax(1)
    left = torch.tensor([-1, 4, -7, 9, 4, 2])
    weight_left = torch.tensor([0.25, 0.25, 0.25, 0.25, 1.0, 0.0], dtype=torch.float64)
    weight_right = torch.tensor([0.75, 0.75, 0.75, 0.75, 0.0, 1.0], dtype=torch.float64)
    nearest = torch.tensor([0, 4, 0, 4, 4, 3])
    want = -log_p[torch.arange(6), nearest]
    torch.testing.assert_close(dfl(pred, (left, weight_left, weight_right), reduction="none"), want)
    ignored = dfl(pred, (left, weight_left, weight_right), reduction="none", out_of_range="ignore")
    assert (ignored[:4] == 0).all()
    torch.testing.assert_close(ignored[4:], want[4:])


def test_infinite_logits_count_as_a_quarter_of_the_largest(backend: str) -> None:
    quarter = torch.finfo(torch.float32).max / 4
    pred = torch.tensor([[INFINITY, 0.0, 0.0], [-INFINITY, 0.0, 0.0], [INFINITY, -INFINITY, 0.0]], requires_grad=True)
    target = torch.tensor([0.0, 1.5, 0.5], requires_grad=True)
    loss = dfl(pred, target, reduction="none")
    # Half of the last row is the distance of two extremes, the other half nothing.
    torch.testing.assert_close(loss, torch.tensor([0.0, math.log(2), quarter]), rtol=1e-6, atol=0)
    loss.sum().backward()
    assert (pred.grad[pred.detach().isinf()] == 0).all() and pred.grad.isfinite().all() and target.grad.isfinite().all()
    with gfl_ops.set_backend("reference"):
        same = dfl(pred.detach(), target.detach(), reduction="none")
    torch.testing.assert_close(loss.detach(), same)


def test_a_nan_logit_spreads_over_its_row_alone(backend: str) -> None:
    pred = torch.zeros(3, 5)
    pred[1, 2] = NAN
    pred.requires_grad_()
    loss = dfl(pred, torch.tensor([0.5, 0.5, 0.5]), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert pred.grad.isnan().all(1).tolist() == [False, True, False]


def test_autocast_and_mixed_dtypes(backend: str, generator: torch.Generator) -> None:
    pred, target = drawn(generator)
    half, want = pred.bfloat16(), dfl(pred.bfloat16().float(), target.float(), reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dfl(half, target, reduction="none")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert dfl(half, target.half(), reduction="none").dtype == torch.float32


def test_no_rows(backend: str) -> None:
    pred = torch.zeros(0, 17, requires_grad=True)
    loss = dfl(pred, torch.zeros(0), avg_factor=0.0)
    loss.backward()
    assert loss == 0 and pred.grad.shape == (0, 17)
    assert dfl(pred, torch.zeros(0)).isnan()


ERRORS = {
    "pred-not-a-tensor": (TypeError, "`pred` must be a tensor", {"pred": 3}),
    "pred-integer": (TypeError, "`pred` must have one of the dtypes", {"pred": torch.zeros(4, 17, dtype=torch.int64)}),
    "pred-1d": (ValueError, r"`pred` must have shape \[M, R\+1\]", {"pred": torch.zeros(4)}),
    "one-bin": (ValueError, r"`pred` must have shape \[M, R\+1\]", {"pred": torch.zeros(4, 1)}),
    "many-bins": (NotImplementedError, "must be <= 128, got 129", {"pred": torch.zeros(4, 130)}),
    "target-shape": (ValueError, r"`target` must have shape \[M\] = \[4\], got \[5\]", {"target": torch.zeros(5)}),
    "target-integer": (TypeError, "`target` must have one", {"target": torch.zeros(4, dtype=torch.int64)}),
    "target-device": (ValueError, "`target` must be on the device", {"target": torch.zeros(4, device="meta")}),
    "two-bins-of-two": (ValueError, "2 items", {"target": (torch.zeros(4), torch.zeros(4))}),
    "left-floating": (TypeError, r"`target\[0\]`", {"target": (torch.zeros(4), torch.zeros(4), torch.zeros(4))}),
    "weight-column": (ValueError, r"`weight` must have shape \[M\] = \[4\], got", {"weight": torch.ones(4, 1)}),
    "reduction": (ValueError, "`reduction` must be one of", {"reduction": "avg"}),
    "out_of_range": (ValueError, "`out_of_range` must be one of", {"out_of_range": "wrap"}),
    "avg-factor-with-sum": (ValueError, "avg_factor can not be used", {"reduction": "sum", "avg_factor": 1.0}),
}


@pytest.mark.parametrize(("error", "text", "changed"), ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("function", [dfl, gfl_ops.dfl_integral], ids=lambda f: f.__name__)
def test_errors(function: object, error: type[Exception], text: str, changed: dict[str, object]) -> None:
    if function is gfl_ops.dfl_integral and isinstance(changed.get("target"), tuple):
        error, text = TypeError, "`target` must be a tensor"
    arguments = {"pred": torch.zeros(4, 17), "target": torch.zeros(4), **changed}
    with pytest.raises(error, match=text):
        function(**arguments)
