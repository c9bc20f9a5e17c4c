# SPDX-License-Identifier: Apache-2.0
"""Integral: against a loop over the bins, in place on views, special logits, errors."""

from __future__ import annotations

import math

import pytest
import torch

import gfl_ops
from gfl_ops import integral

pytestmark = pytest.mark.usefixtures("everywhere")

INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    with gfl_ops.set_backend(request.param):
        yield request.param


def test_it_is_the_expectation_of_each_side(generator: torch.Generator) -> None:
    pred = torch.randn(5, 4 * 9, generator=generator, dtype=torch.float64) * 3
    want = []
    for row in pred.tolist():
        for side in range(4):
            e = [math.exp(x) for x in row[9 * side : 9 * side + 9]]
            want.append(sum(j * p for j, p in enumerate(e)) / sum(e))
    torch.testing.assert_close(integral(pred, 8), torch.tensor(want, dtype=torch.float64).reshape(5, 4))


def test_sides_are_left_top_right_bottom(generator: torch.Generator) -> None:
    """A single high bin on each side is that side's distance."""
    pred = torch.zeros(1, 4 * 17)
    for side, bin_ in enumerate((3, 0, 16, 7)):
        pred[0, side * 17 + bin_] = 200.0
    assert integral(pred, 16).tolist() == [[3.0, 0.0, 16.0, 7.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_fp32_distances(dtype: torch.dtype, generator: torch.Generator) -> None:
    pred = (torch.randn(7, 68, generator=generator) * 3).to(dtype)
    got = integral(pred, 16)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, integral(pred.double(), 16).float(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(integral(pred, 16), got, rtol=0, atol=0)


def test_views_give_the_bits_of_their_copies(generator: torch.Generator) -> None:
    maps = torch.randn(2, 68, 3, 5, generator=generator)
    views = {
        "nchw": maps.permute(0, 2, 3, 1),
        "flattened": maps.flatten(2).transpose(1, 2),
        "channels-last": maps.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "scattered": torch.randn(3, 4, 5, 68, generator=generator).permute(2, 0, 1, 3)[::2, :, ::2],
        "every-other-bin": torch.randn(4, 136, generator=generator)[:, ::2],
        "expanded": torch.randn(1, 68, generator=generator).expand(6, 68),
    }
    for name, view in views.items():
        leaf, copy = view.detach().requires_grad_(), view.detach().clone().contiguous().requires_grad_()
        got, want = integral(leaf, 16), integral(copy, 16)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)
        got.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(leaf.grad, copy.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_special_logits() -> None:
    rows = {
        (INFINITY, 0.0, INFINITY): 1.0,
        (-INFINITY, -INFINITY, -INFINITY): 1.0,
        (3e38, -3e38, 1.0): 0.0,
        (-INFINITY, 0.0, -INFINITY): 1.0,
    }
    pred = torch.tensor([list(rows), [(NAN, 0.0, 1.0)] * 4]).reshape(2, 12).requires_grad_()
    got = integral(pred, 2)
    assert got[0].tolist() == list(rows.values()) and got[1].isnan().all()
    got.sum().backward()
    assert (pred.grad[0] == 0).all() and pred.grad[1].isnan().all()
    # bf16 has fp32's infinities and range; the rule is that of the arithmetic.
    assert integral(pred.detach().bfloat16(), 2)[0].tolist() == list(rows.values())


def test_empty_stays_on_the_graph() -> None:
    pred = torch.zeros(2, 0, 68, requires_grad=True)
    integral(pred, 16).sum().backward()
    assert pred.grad.shape == (2, 0, 68)


ERRORS = {
    "not-a-tensor": (TypeError, "`pred` must be a tensor", ([1.0], 16)),
    "integer": (TypeError, "`pred` must have one of the dtypes", (torch.zeros(2, 68, dtype=torch.int32), 16)),
    "last-dimension": (ValueError, r"\[…, 4\(R\+1\)\] = \[…, 68\], got \[2, 64\]", (torch.zeros(2, 64), 16)),
    "scalar": (ValueError, r"`pred` must have shape", (torch.zeros(()), 16)),
    "no-bins": (ValueError, "`reg_max` must be >= 1, got 0", (torch.zeros(2, 4), 0)),
    "reg_max-float": (TypeError, "`reg_max` must be an integer", (torch.zeros(2, 68), 16.0)),
    "reg_max-large": (NotImplementedError, "`reg_max` must be <= 128", (torch.zeros(2, 520), 129)),
}


@pytest.mark.parametrize(("error", "text", "arguments"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(error: type[Exception], text: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(error, match=text):
        integral(*arguments)
