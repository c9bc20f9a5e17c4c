# SPDX-License-Identifier: Apache-2.0
"""Boxes from distances and back: loops, clipping, broadcasting, equal bits on every backend, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import box_to_distance, distance_to_box

pytestmark = pytest.mark.usefixtures("everywhere")

NAN = float("nan")


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request: pytest.FixtureRequest) -> str:
    with gfl_ops.set_backend(request.param):
        yield request.param


def loop_boxes(points: Tensor, distance: Tensor, height: float | None = None, width: float | None = None) -> Tensor:
    rows = []
    for (x, y), (left, top, right, bottom) in zip(points.tolist(), distance.tolist(), strict=True):
        box = [x - left, y - top, x + right, y + bottom]
        if height is not None:
            box = [min(max(c, 0.0), (width, height)[i % 2]) for i, c in enumerate(box)]
        rows.append(box)
    return torch.tensor(rows, dtype=torch.float64)


def drawn(generator: torch.Generator, n: int = 50) -> tuple[Tensor, Tensor]:
    points = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 100
    return points, torch.rand(n, 4, generator=generator, dtype=torch.float64) * 80 - 20


def test_boxes_by_a_loop(generator: torch.Generator) -> None:
    points, distance = drawn(generator)
    torch.testing.assert_close(distance_to_box(points, distance), loop_boxes(points, distance), rtol=0, atol=0)
    clipped = loop_boxes(points, distance, 60.0, 90.0)
    for max_shape in ((60, 90), [60.0, 90.0], torch.tensor([60, 90]), torch.tensor([60.0, 90.0])):
        torch.testing.assert_close(distance_to_box(points, distance, max_shape), clipped, rtol=0, atol=0)


def test_a_limit_for_each_image(generator: torch.Generator) -> None:
    points, _ = drawn(generator, 30)
    distance = torch.rand(2, 30, 4, generator=generator, dtype=torch.float64) * 80
    got = distance_to_box(points, distance, torch.tensor([[60, 90], [40, 30]]))
    for i, (height, width) in enumerate(((60.0, 90.0), (40.0, 30.0))):
        torch.testing.assert_close(got[i], loop_boxes(points, distance[i], height, width), rtol=0, atol=0)


def test_distances_by_a_loop_and_back(generator: torch.Generator) -> None:
    points, distance = drawn(generator)
    boxes = distance_to_box(points, distance)
    torch.testing.assert_close(box_to_distance(points, boxes), distance)
    held = box_to_distance(points, boxes, max_distance=16.0, eps=0.1)
    torch.testing.assert_close(held, distance.clamp(0, 15.9))
    assert held.min() == 0 and held.max() == 16.0 - 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_comes_out_in_fp32(dtype: torch.dtype) -> None:
    """In fp16 the box of a point at 2000.5 would be off by half a pixel."""
    points, distance = torch.tensor([[1000.5, 600.0]], dtype=dtype), torch.tensor([[0.25, 0, 0, 0]], dtype=dtype)
    box = distance_to_box(points, distance)
    assert box.dtype == torch.float32 and box[0, 0] == float(points[0, 0]) - 0.25
    assert box_to_distance(points, box).tolist() == distance.tolist()
    assert distance_to_box(points.double(), distance).dtype == torch.float64


def test_gradient_at_the_border() -> None:
    """As torch.clamp: exactly on the border the gradient passes, beyond it does not."""
    points = torch.tensor([[4.0, 4.0]], requires_grad=True)
    distance = torch.tensor([[4.0, 5.0, 6.0, 7.0]], requires_grad=True)
    distance_to_box(points, distance, (10, 10)).sum().backward()
    assert distance.grad.tolist() == [[-1.0, 0.0, 1.0, 0.0]] and points.grad.tolist() == [[2.0, 0.0]]
    boxes = torch.tensor([[4.0, 5.0, 20.0, 6.0]], requires_grad=True)
    points = torch.tensor([[4.0, 4.0]], requires_grad=True)
    box_to_distance(points, boxes, max_distance=16.5, eps=0.5).sum().backward()
    assert boxes.grad.tolist() == [[-1.0, 0.0, 1.0, 1.0]] and points.grad.tolist() == [[0.0, -1.0]]


def test_nan_stays_and_an_upper_bound_below_zero_wins() -> None:
    box = distance_to_box(torch.zeros(1, 2), torch.tensor([[NAN, 1.0, 1.0, 1.0]]), torch.tensor([10.0, -3.0]))
    assert box[0, 0].isnan() and box[0, 1:].tolist() == [0.0, -3.0, 1.0]


def test_empty_stays_on_the_graph() -> None:
    distance = torch.zeros(0, 4, requires_grad=True)
    distance_to_box(torch.zeros(0, 2), distance, (5, 5)).sum().backward()
    assert distance.grad.shape == (0, 4)


P, D = torch.zeros(3, 2), torch.zeros(3, 4)
ERRORS = {
    "points-integer": (TypeError, "`points` must have one", distance_to_box, (P.long(), D)),
    "points-last": (ValueError, r"`points` must have shape \[…, 2\], got \[3, 4\]", distance_to_box, (D, D)),
    "distance-last": (ValueError, r"`distance` must have shape \[…, 4\], got \[3, 2\]", distance_to_box, (P, P)),
    "boxes-last": (ValueError, r"`boxes` must have shape \[…, 4\]", box_to_distance, (P, P)),
    "leading": (ValueError, "`distance` must have leading dimensions", distance_to_box, (P, torch.zeros(2, 4))),
    "device": (ValueError, "`distance` must be on the device", distance_to_box, (P, D.to("meta"))),
    "three-sizes": (ValueError, r"`max_shape` must be \(height, width\)", distance_to_box, (P, D, (1, 2, 3))),
    "negative-size": (ValueError, r"`max_shape\[1\]` must be >= 0", distance_to_box, (P, D, (1, -2))),
    "limits-of-rows": (ValueError, r"`max_shape` must have shape \[2\], got \[3, 2\]", distance_to_box, (P, D, P)),
    "max-distance": (TypeError, "`max_distance` must be a number", box_to_distance, (P, D, "16")),
    "max-distance-nan": (ValueError, "`max_distance` must not be NaN", box_to_distance, (P, D, NAN)),
}


@pytest.mark.parametrize(("error", "text", "function", "arguments"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(error: type[Exception], text: str, function: object, arguments: tuple[object, ...]) -> None:
    with pytest.raises(error, match=text):
        function(*arguments)
