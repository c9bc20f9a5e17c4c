# SPDX-License-Identifier: Apache-2.0
"""Boxes from a point's distances to the four sides, and the distances from boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import as_dtype, clamp_passing_grad, device_type
from ...core.random_inputs import boxes as draw_boxes
from ...core.random_inputs import uniform
from ...core.registry import OpSpec, Sample, register


def box_of(points: Tensor, distance: Tensor, limit: Tensor | None) -> Tensor:
    box = torch.cat([points - distance[..., :2], points + distance[..., 2:]], -1)
    return box if limit is None else clamp_passing_grad(box, 0.0, torch.cat([limit, limit], -1).flip(-1))


def reference_distance_to_box(points: Tensor, distance: Tensor, max_shape: Tensor | None) -> Tensor:
    return box_of(points, distance, max_shape)


def reference_box_to_distance(points: Tensor, boxes: Tensor, max_distance: float | None, eps: float) -> Tensor:
    distance = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
    return distance if max_distance is None else clamp_passing_grad(distance, 0.0, max_distance - eps)


def fake_distance_to_box(points: Tensor, distance: Tensor, max_shape: Tensor | None) -> Tensor:
    return distance.new_empty(distance.shape)


def fake_box_to_distance(points: Tensor, boxes: Tensor, max_distance: float | None, eps: float) -> Tensor:
    return boxes.new_empty(boxes.shape)


def _shapes(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Leading shapes, with points and four numbers for each."""
    for shape in ((0,), (1,), (33,), (1025,), (2, 7), (), (2, 3, 5)):
        points = uniform((*shape, 2), device, dtype, generator, 0.0, 640.0)
        fours = uniform((*shape, 4), device, dtype, generator, -16.0, 200.0)
        yield "x".join(map(str, shape)) or "scalar", points, fours
    points = uniform((40, 2), device, dtype, generator, 0.0, 640.0).expand(5, 40, 2)
    yield "broadcast-points", points, uniform((5, 4, 40), device, dtype, generator, -16.0, 200.0).transpose(1, 2)


def samples_distance_to_box(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, points, distance in _shapes(device, dtype, generator):
        yield Sample(name, (points, distance, None))
        limit = uniform((2,), device, dtype, generator, 300.0, 500.0).expand(points.shape)
        yield Sample(f"{name}-clipped", (points, distance, limit))


def samples_box_to_distance(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, points, fours in _shapes(device, dtype, generator):
        boxes = draw_boxes(fours[..., 0].numel(), device, dtype, generator).reshape(fours.shape)
        yield Sample(name, (points, boxes, None, 0.1))
        yield Sample(f"{name}-clamped", (points, boxes, 64.0, 0.1))


def large_distance_to_box(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    points = uniform((20_011, 2), device, dtype, generator, 0.0, 640.0)
    distance = uniform((20_011, 4), device, dtype, generator, -16.0, 200.0)
    yield Sample("n20011", (points, distance, torch.full_like(points, 600.0)))


def large_box_to_distance(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    points = uniform((20_011, 2), device, dtype, generator, 0.0, 640.0)
    yield Sample("n20011", (points, draw_boxes(20_011, device, dtype, generator), 64.0, 0.1))


# Whatever the user passes, the public functions hand over fp32, or fp64 where any argument has it.
ARITHMETIC = (torch.float32, torch.float64)

DISTANCE_TO_BOX = register(
    OpSpec(
        stem="distance_to_box",
        schema="(Tensor points, Tensor distance, Tensor? max_shape) -> Tensor",
        reference=reference_distance_to_box,
        fake=fake_distance_to_box,
        samples=samples_distance_to_box,
        large=large_distance_to_box,
        summary="boxes from distances to the sides",
        public=("distance_to_box",),
        differentiable=("points", "distance"),
        dtypes=ARITHMETIC,
    )
)

BOX_TO_DISTANCE = register(
    OpSpec(
        stem="box_to_distance",
        schema="(Tensor points, Tensor boxes, float? max_distance, float eps) -> Tensor",
        reference=reference_box_to_distance,
        fake=fake_box_to_distance,
        samples=samples_box_to_distance,
        large=large_box_to_distance,
        summary="distances to the sides of boxes",
        public=("box_to_distance",),
        differentiable=("points", "boxes"),
        dtypes=ARITHMETIC,
    )
)


def expand_to(op: str, argument: str, value: Tensor, leading: torch.Size, *trailing: int) -> Tensor:
    """`value` broadcast to ``[*leading, *trailing]``, without a copy."""
    shape = (*leading, *trailing)
    own = value.shape
    if own == shape:
        return value
    fits = len(own) >= len(trailing) and own[len(own) - len(trailing) :] == trailing and len(own) <= len(shape)
    if not fits or any(a not in (1, b) for a, b in zip(reversed(own), reversed(shape))):
        names = "[…, " + ", ".join(map(str, trailing)) + "]" if trailing else "[…]"
        rule = f"must have shape {names}, broadcasting to {list(shape)}"
        raise ValueError(checks.message(op, argument, rule, list(own)))
    return torch.broadcast_to(value, shape)


def limit_of(
    op: str, max_shape: Tensor | Sequence[float] | None, leading: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """`max_shape` as ``[*leading, 2]`` (height, width)."""
    if max_shape is None:
        return None
    if isinstance(max_shape, Tensor):
        checks.tensor(op, "max_shape", max_shape, checks.FLOATING + checks.INTEGER)
        if max_shape.device != device:
            raise ValueError(checks.message(op, "max_shape", f"must be on {device}", max_shape.device))
        fits = max_shape.shape == (2,) or (len(leading) >= 2 and max_shape.shape == (leading[0], 2))
        if not fits:
            batch = f" or [B, 2] = [{leading[0]}, 2]" if len(leading) >= 2 else ""
            raise ValueError(checks.message(op, "max_shape", f"must have shape [2]{batch}", list(max_shape.shape)))
        limit = max_shape.to(dtype)
        if limit.dim() == 2:
            limit = limit.reshape(leading[0], *[1] * (len(leading) - 1), 2)
        return limit.expand(*leading, 2)
    if not isinstance(max_shape, (tuple, list)) or len(max_shape) != 2:
        raise ValueError(checks.message(op, "max_shape", "must be (height, width) or a tensor", max_shape))
    sizes = [checks.number(op, f"max_shape[{i}]", size, 0, dtype=dtype) for i, size in enumerate(max_shape)]
    # Filled on the device: a copy from the host could not be captured in a CUDA graph.
    limit = torch.stack([torch.full((), size, dtype=dtype, device=device) for size in sizes])
    return limit.expand(*leading, 2)


def check_coordinates(op: str, argument: str, value: Tensor, last: int) -> None:
    """`value` is floating ``[…, last]``."""
    checks.tensor(op, argument, value)
    if value.dim() < 1 or value.shape[-1] != last:
        raise ValueError(checks.message(op, argument, f"must have shape […, {last}]", list(value.shape)))


def _aligned(op: str, points: Tensor, argument: str, fours: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of arithmetic, with the same leading shape."""
    check_coordinates(op, "points", points, 2)
    check_coordinates(op, argument, fours, 4)
    checks.same_device(op, argument, fours, "points", points)
    dtype = torch.float64 if torch.float64 in (points.dtype, fours.dtype) else torch.float32
    points, fours = as_dtype(points, dtype), as_dtype(fours, dtype)
    if points.shape[:-1] == fours.shape[:-1]:
        return points, fours
    try:
        leading = torch.broadcast_shapes(points.shape[:-1], fours.shape[:-1])
    except RuntimeError:
        rule = f"must have leading dimensions that broadcast with `points`, {list(points.shape)}"
        raise ValueError(checks.message(op, argument, rule, list(fours.shape))) from None
    return points.expand(*leading, 2), fours.expand(*leading, 4)


def distance_to_box(points: Tensor, distance: Tensor, max_shape: Tensor | Sequence[float] | None = None) -> Tensor:
    r"""Boxes around points from the distances to their four sides.

    .. math:: (x_1, y_1, x_2, y_2) = (x - l,\; y - t,\; x + r,\; y + b)

    mmdet's ``distance2bbox``; the parametrisation of Tian et al., FCOS, ICCV 2019 (arXiv 1904.01355), eq. 1.

    Args:
        points: floating ``[…, 2]``, x and y in pixels.
        distance: floating ``[…, 4]``, left, top, right, bottom in pixels; the leading dimensions broadcast with those
            of `points`.
        max_shape: (height, width) to clip to: two numbers, a tensor ``[2]``, or ``[B, 2]``, one per item of the first
            of two or more leading dimensions. x is clamped to [0, width], y to [0, height].

    Returns:
        ``[…, 4]`` boxes xyxy in fp32, or fp64 where `points` or `distance` is fp64.

    The gradient reaches `points` and `distance`; a clipped coordinate passes none, one exactly on the border does.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Each coordinate is rounded once, so that every backend gives the same bits. NaN stays NaN. mmdet's returns the
        input's dtype, in which fp16 boxes are multiples of a pixel above 1024.
    """
    op = "distance_to_box"
    points, distance = _aligned(op, points, "distance", distance)
    limit = limit_of(op, max_shape, distance.shape[:-1], distance.dtype, distance.device)
    return DISTANCE_TO_BOX(device_type(points), points, distance, limit)


def box_to_distance(points: Tensor, boxes: Tensor, max_distance: float | None = None, eps: float = 0.1) -> Tensor:
    r"""Distances from points to the four sides of boxes, the targets of a distance head.

    .. math:: (l, t, r, b) = (x - x_1,\; y - y_1,\; x_2 - x,\; y_2 - y)

    mmdet's ``bbox2distance``; Tian et al., FCOS, ICCV 2019 (arXiv 1904.01355), eq. 1.

    Args:
        points: floating ``[…, 2]``, x and y in pixels, or in any other unit shared with `boxes`.
        boxes: floating ``[…, 4]``, xyxy; the leading dimensions broadcast with those of `points`.
        max_distance: where given, distances are clamped to [0, max_distance − eps]; otherwise a point outside a box
            has a negative distance.
        eps: keeps the distance below `max_distance`, so that a bin remains to the right of it.

    Returns:
        ``[…, 4]`` distances left, top, right, bottom in fp32, or fp64 where `points` or `boxes` is fp64.

    The gradient reaches `points` and `boxes`; a clamped distance passes none, one exactly on a bound does.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or device outside the above, a NaN number.

    Note:
        Each distance is rounded once, so that every backend gives the same bits. NaN stays NaN.
    """
    op = "box_to_distance"
    points, boxes = _aligned(op, points, "boxes", boxes)
    if max_distance is not None:
        max_distance = checks.number(op, "max_distance", max_distance, dtype=boxes.dtype)
    eps = checks.number(op, "eps", eps, dtype=boxes.dtype)
    return BOX_TO_DISTANCE(device_type(points), points, boxes, max_distance, eps)
