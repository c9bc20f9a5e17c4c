# SPDX-License-Identifier: Apache-2.0
"""Assignment with a dynamic k: a box learns from as many locations as predictions fit it, those of the least cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import device_type
from ...core.random_inputs import uniform
from ...core.registry import OpSpec, Sample, register
from .assign import (
    check_grids,
    check_points,
    check_predictions,
    degenerate_objects,
    draw_objects,
    draw_predictions,
)
from .atss import MAX_CELLS, Assignment
from .dynamic_k_reference import grid_points, reference

VARIANTS = ("mmdet", "mmyolo", "nanodet")

# topk, weights of IoU and class, radius
_SOFT = (13, 3.0, 1.0, 3.0)
_SIMOTA = (10, 3.0, 1.0, 2.5, "simota")


def fake(scores: Tensor, boxes: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = scores.shape[:2]
    labels = scores.new_empty(shape, dtype=torch.int64)
    return labels, torch.empty_like(labels), scores.new_empty(shape, dtype=torch.float32)


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    grid = [80, 80, 40, 40, 20, 20], [8.0, 16.0, 32.0], [0.0] * 3
    gt_boxes, labels = draw_objects(2, 100, 80, 640.0, device, generator)
    scores, boxes = draw_predictions(gt_boxes, grid_points(*grid, device)[:, :2], 80, dtype, generator)
    yield Sample("b2-g100-a8400", (scores * 8 - 6, boxes, *grid, None, gt_boxes, labels, *_SOFT, "mmdet"))
    yield Sample("simota-b2-g100-a8400", (scores, boxes, *grid, None, gt_boxes, labels, *_SIMOTA))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    grid = [12, 16, 6, 8, 3, 4], [8.0, 16.0, 32.0], [0.5] * 3
    points, classes = grid_points(*grid, device), 5
    kinds: dict[str, tuple[Any, ...]] = {name: (*_SOFT, name) for name in VARIANTS} | {"simota": _SIMOTA}

    def predictions(gt_boxes: Tensor, at: Tensor, count: int = classes) -> tuple[Tensor, Tensor]:
        return draw_predictions(gt_boxes, at[:, :2], count, dtype, generator)

    def as_taken(scores: Tensor, kind: str) -> Tensor:
        """Logits where the variant takes them."""
        return scores * 8 - 6 if kind in ("mmdet", "mmyolo") else scores

    for images, slots in ((2, 0), (1, 1), (2, 7), (1, 60)):
        gt_boxes, labels = draw_objects(images, slots, classes, 120.0, device, generator)
        scores, boxes = predictions(gt_boxes, points)
        yield Sample(f"b{images}-g{slots}", (scores * 8 - 6, boxes, *grid, None, gt_boxes, labels, *kinds["mmdet"]))
    gt_boxes, labels = draw_objects(2, 24, classes, 120.0, device, generator)
    scores, boxes = predictions(gt_boxes, points)
    # Objects that fit no location, or few, and predictions of other locations that fit them.
    tiny = gt_boxes.clone()
    tiny[:, :, 2:] = tiny[:, :, :2] + 6
    hidden = tiny[:, torch.randint(0, 3, (len(points),), generator=generator)]
    coarse, rounded = (scores * 3).round() / 3, gt_boxes.div(8).round() * 8
    alike = (points[:, :2].repeat(1, 2) + torch.tensor([-12.0, -12, 12, 12], device=device)).expand(2, -1, 4)
    strange, strange_labels = degenerate_objects(classes, device)
    nan, inf = float("nan"), float("inf")
    bad_scores, bad_boxes = scores[:1].clone(), boxes[:1].clone()
    bad_scores[0, 3:40:7], bad_scores[0, 4:60:9, 1] = nan, inf
    bad_boxes[0, 5:60:9], bad_boxes[0, 6:60:11, 2] = nan, inf
    for name, options in kinds.items():
        given = as_taken(scores, name)
        yield Sample(name, (given, boxes, *grid, None, gt_boxes, labels, *options))
        yield Sample(f"ties-{name}", (as_taken(coarse, name), alike, *grid, None, rounded, labels, *options))
        yield Sample(f"hidden-{name}", (given, hidden, *grid, None, tiny[:, :3], labels[:, :3], *options))
        bad = (as_taken(bad_scores, name), bad_boxes, *grid, None, strange, strange_labels)
        yield Sample(f"degenerate-{name}", (*bad, *options))
        alone = (given[:1], boxes[:1], *grid, None, strange[:, 6:7], strange_labels[:, 6:7])
        yield Sample(f"no-location-{name}", (*alone, *options))
    for topk in (1, 40, 300):
        options = (topk, 1.5, 0.7, 4.0, "mmdet")
        yield Sample(f"topk{topk}", (scores * 8 - 6, boxes, *grid, None, gt_boxes, labels, *options))
    narrow = (10, 2.0, 1.5, 0.4, "simota")
    yield Sample("small-radius", (scores, boxes, *grid, None, gt_boxes, labels, *narrow))
    # Class planes as a head has them; more classes than partial sums; logits that saturate.
    planes = (scores * 8 - 6).transpose(1, 2).contiguous().transpose(1, 2)
    yield Sample("class-planes", (planes, boxes, *grid, None, gt_boxes, labels, *kinds["mmdet"]))
    many, boxes_of_many = predictions(gt_boxes, points, 37)
    yield Sample("classes37", (many * 200 - 100, boxes_of_many, *grid, None, gt_boxes, labels, *kinds["mmdet"]))
    yield Sample("one-class", (many[..., :1], boxes_of_many, *grid, None, gt_boxes, labels.clamp(max=0), *_SIMOTA))
    yield Sample("zero-or-one", ((many * 2).round() / 2, boxes_of_many, *grid, None, gt_boxes, labels, *_SIMOTA))
    # Other grids, and points in any order.
    scattered = uniform((61, 4), device, torch.float32, generator, 4.0, 120.0)
    for name, at in (("points", scattered), ("grid-points", points), ("odd-strides", points * 1.5)):
        drawn = predictions(gt_boxes, at)
        for kind in ("mmdet", "simota"):
            given = as_taken(drawn[0], kind)
            yield Sample(f"{name}-{kind}", (given, drawn[1], [], [], [], at, gt_boxes, labels, *kinds[kind]))
    odd = [1, 30, 0, 5, 7, 3, 1, 1], [4.0, 8.0, 24.0, 100.0], [0.0, 0.5, 0.25, 0.5]
    drawn = predictions(gt_boxes, grid_points(*odd, device))
    for kind in ("mmyolo", "simota"):
        given = as_taken(drawn[0], kind)
        yield Sample(f"odd-grids-{kind}", (given, drawn[1], *odd, None, gt_boxes, labels, *kinds[kind]))


DYNAMIC_K = register(
    OpSpec(
        stem="dynamic_k",
        schema="(Tensor scores, Tensor boxes, int[] level_sizes, float[] strides, float[] center_offset,"
        " Tensor? points, Tensor gt_boxes, Tensor gt_labels, int topk, float iou_weight, float cls_weight,"
        " float center_radius, str cost) -> (Tensor labels, Tensor matched, Tensor iou)",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="assignment with a dynamic k: RTMDet's and NanoDet-Plus' soft labels, YOLOX's SimOTA",
        public=("dynamic_soft_label_assign", "simota_assign"),
    )
)


def assign(
    op: str,
    name: str,
    scores: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[tuple[int, int]] | None,
    strides: Sequence[float] | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    center_offset: float | Sequence[float],
    points: Tensor | None,
    cost: str,
    numbers: dict[str, float],
) -> Assignment:
    """Either of the functions below, `op`, which calls the scores `name`.

    `numbers` are how many overlaps k is the sum of, the weights of IoU and class, and the radius, by the names that the
    function has for them.
    """
    check_predictions(op, name, scores, boxes, gt_boxes, gt_labels)
    flat: list[int] = []
    stride_list: list[float] = []
    offsets: list[float] = []
    if points is None:
        flat, stride_list, offsets = check_grids(op, level_sizes, strides, center_offset, name, scores.shape[1])
    else:
        points = check_points(op, points, "[A, 4]", 4, scores, name)
    (count, topk), *others = numbers.items()
    found = DYNAMIC_K(
        device_type(scores),
        scores.detach(),
        boxes.detach().float(),
        flat,
        stride_list,
        offsets,
        points,
        gt_boxes.detach().float(),
        gt_labels.long(),
        min(checks.number(op, count, topk, 1, integer=True), MAX_CELLS),
        *(checks.number(op, argument, value, 0, checks.LARGEST) for argument, value in others),
        cost,
    )
    return Assignment(*found)


def dynamic_soft_label_assign(
    logits: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[tuple[int, int]] | None,
    strides: Sequence[float] | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    topk: int = 13,
    iou_weight: float = 3.0,
    soft_center_radius: float = 3.0,
    center_offset: float | Sequence[float] = 0.5,
    points: Tensor | None = None,
    variant: str = "mmdet",
) -> Assignment:
    r"""Assign locations to boxes by what it would cost to learn them, with the overlap as a soft label.

    Candidates are the locations inside any box of the image. The cost of a box and a candidate d strides away from the
    box's centre, where the predicted box has the overlap o with it, is

    .. math:: \sum_c |t_c - \sigma(x_c)|^2 \, \mathrm{BCE}(x_c, t_c) - w \log(o + 10^{-7}) + 10^{d - r}

    with t = o for the class of the box and 0 for the others. A box selects the k candidates of the least cost; k is
    the sum of the `topk` largest overlaps with it, cut to an integer and at least 1. A location that several boxes
    select goes to the box of the least cost. Lyu et al., RTMDet (arXiv 2212.07784), eqs. 1 to 4.

    Args:
        logits: fp32, fp16, bf16 or fp64 ``[B, A, C]`` of any strides: logits, but probabilities for "nanodet", where
            what is outside [0, 1] counts as the nearer end.
        boxes: floating ``[B, A, 4]`` xyxy in pixels; converted to fp32.
        level_sizes: (height, width) of each level, in cells; A in all, level by level, row by row. None with `points`.
        strides: pixels per cell of each level, > 0. None with `points`.
        gt_boxes: floating ``[B, G, 4]`` xyxy in pixels; converted to fp32. A box with a NaN or an infinity is ignored.
        gt_labels: integers ``[B, G]``, the class of each box. One outside [0, C) is padding, which is ignored;
            ``GFL_OPS_CHECK=1`` refuses one that is C or more.
        topk: how many overlaps k is the sum of, >= 1; fewer if there are fewer candidates.
        iou_weight: w, >= 0.
        soft_center_radius: r, in strides, >= 0.
        center_offset: position of a location within its cell, in cells; one number, or one per level. RTMDet's is 0.
        points: floating ``[A, 4]`` (x, y, stride, stride along y) in pixels, for locations on no grid, as mmdet has
            its priors; converted to fp32. On the CPU points that form grids cost little more than `level_sizes`.
        variant: "mmdet" (3.3). "mmyolo" (0.6): the sum is over the class of the box alone; overlaps of all locations
            count for k; if it exceeds the candidates, other locations follow, the lowest first. "nanodet"
            (NanoDet-Plus): no term of the distance.

    Returns:
        ``Assignment(labels, matched, iou)``, each ``[B, A]``: `labels` int64, the class of a positive, else −1;
        `matched` int64, the slot in [0, G) of its box, else −1; `iou` fp32, its overlap, which is the score to learn,
        else 0. `quality_focal_loss` takes ``(labels, iou)`` as they are.

    There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.
        NotImplementedError: on a GPU more than 16 levels or a `topk` over 512.

    Note:
        A candidate need not lie inside the box that selects it: a box with fewer candidates inside than k, a box
        between the locations as well, selects the cheapest of those inside other boxes, as in mmdet. In an image whose
        boxes contain no location nothing is positive (in "mmyolo" each box selects the lowest one). Arithmetic is
        fp32. Equal costs rank by the lower location, in a conflict by the lower slot, where mmdet leaves the order to
        torch's top-k; an overlap of NaN counts as 0, and a cost of NaN ranks last. Memory is O(A + G·k), nothing waits
        for the device, and all backends give the same bits. mmyolo lets padding take part in conflicts, this does not.
    """
    op = "dynamic_soft_label_assign"
    checks.choice(op, "variant", variant, VARIANTS)
    given = logits, boxes, level_sizes, strides, gt_boxes, gt_labels, center_offset, points, variant
    numbers = {"topk": topk, "iou_weight": iou_weight, "cls_weight": 1.0, "soft_center_radius": soft_center_radius}
    return assign(op, "logits", *given, numbers)


def simota_assign(
    scores: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[tuple[int, int]] | None,
    strides: Sequence[float] | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    center_radius: float = 2.5,
    candidate_topk: int = 10,
    iou_weight: float = 3.0,
    cls_weight: float = 1.0,
    center_offset: float | Sequence[float] = 0.5,
    points: Tensor | None = None,
) -> Assignment:
    r"""Assign locations to boxes by what it would cost to learn them, as YOLOX trains.

    Candidates are the locations inside any box of the image or within `center_radius` strides of the centre of any, in
    both directions. The cost of a box and a candidate, where the predicted box has the overlap o with it, is

    .. math:: v \sum_c \mathrm{BCE}(p_c, t_c) - w \log(o + 10^{-7}) + 10^5 \cdot [\text{not inside and near its centre}]

    with t = 1 for the class of the box and 0 for the others. A box selects the k candidates of the least cost; k is
    the sum of the `candidate_topk` largest overlaps with it, cut to an integer and at least 1. A location that several
    boxes select goes to the box of the least cost. Ge et al., YOLOX (arXiv 2107.08430), section 2.2; Ge et al., OTA
    (arXiv 2103.14259).

    Args:
        scores: fp32, fp16, bf16 or fp64 ``[B, A, C]`` of any strides: probabilities, in YOLOX those of the class times
            that of an object, or their root; outside [0, 1] counts as the nearer end.
        boxes, level_sizes, strides, gt_boxes, gt_labels, center_offset, points: as in `dynamic_soft_label_assign`.
        center_radius: in strides, >= 0.
        candidate_topk: how many overlaps k is the sum of, >= 1; fewer if there are fewer candidates.
        iou_weight: w, >= 0.
        cls_weight: v, >= 0.

    Returns:
        ``Assignment(labels, matched, iou)``, each ``[B, A]``, as `dynamic_soft_label_assign`.

    There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.
        NotImplementedError: on a GPU more than 16 levels or a `candidate_topk` over 512.

    Note:
        What `dynamic_soft_label_assign` notes of boxes with few candidates, ties, NaN and memory holds here too. The
        penalty of 10^5 rounds the costs that it is added to to 1/128, as in mmdet, so that ties are common where a box
        has fewer than k candidates of its own; a logarithm is −100 at least.
    """
    given = scores, boxes, level_sizes, strides, gt_boxes, gt_labels, center_offset, points, "simota"
    numbers = {
        "candidate_topk": candidate_topk,
        "iou_weight": iou_weight,
        "cls_weight": cls_weight,
        "center_radius": center_radius,
    }
    return assign("simota_assign", "scores", *given, numbers)
