# SPDX-License-Identifier: Apache-2.0
"""Decode is integral, stride and distance_to_box in one; forms of its arguments, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import decode, distance_to_box, integral

pytestmark = pytest.mark.usefixtures("everywhere")


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    with gfl_ops.set_backend(request.param):
        yield request.param


def drawn(generator: torch.Generator, *leading: int) -> tuple[Tensor, Tensor]:
    pred = torch.randn(*leading, 68, generator=generator, dtype=torch.float64) * 3
    return pred, torch.rand(*leading, 2, generator=generator, dtype=torch.float64) * 64


@pytest.mark.parametrize("max_shape", [None, (40, 50)])
def test_it_is_its_parts_in_one(max_shape: tuple[int, int] | None, generator: torch.Generator) -> None:
    pred, points = drawn(generator, 2, 15)
    stride = (8 * 2 ** torch.randint(0, 5, (15,), generator=generator)).double()
    leaves = [pred.clone().requires_grad_(), points.clone().requires_grad_()]
    others = [pred.clone().requires_grad_(), points.clone().requires_grad_()]
    got = decode(leaves[0], leaves[1], stride, max_shape=max_shape)
    want = distance_to_box(others[1], integral(others[0], 16) * stride[:, None], max_shape)
    torch.testing.assert_close(got, want)
    direction = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


def test_one_grid_for_a_batch_of_conv_maps(generator: torch.Generator) -> None:
    maps = torch.randn(2, 68, 3, 5, generator=generator) * 3
    y, x = torch.meshgrid(torch.arange(3.0) * 8, torch.arange(5.0) * 8, indexing="ij")
    grid = torch.stack([x, y], -1).requires_grad_()
    limits = torch.tensor([[20, 30], [15, 40]])
    got = decode(maps.permute(0, 2, 3, 1), grid, 8, max_shape=limits)
    for i in range(2):
        rows = maps[i].flatten(1).t().contiguous()
        want = decode(rows, grid.reshape(15, 2), torch.full((15,), 8), max_shape=limits[i])
        torch.testing.assert_close(got[i].reshape(15, 4), want)
    got.sum().backward()
    assert grid.grad.shape == (3, 5, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_fp32_boxes(dtype: torch.dtype, generator: torch.Generator) -> None:
    pred, points = drawn(generator, 20)
    got = decode(pred.to(dtype), points, 32.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, decode(pred.to(dtype).double(), points, 32.0).float(), rtol=1e-5, atol=1e-3)


def test_it_compiles_with_python_numbers(generator: torch.Generator) -> None:
    pred, points = drawn(generator, 4)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    got = compiled(pred, points, 8, 16, (40, 50))
    torch.testing.assert_close(got, decode(pred, points, 8, 16, (40, 50)), rtol=0, atol=0)


def test_empty_stays_on_the_graph() -> None:
    pred = torch.zeros(0, 68, requires_grad=True)
    decode(pred, torch.zeros(0, 2), 8, max_shape=(5, 5)).sum().backward()
    assert pred.grad.shape == (0, 68)


ERRORS = {
    "pred": (ValueError, r"`pred` must have shape \[…, 4\(R\+1\)\]", {"pred": torch.zeros(3, 64)}),
    "points": (ValueError, r"`points` must .* broadcasting to \[3, 2\], got \[4, 2\]", {"points": torch.zeros(4, 2)}),
    "points-integer": (TypeError, "`points` must have one", {"points": torch.zeros(3, 2, dtype=torch.int64)}),
    "points-device": (ValueError, "`points` must be on the device", {"points": torch.zeros(3, 2, device="meta")}),
    "stride-shape": (ValueError, r"`stride` must .* broadcasting to \[3\], got \[2\]", {"stride": torch.ones(2)}),
    "stride-zero": (ValueError, "`stride` must be > 0", {"stride": 0}),
    "stride-text": (TypeError, "`stride` must be a number", {"stride": "8"}),
    "max_shape": (ValueError, r"`max_shape` must be \(height, width\)", {"max_shape": 7}),
    "max_shape-tensor": (ValueError, r"`max_shape` must have shape \[2\]", {"max_shape": torch.zeros(3, 2)}),
}


@pytest.mark.parametrize(("error", "text", "changed"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(error: type[Exception], text: str, changed: dict[str, object]) -> None:
    arguments = {"pred": torch.zeros(3, 68), "points": torch.zeros(3, 2), "stride": 8.0, **changed}
    with pytest.raises(error, match=text):
        decode(**arguments)
