# SPDX-License-Identifier: Apache-2.0
"""Adaptive training sample selection: which location learns which ground-truth box."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import device_type
from ...core.random_inputs import boxes as draw_boxes
from ...core.registry import OpSpec, Sample, register
from ..boxes import box_ops

# (box, cell) pairs whose distances are in memory at a time.
_PAIRS = 1 << 23
# The key of an absent cell: larger than that of any distance.
_ABSENT = torch.iinfo(torch.int64).max


class Assignment(NamedTuple):
    """What `atss_assign` returns for every location; see there."""

    labels: Tensor
    matched: Tensor
    iou: Tensor


def centres(height: int, width: int, stride: float, offset: float, legacy: bool, device: torch.device) -> Tensor:
    """Centres ``[height·width, 2]`` (x, y) of a level's cells in pixels, fp32, row by row."""
    shift = (stride - 1) / 2 if legacy else 0.0
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride + shift
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride + shift
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 2)


def inside_valid(height: int, width: int, stride: float, valid_size: Tensor) -> Tensor:
    """Which of a level's cells ``[height·width]`` lie in ceil(valid/stride) rows and columns, of (h, w)."""
    # A tensor, since torch multiplies by the reciprocal of a plain number on a GPU, where 30/10 would exceed 3.
    count = (valid_size / torch.full_like(valid_size, stride)).ceil()
    rows = torch.arange(height, device=valid_size.device) < count[0]
    columns = torch.arange(width, device=valid_size.device) < count[1]
    return (rows[:, None] & columns).reshape(-1)


def _nearest(points: Tensor, present: Tensor, gt_boxes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices ``[G, k]`` of the k nearest points by rank, and which of them are present.

    A non-negative float orders as its bits do, so distance and index make one integer without ties.
    """
    centre = (gt_boxes[:, :2] + gt_boxes[:, 2:]) * 0.5
    index = torch.arange(points.shape[0], device=points.device)
    keys = []
    for part in centre.split(max(1, _PAIRS // max(1, points.shape[0]))):
        difference = points - part[:, None]
        difference = difference * difference
        distance = difference[..., 0] + difference[..., 1]
        key = (distance.view(torch.int32).long() << 32) | index
        keys.append(torch.where(present, key, _ABSENT).topk(k, dim=1, largest=False).values)
    key = torch.cat(keys)
    return torch.where(key == _ABSENT, 0, key & 0xFFFFFFFF), key != _ABSENT


def _threshold(iou: Tensor, present: Tensor) -> Tensor:
    """Mean plus unbiased deviation over the columns that are present, summed in fp64 from left to right."""
    values = torch.where(present, iou, 0.0).double()
    count = present.sum(1).double()
    total = torch.zeros_like(count)
    for column in values.unbind(1):
        total = total + column
    mean = total / count
    squares = torch.zeros_like(count)
    for column, there in zip(values.unbind(1), present.unbind(1)):
        difference = column - mean
        squares = squares + torch.where(there, difference * difference, 0.0)
    return mean.float() + (squares / (count - 1)).sqrt().float()


def _assign_image(
    levels: list[tuple[int, int, float, Tensor]],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    valid_size: Tensor | None,
    topk: int,
    anchor_scale: float,
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    device = gt_boxes.device
    slots = gt_boxes.shape[0]
    present, location, iou, there, inside = [], [], [], [], []
    start = 0
    for height, width, stride, points in levels:
        cells = height * width
        if valid_size is None:
            valid = torch.ones(cells, dtype=torch.bool, device=device)
        else:
            valid = inside_valid(height, width, stride, valid_size)
        present.append(valid)
        if cells and slots:
            index, real = _nearest(points, valid, gt_boxes, min(topk, cells))
            centre = points[index]
            half = (anchor_scale * stride - 1) / 2 if legacy else anchor_scale * stride / 2
            prior = torch.cat([centre - half, centre + half], -1)
            intersection, union = box_ops.overlap(prior, gt_boxes[:, None], legacy)
            margin = torch.cat([centre - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - centre], -1)
            location.append(index + start)
            iou.append(intersection / union.clamp(min=1e-6))
            there.append(real)
            inside.append((margin > 0.01).all(-1))
        start += cells

    outside = torch.where(torch.cat(present), -1, -2) if levels else torch.empty(0, dtype=torch.int64, device=device)
    nothing = torch.full((start,), -1, dtype=torch.int64, device=device), torch.zeros(start, device=device)
    if not location:
        return outside, *nothing
    place, overlap, real = torch.cat(location, 1), torch.cat(iou, 1), torch.cat(there, 1)
    usable = (gt_labels >= 0) & torch.isfinite(gt_boxes).all(1)
    positive = real & torch.cat(inside, 1) & (overlap >= _threshold(overlap, real)[:, None]) & usable[:, None]

    # A location goes to the largest IoU, then to the lowest slot that reaches it; an extra cell takes what is not
    # positive.
    place = torch.where(positive, place, start).reshape(-1)
    overlap = torch.where(positive, overlap, -1.0).reshape(-1)
    best = torch.full((start + 1,), -1.0, device=device).scatter_reduce(0, place, overlap, "amax")
    slot = torch.arange(slots, device=device)[:, None].expand_as(positive).reshape(-1)
    slot = torch.where(overlap == best[place], slot, slots)
    winner = torch.full((start + 1,), slots, device=device).scatter_reduce(0, place, slot, "amin")[:start]
    best = best[:start]
    taken = best >= 0
    matched = torch.where(taken, winner, -1)
    labels = torch.where(taken, gt_labels[matched.clamp(min=0)], outside)
    return labels, matched, torch.where(taken, best, 0.0)


def reference(
    level_sizes: Sequence[int],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    valid_sizes: Tensor | None,
    topk: int,
    anchor_scale: float,
    center_offset: Sequence[float],
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every distance of every box to every cell, image by image, in fp32."""
    levels = [
        (height, width, stride, centres(height, width, stride, offset, legacy, gt_boxes.device))
        for height, width, stride, offset in zip(level_sizes[::2], level_sizes[1::2], strides, center_offset)
    ]
    images = [
        _assign_image(
            levels,
            gt_boxes[b],
            gt_labels[b],
            None if valid_sizes is None else valid_sizes[b],
            topk,
            anchor_scale,
            legacy,
        )
        for b in range(gt_boxes.shape[0])
    ]
    if not images:
        return fake(level_sizes, strides, gt_boxes, gt_labels, valid_sizes, topk, anchor_scale, center_offset, legacy)
    labels, matched, iou = zip(*images)
    return torch.stack(labels), torch.stack(matched), torch.stack(iou)


def fake(
    level_sizes: Sequence[int],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    valid_sizes: Tensor | None,
    topk: int,
    anchor_scale: float,
    center_offset: Sequence[float],
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (gt_boxes.shape[0], sum(h * w for h, w in zip(level_sizes[::2], level_sizes[1::2])))
    return gt_labels.new_empty(shape), gt_labels.new_empty(shape), gt_boxes.new_empty(shape)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    sizes, strides = [20, 30, 10, 15, 5, 8, 3, 4, 2, 2], [8.0, 16.0, 32.0, 64.0, 128.0]
    zero = [0.0] * 5

    def drawn(images: int, slots: int) -> tuple[Tensor, Tensor]:
        found = draw_boxes(images * slots, device, dtype, generator, extent=240.0).reshape(images, slots, 4)
        labels = torch.randint(-1, 80, (images, slots), generator=generator).to(device)
        return found, labels

    for images, slots in ((2, 0), (1, 1), (3, 7), (1, 300)):
        yield Sample(f"b{images}-g{slots}", (sizes, strides, *drawn(images, slots), None, 9, 8.0, zero, False))
    valid = torch.tensor([[160.0, 240.0], [97.0, 131.0], [0.0, 50.0]], device=device)
    yield Sample("valid-sizes", (sizes, strides, *drawn(3, 9), valid, 9, 8.0, zero, False))
    yield Sample("legacy", (sizes, strides, *drawn(2, 9), None, 9, 8.0, zero, True))
    yield Sample("centre-offset", (sizes, strides, *drawn(2, 9), valid[:2], 9, 8.0, [0.5, 0.5, 0.25, 0.0, 0.5], False))
    # Integer corners put several cells at exactly the same distance.
    rounded, labels = drawn(2, 40)
    yield Sample("distance-ties", (sizes, strides, rounded.round(), labels, None, 9, 8.0, zero, False))
    yield Sample("iou-ties", (sizes, strides, rounded.repeat(1, 2, 1), labels.repeat(1, 2), None, 9, 8.0, zero, False))
    odd = [30, 1, 1, 30, 7, 11, 0, 5, 1, 1]
    for topk in (1, 4, 25):
        yield Sample(f"odd-levels-topk{topk}", (odd, strides, *drawn(2, 9), None, topk, 8.0, zero, False))
    yield Sample("one-candidate", ([7, 11], [8.0], *drawn(2, 9), None, 1, 8.0, [0.0], False))
    nan, inf = float("nan"), float("inf")
    strange = [
        [5.0, 5, 5, 5],
        [90, 90, 20, 20],
        [0, 0, 1e30, 1e30],
        [-1e38, 3, 3e38, 9],
        [nan, 0, 9, 9],
        [0, 0, inf, 9],
        [1e6, 1e6, 1e6 + 64, 1e6 + 64],
        [-300, -300, -200, -200],
    ]
    labels = torch.arange(8, device=device)[None]
    yield Sample(
        "degenerate", (sizes, strides, torch.tensor([strange], device=device), labels, None, 9, 8.0, zero, False)
    )


ATSS = register(
    OpSpec(
        stem="atss",
        schema="(int[] level_sizes, float[] strides, Tensor gt_boxes, Tensor gt_labels, Tensor? valid_sizes, int topk,"
        " float anchor_scale, float[] center_offset, bool legacy) -> (Tensor labels, Tensor matched, Tensor iou)",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="adaptive training sample selection over a pyramid of grids",
        public=("atss_assign",),
        dtypes=(torch.float32,),
    )
)


def per_level(op: str, argument: str, value: object, levels: int) -> list[float]:
    """A number, or one per level, as a list of floats."""
    values: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value] * levels
    if len(values) != levels:
        raise ValueError(checks.message(op, argument, f"must hold one number per level, {levels}", len(values)))
    for item in values:
        checks.number(op, argument, item)
    return [float(v) for v in values]


def check_level_sizes(op: str, level_sizes: object) -> list[int]:
    """Heights and widths of all levels, one after another."""
    if not isinstance(level_sizes, (tuple, list)):
        rule = "must be a list of (height, width) pairs"
        raise TypeError(checks.message(op, "level_sizes", rule, type(level_sizes).__name__))
    for item in level_sizes:
        if not isinstance(item, (tuple, list, torch.Size)) or len(item) != 2:
            raise ValueError(checks.message(op, "level_sizes", "must hold (height, width) pairs", repr(item)))
        for size in item:
            checks.number(op, "level_sizes", size, 0, integer=True)
    return [size for item in level_sizes for size in item]


def check_strides(op: str, strides: object, levels: int, of: str) -> list[float]:
    if not isinstance(strides, (tuple, list)):
        raise TypeError(checks.message(op, "strides", "must be a list of numbers", type(strides).__name__))
    if len(strides) != levels:
        raise ValueError(
            checks.message(op, "strides", f"must hold one number for each of `{of}`, {levels}", len(strides))
        )
    for stride in strides:
        checks.number(op, "strides", stride, 0, exclusive=True)
    return [float(s) for s in strides]


def atss_assign(
    level_sizes: Sequence[tuple[int, int]],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    valid_sizes: Tensor | None = None,
    topk: int = 9,
    anchor_scale: float = 8.0,
    center_offset: float | Sequence[float] = 0.0,
    legacy: bool = False,
) -> Assignment:
    r"""Assign each location of a pyramid to a ground-truth box, to the background, or to neither.

    A box's candidates are, on every level, the `topk` cells whose centres are nearest to its own. Those are positive
    whose prior, a square of side :math:`a \cdot s` around the cell's centre, has

    .. math:: \mathrm{IoU} \ge \operatorname{mean} + \operatorname{std}

    of the IoUs of all of the box's candidates (std unbiased), and whose centre lies inside the box by more than 0.01
    pixels. Algorithm 1 of Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive
    Training Sample Selection, CVPR 2020 (arXiv 1912.02424).

    Args:
        level_sizes: (height, width) of each level, in cells.
        strides: pixels per cell of each level, > 0.
        gt_boxes: fp32, fp16, bf16 or fp64 ``[B, G, 4]`` xyxy in pixels; converted to fp32. A box with a NaN or an
            infinity is ignored.
        gt_labels: integers ``[B, G]``, the class of each box; negative for padding, which is ignored.
        valid_sizes: ``[B, 2]`` (h, w) in pixels: only the first ``ceil(h/stride)`` rows and ``ceil(w/stride)``
            columns of each level take part. All do by default.
        topk: candidates per level, >= 1; fewer if the level has fewer valid cells.
        anchor_scale: side of a prior in strides, > 0.
        center_offset: position of a centre within its cell, in cells; one number, or one per level.
        legacy: GFocal v1's geometry: centres (stride − 1)/2 pixels further, widths and heights + 1.

    Returns:
        ``Assignment(labels, matched, iou)`` over the A cells of all levels, level by level, row by row: `labels` int64
        ``[B, A]``, the class of a positive, −1 for background, −2 for a cell outside `valid_sizes`; `matched` int64
        ``[B, A]``, the slot in [0, G) of its box, else −1; `iou` fp32 ``[B, A]`` with that box, else 0.

    There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Cells at equal distances rank by lower index; a location that several boxes want goes to the larger IoU, then
        to the lower slot. IoUs are fp32, their mean and deviation summed in fp64 in the order of the candidates: all
        backends give the same indices. A box with a single candidate in all has no deviation and gets no location.
        Differs from mmdet's, which leaves the order of equal distances to its sort.
    """
    op = "atss_assign"
    flat = check_level_sizes(op, level_sizes)
    levels = len(level_sizes)
    stride_list = check_strides(op, strides, levels, "level_sizes")
    offsets = per_level(op, "center_offset", center_offset, levels)
    checks.tensor(op, "gt_boxes", gt_boxes)
    checks.shape(op, "gt_boxes", gt_boxes, "[B, G, 4]", (None, None, 4))
    checks.tensor(op, "gt_labels", gt_labels, checks.INTEGER)
    checks.shape(op, "gt_labels", gt_labels, "[B, G]", tuple(gt_boxes.shape[:2]))
    checks.same_device(op, "gt_labels", gt_labels, "gt_boxes", gt_boxes)
    if valid_sizes is not None:
        checks.tensor(op, "valid_sizes", valid_sizes, checks.FLOATING + checks.INTEGER)
        checks.shape(op, "valid_sizes", valid_sizes, "[B, 2]", (gt_boxes.shape[0], 2))
        checks.same_device(op, "valid_sizes", valid_sizes, "gt_boxes", gt_boxes)
        valid_sizes = valid_sizes.detach().float()
    checks.number(op, "topk", topk, 1, integer=True)
    checks.number(op, "anchor_scale", anchor_scale, 0, exclusive=True)
    return Assignment(
        *ATSS(
            device_type(gt_boxes),
            flat,
            stride_list,
            gt_boxes.detach().float(),
            gt_labels.long(),
            valid_sizes,
            topk,
            float(anchor_scale),
            offsets,
            legacy,
        )
    )
