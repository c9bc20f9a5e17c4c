# SPDX-License-Identifier: Apache-2.0
"""What the assigners that read predictions share: checks of their arguments, and drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core import checks
from ...core.random_inputs import boxes as draw_boxes
from ...core.random_inputs import normal, uniform
from .atss import check_level_sizes, check_strides, per_level
from .head_inputs import check_gt_labels


def check_predictions(op: str, name: str, scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> None:
    """`name` is what the operator calls `scores`."""
    checks.tensor(op, name, scores)
    checks.shape(op, name, scores, "[B, A, C]", (None, None, None))
    images, count, classes = scores.shape
    checks.tensor(op, "boxes", boxes)
    checks.shape(op, "boxes", boxes, "[B, A, 4]", (images, count, 4))
    checks.tensor(op, "gt_boxes", gt_boxes)
    checks.shape(op, "gt_boxes", gt_boxes, "[B, G, 4]", (images, None, 4))
    for argument, tensor in (("boxes", boxes), ("gt_boxes", gt_boxes)):
        checks.same_device(op, argument, tensor, name, scores)
    check_gt_labels(op, gt_labels, gt_boxes, name, scores, classes)


def check_grids(
    op: str,
    level_sizes: Sequence[tuple[int, int]] | None,
    strides: Sequence[float] | None,
    center_offset: float | Sequence[float],
    name: str,
    count: int,
) -> tuple[list[int], list[float], list[float]]:
    """Sizes, strides and offsets of the levels, whose cells are the `count` rows of `name`."""
    flat = check_level_sizes(op, level_sizes)
    stride_list = check_strides(op, strides, len(flat) // 2)
    offsets = per_level(op, "center_offset", center_offset, len(stride_list))
    cells = sum(h * w for h, w in zip(flat[::2], flat[1::2]))
    if cells != count:
        rule = f"must have the A = {count} cells of `{name}` in all"
        raise ValueError(checks.message(op, "level_sizes", rule, cells))
    return flat, stride_list, offsets


def check_points(op: str, points: Tensor, rule: str, columns: int, scores: Tensor, name: str = "scores") -> Tensor:
    checks.tensor(op, "points", points)
    checks.shape(op, "points", points, rule, (scores.shape[1], columns))
    checks.same_device(op, "points", points, name, scores)
    return points.detach().float()


def draw_objects(
    images: int, slots: int, classes: int, extent: float, at: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes and their labels, some of them padding."""
    found = draw_boxes(images * slots, at, torch.float32, generator, extent=extent).reshape(images, slots, 4)
    return found, torch.randint(-1, classes, (images, slots), generator=generator).to(at)


def draw_predictions(
    gt_boxes: Tensor, points: Tensor, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Scores, and boxes near those that contain the location."""
    device, images, count = gt_boxes.device, gt_boxes.shape[0], len(points)
    wild = normal((images, count, 4), device, torch.float32, generator, 6.0) + points.repeat(1, 2)
    boxes = wild + torch.tensor([-15.0, -15, 15, 15], device=device)
    if gt_boxes.shape[1]:
        chosen = torch.randint(0, gt_boxes.shape[1], (images, count), generator=generator).to(device)
        near = gt_boxes.gather(1, chosen[..., None].expand(-1, -1, 4))
        inside = (points > near[..., :2]) & (points < near[..., 2:])
        close = near + normal((images, count, 4), device, torch.float32, generator, 3.0)
        boxes = torch.where(inside.all(-1, keepdim=True), close, boxes)
    return uniform((images, count, classes), device, dtype, generator), boxes


def degenerate_objects(classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes ``[1, 9, 4]`` without a size or a number, far away or equal, and labels, two of which are none."""
    nan, inf = float("nan"), float("inf")
    boxes = [
        [5.0, 5, 5, 5],
        [90, 90, 20, 20],
        [-1e30, -1e30, 1e30, 1e30],
        [nan, 0, 90, 90],
        [0, 0, inf, 90],
        [0, 0, 120, 120],
        [1e6, 1e6, 1e6 + 64, 1e6 + 64],
        [10, 10, 80, 80],
        [10, 10, 80, 80],
    ]
    labels = [0, 1, 2, 3, 4, 0, 1, classes, -7]
    return torch.tensor([boxes], device=device), torch.tensor([labels], device=device)
