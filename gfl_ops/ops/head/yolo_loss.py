# SPDX-License-Identifier: Apache-2.0
"""The whole loss of a YOLO head: task-aligned assignment, class cross entropy, CIoU and distribution focal loss.

The operator, whose assignment is made, serves RTMDet's loss too (rtmdet_loss.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, detached
from ...core.random_inputs import uniform
from ...core.registry import OnePass, OpSpec, Sample, register
from ..bins.decode import DECODE
from ..bins.integral import MAX_REG_MAX, bounded_logits, expectation
from ..boxes.distance import box_of, reference_box_to_distance
from ..boxes.iou import full_ciou
from ..boxes.iou import reference as box_loss
from ..score.terms import absolute_power, binary_cross_entropy
from .atss import check_strides
from .gfl_loss import distribution_losses, positives, rows
from .head_inputs import (
    check_gt_boxes,
    check_gt_labels,
    check_maps,
    check_weights,
    draw_head,
    with_one_accumulator,
)
from .one_pass import define_head_loss
from .task_aligned import TASK_ALIGNED
from .task_aligned_reference import locations, scores_in_double

OP = "yolo_loss"
# As ultralytics' and mmdet's: of the overlaps, of the assigner's normalisation, and how far a target stays below the
# last bin.
IOU_EPS = {"yolo": 1e-7, "rtmdet": 1e-6}
ALIGNMENT_EPS = 1e-9
TARGET_MARGIN = 0.01
MAX_BINS = MAX_REG_MAX + 1


class YoloLoss(NamedTuple):
    """The scalars that `yolo_loss` returns; see there."""

    box: Tensor
    cls: Tensor
    dfl: Tensor
    num_pos: Tensor
    score_sum: Tensor


def joined(maps: Sequence[Tensor]) -> Tensor:
    """``[B, channels, A]`` of the maps of all levels, or of the one that is that already."""
    return maps[0] if maps[0].dim() == 3 else torch.cat([m.flatten(2) for m in maps], 2)


def cell_strides(level_sizes: Sequence[int], strides: Sequence[float], like: Tensor) -> Tensor:
    """Pixels per cell of every location, ``[A]``."""
    cells = zip(level_sizes[::2], level_sizes[1::2], strides)
    return torch.cat([like.new_full((height * width,), stride) for height, width, stride in cells])


def reference(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    level_sizes: Sequence[int],
    strides: Sequence[float],
    center_offset: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    scores: Tensor,
    gt_boxes: Tensor,
    bins: int,
    gains: Sequence[float],
    beta: float,
    head: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All locations at once, with those masked that are not positive; in fp32, or in fp64 for fp64 maps."""
    logits = rows(joined(cls_scores))
    images, count, classes = logits.shape
    acc = accumulator(logits.dtype)
    slots = gt_boxes.shape[1]
    positive = positives(labels, matched, classes, slots)
    counted = labels != -2
    weight = torch.where(positive, scores, 0.0)
    rtmdet = head == "rtmdet"

    # Masked before any arithmetic, so that no NaN outside the positives reaches a gradient.
    sides = rows(joined(reg_preds)).unflatten(2, (4, bins))
    if bins == 1:
        distance = torch.where(positive[..., None], sides[..., 0].to(acc), 0.0)
    else:
        sides = torch.where(positive[..., None, None], bounded_logits(sides), 0.0)
        distance = expectation(sides)
    centre = locations(level_sizes, [1.0] * len(strides), center_offset, logits.device).to(acc)
    stride = cell_strides(level_sizes, strides, centre)[:, None]
    # One more slot, for locations without a box.
    boxes = torch.cat([gt_boxes.to(acc), gt_boxes.new_zeros((images, 1, 4), dtype=acc)], 1)
    slot = torch.where(positive, matched, slots)[..., None].expand(-1, -1, 4)
    target = boxes.gather(1, slot)
    # YOLO's distances are in cells, RTMDet's in pixels.
    centre, target = (centre * stride, target) if rtmdet else (centre, target / stride)
    pair = box_of(centre, distance, None).flatten(0, 1), target.flatten(0, 1)
    box = box_loss(*pair, "giou", IOU_EPS[head]) if rtmdet else full_ciou(*pair, IOU_EPS[head])
    from_centre = reference_box_to_distance(centre, target, None, 0.0)
    if rtmdet:
        dfl = (distance.nan_to_num(0.0) * 0.0).sum(-1)  # none, but attached to the graph
    elif bins == 1:
        image_size = torch.tensor(level_sizes[1::-1], dtype=acc, device=logits.device) * strides[0]
        dfl = ((distance - from_centre).abs() * stride / image_size.repeat(2)).mean(-1)
    else:
        dfl = distribution_losses(sides, from_centre, TARGET_MARGIN)

    is_label = positive[..., None] & (labels[..., None] == torch.arange(classes, device=labels.device))
    x = torch.where(counted[..., None], logits.to(acc), 0.0)
    learnt = torch.where(is_label, scores[..., None], 0.0)
    p, entropy = binary_cross_entropy(x, learnt, activated=False)
    if rtmdet:
        entropy = absolute_power(learnt - p, beta) * entropy
    cls = torch.where(counted, entropy.sum(-1), 0.0).sum()
    box = torch.where(positive, box.view(images, count) * weight, 0.0).sum()
    dfl = torch.where(positive, dfl * weight, 0.0).sum()
    norm = weight.sum().clamp(min=1)
    # Not numbers of Python, which turn the tangent of a single number into fp64 under torch.func.
    losses = [torch.full_like(norm, gain) * loss / norm for gain, loss in zip(gains, (cls, box, dfl))]
    return losses[0], losses[1], losses[2], positive.sum().to(acc), weight.sum()


def fake(cls_scores: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = [cls_scores[0].new_empty((), dtype=accumulator(cls_scores[0].dtype)) for _ in range(5)]
    return scalar[0], scalar[1], scalar[2], scalar[3], scalar[4]


def samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, large: bool = False
) -> Iterator[Sample]:
    acc = accumulator(dtype)

    def drawn(images: int, classes: int, bins: int, sizes: list[tuple[int, int]], *others: Any) -> list:
        """Maps, and an assignment that ignores geometry."""
        head = draw_head(device, dtype, generator, images, classes, 4 * bins, sizes, *others)
        maps, sides, strides, labels, matched, gt = head
        scores = uniform(tuple(labels.shape), device, acc, generator)
        flat, half = [n for size in sizes for n in size], [0.5] * len(sizes)
        gains = [0.5, 7.5, 1.5], 2.0, "yolo"
        return [maps, sides, flat, strides, half, labels, matched, scores, gt, bins, *gains]

    if large:
        # More tiles than the threads that add up their sums.
        yield Sample("b4-a17171", tuple(drawn(4, 2, 3, [(131, 129), (17, 16)], 9)))
        return
    pyramid = [(9, 14), (5, 7), (3, 4)]
    # "detached": α of CIoU is constant to the gradient, but not to a numerical difference.
    yield Sample("background", tuple(drawn(1, 3, 2, [(3, 4), (2, 2)], 0, 0.0)))
    yield Sample("background-with-boxes", tuple(drawn(2, 7, 16, [(6, 6)], 3, 0.0)))
    yield Sample("detached-small", tuple(drawn(1, 3, 3, [(3, 4), (2, 2)], 2)))
    case = drawn(2, 80, 16, pyramid, 7)
    yield Sample("detached-pyramid", tuple(case))
    yield Sample("detached-joined", ([joined(case[0])], [joined(case[1])], *case[2:]))
    both = torch.cat([joined(case[1]), joined(case[0])], 1)
    yield Sample("detached-channels-of-one-map", ([both[:, 64:]], [both[:, :64]], *case[2:]))
    channels_last = [[m.contiguous(memory_format=torch.channels_last) for m in maps] for maps in case[:2]]
    yield Sample("detached-channels-last", (*channels_last, *case[2:]))
    yield Sample("detached-distances", tuple(drawn(2, 20, 1, pyramid, 5)))
    distances = drawn(1, 5, 1, pyramid, 3)
    yield Sample("detached-distances-joined", ([joined(distances[0])], [joined(distances[1])], *distances[2:]))
    yield Sample("detached-one-cell", tuple(drawn(1, 1, 2, [(1, 1)], 1, 1.0)))
    yield Sample("detached-long-rows", tuple(drawn(1, 5, 8, [(3, 401)], 3)))
    yield Sample("detached-all-positive", tuple(drawn(3, 20, 9, [(4, 4), (2, 2)], 5, 0.95)))
    yield Sample("detached-images0", tuple(drawn(0, 3, 3, [(3, 4), (2, 2)], 2)))
    unaligned = drawn(1, 3, 4, [(5, 5)], 2)
    unaligned[7] = unaligned[7] * 0
    yield Sample("detached-no-score", tuple(unaligned))
    extreme = drawn(2, 7, 5, [(6, 6)], 3)
    extreme[:2] = [[(m * 2000).clamp(-1e4, 1e4) for m in maps] for maps in extreme[:2]]
    yield Sample("detached-extreme", tuple(extreme))
    for beta in (2.0, 1.5):
        rtmdet = drawn(2, 20, 1, pyramid, 5)
        sides = [(m.double().abs() * stride).to(dtype) for m, stride in zip(rtmdet[1], rtmdet[3])]
        rest = [1.0, 2.0, 0.0], beta, "rtmdet"
        yield Sample(f"rtmdet-beta{beta}", (rtmdet[0], sides, *rtmdet[2:4], [0.0] * 3, *rtmdet[5:10], *rest))


_SCHEMA = (
    "(Tensor[] cls_scores, Tensor[] reg_preds, int[] level_sizes, float[] strides, float[] center_offset,"
    " Tensor labels, Tensor matched, Tensor scores, Tensor gt_boxes, int bins, float[] gains, float beta, str head)"
    " -> (Tensor cls, Tensor box, Tensor dfl, Tensor num_pos, Tensor score_sum)"
)
head_loss = define_head_loss(OP, _SCHEMA)

# With the assignment made: one map for each level, or one [B, channels, A] of all; gains as the results, class first.
# `beta` is of RTMDet's class loss, which has one bin and no third loss.
YOLO_LOSS = register(
    OpSpec(
        stem=OP,
        schema=_SCHEMA,
        reference=reference,
        fake=fake,
        samples=samples,
        large=functools.partial(samples, large=True),
        one_pass=OnePass(head_loss, ("cls_scores", "reg_preds")),
        summary="the whole loss of a YOLO or an RTMDet head, its assignment made",
        public=(OP, "rtmdet_loss"),
        differentiable=("cls_scores", "reg_preds"),
        grad_outputs=(0, 1, 2),
    )
)


def decoded_boxes(
    reg_preds: Sequence[Tensor], level_sizes: Sequence[int], strides: Sequence[float], bins: int
) -> Tensor:
    """The predicted boxes of all locations in pixels, ``[B, A, 4]`` in the accumulator's dtype."""
    first = reg_preds[0]
    acc = accumulator(first.dtype)
    points = locations(level_sizes, strides, [0.5] * len(strides), first.device).to(acc)
    scale, found, start = cell_strides(level_sizes, strides, points), [], 0
    for each in reg_preds:
        pred = rows(detached(each).flatten(2))
        images, count = pred.shape[:2]
        here = slice(start, start + count)
        start += count
        if bins == 1:
            found.append(box_of(points[here], pred.to(acc) * scale[here, None], None))
        else:
            at, scaled = points[here].expand(images, count, 2), scale[here].expand(images, count)
            found.append(DECODE(first.device.type, pred, at, scaled, bins - 1, None))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def assigned_loss(
    cls_scores: list[Tensor],
    reg_preds: list[Tensor],
    level_sizes: list[int],
    strides: list[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    bins: int,
    topk: int,
    topk2: int,
    alpha: float,
    beta: float,
    gains: Sequence[float],
    min_side: float,
) -> YoloLoss:
    """`yolo_loss` of checked arguments, whose maps may also be one ``[B, channels, A]`` of all levels."""
    acc = accumulator(cls_scores[0].dtype)
    device = cls_scores[0].device.type
    boxes = decoded_boxes(reg_preds, level_sizes, strides, bins)
    # As logits, of which the assigner reads few: probabilities of all would be as large as the maps.
    logits = rows(joined([detached(m) for m in cls_scores]))
    half = [0.5] * len(strides)
    gt_boxes = gt_boxes.detach()
    options = topk, topk2, alpha, beta, min_side, ALIGNMENT_EPS, "ultralytics", True, True
    pixels = gt_boxes.float()
    labels, matched, learnt = TASK_ALIGNED(
        device, logits, boxes.float(), level_sizes, strides, half, None, pixels, gt_labels, *options
    )
    if acc == torch.float64 and gt_boxes.shape[1]:
        slot = matched.clamp(min=0)
        gt = pixels.gather(1, slot[..., None].expand(-1, -1, 4))
        score = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0].sigmoid()
        learnt = scores_in_double(
            "ciou", score, boxes.float(), gt, labels >= 0, slot, gt_boxes.shape[1], alpha, beta, ALIGNMENT_EPS
        )
    cls, box, dfl, num_pos, score_sum = head_loss(
        cls_scores,
        reg_preds,
        level_sizes,
        strides,
        half,
        labels,
        matched,
        learnt.to(acc),
        gt_boxes.to(acc),
        bins,
        [gains[1], gains[0], gains[2]],
        0.0,
        "yolo",
    )
    return YoloLoss(box, cls, dfl, num_pos.detach(), score_sum.detach())


def yolo_loss(
    reg_preds: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    bins: int = 16,
    topk: int = 10,
    topk2: int | None = None,
    alpha: float = 0.5,
    beta: float = 6.0,
    gains: Sequence[float] = (7.5, 0.5, 1.5),
    min_side: float | None = None,
) -> YoloLoss:
    r"""The whole loss of a YOLO head (v8 to 26): boxes, classes and distributions, weighted and normalised.

    .. math::
        L_{box} = \frac{g_0}{n} \sum_{\text{positives}} s \, (1 - \mathrm{CIoU}), \quad
        L_{cls} = \frac{g_1}{n} \sum_{\text{locations}} \mathrm{BCE}, \quad
        L_{dfl} = \frac{g_2}{n} \sum_{\text{positives}} s \, \frac14 \sum_{\text{sides}} \mathrm{DFL}, \quad
        n = \max \Big( \sum s, 1 \Big)

    The boxes are decoded and `task_aligned_assign` assigns the locations; s is the score that it gives a positive,
    which its class learns, while all other classes learn 0. What ultralytics 8.4's v8DetectionLoss gives as its loss
    items (8.3's with ``min_side=0``). Its end-to-end losses are sums of two calls, one for each of the heads:
    ``topk=10``, and ``topk=7, topk2=1``.

    Args:
        reg_preds: one tensor per level, fp32, fp16, bf16 or fp64 ``[B, 4·bins, H, W]``: distribution logits, sides
            left, top, right, bottom, bins innermost; with one bin the distances themselves, in cells.
        cls_scores: one tensor per level ``[B, C, H, W]``: class logits. The dtype may differ from that of `reg_preds`.
            Any memory format.
        strides: pixels per cell of each level, > 0. Centres lie in the middle of their cells.
        gt_boxes: ``[B, G, 4]`` xyxy in pixels.
        gt_labels: integer ``[B, G]``, in [0, C); a slot with any other label, −1 for padding, holds no box, nor does
            one with a coordinate that is not finite.
        bins: per side, 1 to 129: 16 in YOLOv8 to 12, 1 in YOLO26. With one bin the third loss is the L1 error of the
            distances, in widths and heights of the image, which is the first level's cells times their stride.
        topk, topk2, alpha, beta: of `task_aligned_assign`.
        gains: g, of the box, class and distribution loss.
        min_side: sides below it count as that long where candidates are found; the second stride by default (the first
            if there is one).

    Returns:
        ``YoloLoss(box, cls, dfl, num_pos, score_sum)``: the three losses, not multiplied by B as ultralytics' total is,
        the number of positives and Σ s, as scalars on the maps' device; fp32, or fp64 for fp64 maps.

    The gradient reaches `reg_preds` and `cls_scores`, through the losses alone: not through the assignment, s or n, nor
    through the factor of CIoU's last term.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Arithmetic in fp32 (fp64 for fp64, but for the assigner's decisions), whatever autocast says. Repeatable bit for
        bit; nothing waits for the device, and no target ``[B, A, C]`` is made. Without positives `box` and `dfl` are 0
        and still attached to the graph. Gradients have the memory format of the maps. A target beyond the last bin
        counts as `bins` − 1.01.
    """
    bins = checks.number(OP, "bins", bins, 1, MAX_BINS, integer=True)
    images, classes = check_maps(OP, cls_scores, reg_preds, "4·bins", 4 * bins)
    first = cls_scores[0]
    stride_list = check_strides(OP, strides, len(cls_scores))
    check_gt_boxes(OP, gt_boxes, images, first)
    check_gt_labels(OP, gt_labels, gt_boxes, "cls_scores", first, classes)
    topk = checks.number(OP, "topk", topk, 1, integer=True)
    topk2 = topk if topk2 is None else checks.number(OP, "topk2", topk2, 1, integer=True)
    if min_side is None:
        min_side = stride_list[min(1, len(stride_list) - 1)]
    cls_maps, reg_maps, acc = with_one_accumulator(cls_scores, reg_preds)
    return assigned_loss(
        cls_maps,
        reg_maps,
        [n for m in cls_maps for n in m.shape[2:]],
        stride_list,
        gt_boxes,
        gt_labels.long(),
        bins=bins,
        topk=topk,
        topk2=topk2,
        alpha=checks.number(OP, "alpha", alpha, 0, checks.LARGEST),
        beta=checks.number(OP, "beta", beta, 0, checks.LARGEST, exclusive=True),
        gains=check_weights(OP, "gains", gains, "three", acc),
        min_side=checks.number(OP, "min_side", min_side, 0, checks.LARGEST),
    )
