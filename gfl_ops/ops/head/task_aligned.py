# SPDX-License-Identifier: Apache-2.0
"""Task-aligned assignment: locations learn the boxes that their predictions already fit best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import device_type
from ...core.random_inputs import uniform
from ...core.registry import OpSpec, Sample, register
from .assign import check_grids, check_points, check_predictions, degenerate_objects, draw_objects, draw_predictions
from .atss import MAX_CELLS, check_strides
from .task_aligned_reference import locations, reference

VARIANTS = ("ultralytics", "yolov6", "mmdet")
OVERLAPS = ("ciou", "iou")


class TaskAlignedAssignment(NamedTuple):
    """What `task_aligned_assign` returns for every location; see there."""

    labels: Tensor
    matched: Tensor
    scores: Tensor


def fake(scores: Tensor, boxes: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = scores.shape[:2]
    labels = scores.new_empty(shape, dtype=torch.int64)
    return labels, torch.empty_like(labels), scores.new_empty(shape, dtype=torch.float32)


_ULTRALYTICS = (10, 10, 0.5, 6.0, 16.0, 1e-9, "ultralytics", True)
_SIZES, _STRIDES, _HALF = [12, 16, 6, 8, 3, 4], [8.0, 16.0, 32.0], [0.5] * 3


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    sizes, strides, half = [80, 80, 40, 40, 20, 20], [8.0, 16.0, 32.0], [0.5] * 3
    gt_boxes, labels = draw_objects(2, 100, 80, 640.0, device, generator)
    scores, boxes = draw_predictions(gt_boxes, locations(sizes, strides, half, device), 80, dtype, generator)
    yield Sample("b2-g100-a8400", (scores, boxes, sizes, strides, half, None, gt_boxes, labels, *_ULTRALYTICS, False))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for sample in _of_probabilities(device, dtype, generator):
        yield Sample(sample.id, (*sample.args, False))
    gt_boxes, labels = draw_objects(2, 24, 5, 120.0, device, generator)
    points = locations(_SIZES, _STRIDES, _HALF, device)
    scores, boxes = draw_predictions(gt_boxes, points, 5, dtype, generator)
    logits = scores * 200 - 100
    logits[0, 3:40:7], logits[0, 4:60:9, 1], logits[0, 5:60:9, 1] = float("nan"), float("inf"), -float("inf")
    for name, given in (("logits", scores * 8 - 6), ("extreme-logits", logits)):
        yield Sample(name, (given, boxes, _SIZES, _STRIDES, _HALF, None, gt_boxes, labels, *_ULTRALYTICS, True))


def _of_probabilities(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    """But for the operator's last argument."""
    sizes, strides, half, classes = _SIZES, _STRIDES, _HALF, 5

    def objects(images: int, slots: int) -> tuple[Tensor, Tensor]:
        return draw_objects(images, slots, classes, 120.0, device, generator)

    def predictions(gt_boxes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        return draw_predictions(gt_boxes, points, classes, dtype, generator)

    def grid(gt_boxes: Tensor) -> tuple[Any, ...]:
        scores, boxes = predictions(gt_boxes, locations(sizes, strides, half, device))
        return scores, boxes, sizes, strides, half, None

    for images, slots in ((2, 0), (1, 1), (2, 7), (1, 60)):
        gt_boxes, labels = objects(images, slots)
        yield Sample(f"b{images}-g{slots}", (*grid(gt_boxes), gt_boxes, labels, *_ULTRALYTICS))
    gt_boxes, labels = objects(2, 24)
    given = grid(gt_boxes)
    others = {
        "one-to-one": (7, 1, 0.5, 6.0, 16.0, 1e-9, "ultralytics", True),
        "one-to-two": (7, 2, 0.5, 6.0, 0.0, 1e-9, "ultralytics", True),
        "topk1": (1, 1, 1.0, 6.0, 0.0, 1e-9, "ultralytics", True),
        "yolov6": (13, 13, 1.0, 6.0, 0.0, 1e-9, "yolov6", False),
        "mmyolo": (10, 10, 0.5, 6.0, 0.0, 1e-7, "yolov6", True),
        "mmdet": (13, 13, 1.0, 6.0, 0.0, 1e-9, "mmdet", False),
        "powers": (10, 10, 0.7, 2.3, 8.0, 1e-9, "ultralytics", True),
        "more-than-all": (300, 300, 0.5, 6.0, 16.0, 1e-9, "ultralytics", True),
        "more-than-a-warp": (40, 33, 0.5, 6.0, 16.0, 1e-9, "ultralytics", True),
    }
    for name, options in others.items():
        yield Sample(name, (*given, gt_boxes, labels, *options))
    # Class planes as a head has them, and predictions that are equal over and over.
    planes = given[0].transpose(1, 2).contiguous().transpose(1, 2)
    yield Sample("class-planes", (planes, *given[1:], gt_boxes, labels, *_ULTRALYTICS))
    coarse, rounded = (given[0] * 3).round() / 3, gt_boxes.div(8).round() * 8
    centre = locations(sizes, strides, half, device).repeat(1, 2)
    alike = (centre + torch.tensor([-12.0, -12, 12, 12], device=device)).expand(2, -1, 4)
    for name in ("ultralytics", "yolov6", "mmdet"):
        options = (10, 4 if name == "ultralytics" else 10, 0.5, 6.0, 0.0, 1e-9, name, name == "ultralytics")
        yield Sample(f"ties-{name}", (coarse, alike, *given[2:], rounded, labels, *options))
    yield Sample("no-score", (coarse * 0, *given[1:], gt_boxes, labels, *_ULTRALYTICS))
    # Other grids, and points in any order.
    scattered = uniform((61, 2), device, torch.float32, generator, 0.0, 120.0)
    for name, points in (("points", scattered), ("grid-points", locations(sizes, strides, half, device))):
        scores, boxes = predictions(gt_boxes, points)
        yield Sample(name, (scores, boxes, [], [], [], points, gt_boxes, labels, *_ULTRALYTICS))
    odd = [1, 30, 0, 5, 7, 3, 1, 1], [4.0, 8.0, 24.0, 100.0], [0.0, 0.5, 0.25, 0.5]
    scores, boxes = predictions(gt_boxes, locations(*odd, device))
    yield Sample("odd-grids", (scores, boxes, *odd, None, gt_boxes, labels, *_ULTRALYTICS))
    nan, inf = float("nan"), float("inf")
    strange, labels = degenerate_objects(classes, device)
    scores, boxes = given[0][:1].clone(), given[1][:1].clone()
    scores[0, 3:40:7], boxes[0, 5:60:9], boxes[0, 6:60:11, 2] = nan, nan, inf
    for name in VARIANTS:
        options = (10, 10, 0.5, 6.0, 16.0 if name == "ultralytics" else 0.0, 1e-9, name, name == "ultralytics")
        yield Sample(f"degenerate-{name}", (scores, boxes, *given[2:], strange, labels, *options))


TASK_ALIGNED = register(
    OpSpec(
        stem="task_aligned",
        schema="(Tensor scores, Tensor boxes, int[] level_sizes, float[] strides, float[] center_offset,"
        " Tensor? points, Tensor gt_boxes, Tensor gt_labels, int topk, int topk2, float alpha, float beta,"
        " float min_side, float eps, str variant, bool ciou, bool logits)"
        " -> (Tensor labels, Tensor matched, Tensor alignment)",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="task-aligned assignment of YOLOv8 to 26, YOLOv6, PP-YOLOE and TOOD",
        public=("task_aligned_assign",),
    )
)


def task_aligned_assign(
    scores: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[tuple[int, int]] | None,
    strides: Sequence[float] | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    topk: int = 10,
    topk2: int | None = None,
    alpha: float = 0.5,
    beta: float = 6.0,
    min_side: float | None = None,
    center_offset: float | Sequence[float] = 0.5,
    points: Tensor | None = None,
    eps: float = 1e-9,
    variant: str = "ultralytics",
    overlap: str | None = None,
) -> TaskAlignedAssignment:
    r"""Assign each location to the box that its predicted class and box fit best, or to none.

    A box selects, among the locations inside it, the `topk` that have the largest

    .. math:: t = s^\alpha \cdot o^\beta

    of the score s that is predicted there for its class and the overlap o of the predicted box with it. A location that
    several boxes select goes to the one of the largest overlap. The score that a positive is to learn is
    :math:`t \cdot \max o / (\max t + \epsilon)`, over the positives of its box. Feng et al., TOOD: Task-aligned
    One-stage Object Detection, ICCV 2021 (arXiv 2108.07755, eqs. 4 and 5).

    Args:
        scores: fp32, fp16, bf16 or fp64 ``[B, A, C]`` of any strides: probabilities. More than 1 counts as 1.
        boxes: floating ``[B, A, 4]`` xyxy in pixels; converted to fp32.
        level_sizes: (height, width) of each level, in cells; A in all, level by level, row by row. None with `points`.
        strides: pixels per cell of each level, > 0. With `points` only the default of `min_side` reads them, and None
            will do.
        gt_boxes: floating ``[B, G, 4]`` xyxy in pixels; converted to fp32. A box with a NaN or an infinity is ignored.
        gt_labels: integers ``[B, G]``, the class of each box. One outside [0, C) is padding, which is ignored;
            ``GFL_OPS_CHECK=1`` refuses one that is C or more.
        topk: candidates per box, >= 1; fewer if there are fewer locations.
        topk2: how many of the locations that it got a box keeps, by t; `topk` by default, which does not drop any.
        alpha: exponent of the score, >= 0.
        beta: exponent of the overlap, > 0.
        min_side: a shorter side counts as this long when the locations inside a box are found, in pixels, >= 0. By
            default the second stride for "ultralytics" (the first if there is one; 0 without strides), else 0.
        center_offset: position of a location within its cell, in cells; one number, or one per level.
        points: floating ``[A, 2]`` (x, y) in pixels, for locations on no grid; converted to fp32. On the CPU points
            that form grids cost little more than `level_sizes`; on a GPU each box looks at all of them.
        eps: of the normalisation, >= 0.
        variant: "ultralytics" (8.4; 8.3 with ``min_side=0``): only boxes around the location compete for it. "yolov6"
            (also PP-YOLOE's and mmyolo's): all boxes of the image do. "mmdet" (TOOD's): all locations are ranked, and
            those that are not inside by more than 0.01 or have t = 0 drop out; only the boxes that select a location
            compete for it; the score is t itself.
        overlap: "ciou" (what is below 0 counts as 0) or "iou". By default what the variant has: "ciou" for
            "ultralytics", else "iou"; mmyolo's `use_ciou` is "yolov6" with "ciou".

    Returns:
        ``TaskAlignedAssignment(labels, matched, scores)``, each ``[B, A]``: `labels` int64, the class of a positive,
        else −1; `matched` int64, the slot in [0, G) of its box, else −1; `scores` fp32, what it is to learn, else 0.

    There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.
        NotImplementedError: on a GPU more than 16 levels or a `topk` or `topk2` over 1024.

    Note:
        Arithmetic is fp32. Equal t rank by the lower location, equal overlaps by the lower slot; a NaN counts as 0.
        Unless the variant is "mmdet", a box with fewer candidates of t > 0 than `topk` also selects locations inside it
        with t = 0: those among the lowest of all locations, as if it had sorted the whole row. They learn a score of 0.
        ultralytics on CUDA does the same; torch's top-k on a CPU takes others there. Memory is O(A + G·k), nothing
        waits for the device, and all backends give the same indices unless an exponent is no multiple of a half.
    """
    op = "task_aligned_assign"
    check_predictions(op, "scores", scores, boxes, gt_boxes, gt_labels)
    flat: list[int] = []
    stride_list: list[float] = []
    offsets: list[float] = []
    if points is None:
        flat, stride_list, offsets = check_grids(op, level_sizes, strides, center_offset, "scores", scores.shape[1])
    else:
        points = check_points(op, points, "[A, 2]", 2, scores)
        if strides is not None:
            check_strides(op, strides, len(strides) if isinstance(strides, (tuple, list)) else 0)
    topk = min(checks.number(op, "topk", topk, 1, integer=True), MAX_CELLS)
    topk2 = topk if topk2 is None else min(checks.number(op, "topk2", topk2, 1, integer=True), MAX_CELLS)
    alpha = checks.number(op, "alpha", alpha, 0, checks.LARGEST)
    beta = checks.number(op, "beta", beta, 0, checks.LARGEST, exclusive=True)
    eps = checks.number(op, "eps", eps, 0, checks.LARGEST)
    checks.choice(op, "variant", variant, VARIANTS)
    if overlap is not None:
        checks.choice(op, "overlap", overlap, OVERLAPS)
    if min_side is None:
        known = strides or () if variant == "ultralytics" else ()
        min_side = known[min(1, len(known) - 1)] if len(known) else 0.0
    min_side = checks.number(op, "min_side", min_side, 0, checks.LARGEST)
    return TaskAlignedAssignment(
        *TASK_ALIGNED(
            device_type(scores),
            scores.detach(),
            boxes.detach().float(),
            flat,
            stride_list,
            offsets,
            points,
            gt_boxes.detach().float(),
            gt_labels.long(),
            topk,
            topk2,
            alpha,
            beta,
            min_side,
            eps,
            variant,
            variant == "ultralytics" if overlap is None else overlap == "ciou",
            False,
        )
    )
