# SPDX-License-Identifier: Apache-2.0
"""Greedy non-maximum suppression in Triton, of one class or class by class.

    boxes  [N, 4] fp32, fp16, bf16, fp64  read, any strides      scores [N] any float  read      idxs [N] int64  read
    result [K]    int64                   write: kept boxes by falling score, equal scores by lower index

torch sorts by score and, with classes, once more by class, so that each class is one segment in the order of its
scores; then one kernel does all segments. A program takes one segment after another and walks over it in tiles of TILE
boxes: it tests the tile against the boxes kept so far, then its boxes among themselves, and appends what is left to
the kept list. Within a tile all boxes are decided at once, by repeating keep(j) = no kept i before j suppresses j
until nothing changes: the greedy choice is the one fixed point, and it is reached after as many rounds as the longest
chain of suppressions. A segment of more than CHAIN boxes is walked in panels of PANEL instead: a program decides a
panel, then the whole grid clears further on what its kept boxes suppress. Memory is O(N). IoU as csrc/terms/box.h, in
fp32 (fp64 for fp64), without fused multiply-adds and with IEEE division: the same indices as on every other backend,
and bit for bit the same in every run. Only the size of the result makes the host wait, and with more than CHAIN boxes
of several classes, which of these are large."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from ..ops.boxes.box_ops import rounded
from . import launch

TILE = 64
# Beyond CHAIN boxes one program is slower than two launches per panel.
CHAIN, PANEL = 4096, 1024
# Enough to fill a large GPU twice; further segments queue behind.
MAX_PROGRAMS = 8 if launch.INTERPRETS else 264


@triton.jit
def _load_boxes(boxes, at, mask, n):
    """The four corners, each [TILE], of boxes [4, n]."""
    x1 = tl.load(boxes + at, mask=mask, other=0.0)
    y1 = tl.load(boxes + n + at, mask=mask, other=0.0)
    x2 = tl.load(boxes + 2 * n + at, mask=mask, other=0.0)
    y2 = tl.load(boxes + 3 * n + at, mask=mask, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _exceeds(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2, THRESHOLD: tl.constexpr, OFFSET: tl.constexpr):
    """Whether IoU > THRESHOLD, for every a (first axis) with every b (second axis); never where it is NaN."""
    area_a = (((ax2 - ax1) + OFFSET) * ((ay2 - ay1) + OFFSET))[:, None]
    area_b = (((bx2 - bx1) + OFFSET) * ((by2 - by1) + OFFSET))[None, :]
    ax1, ay1, ax2, ay2 = ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None]
    bx1, by1, bx2, by2 = bx1[None, :], by1[None, :], bx2[None, :], by2[None, :]
    width = (tl.where(ax2 < bx2, ax2, bx2) - tl.where(ax1 > bx1, ax1, bx1)) + OFFSET
    height = (tl.where(ay2 < by2, ay2, by2) - tl.where(ay1 > by1, ay1, by1)) + OFFSET
    intersection = tl.where(width > 0.0, width, 0.0) * tl.where(height > 0.0, height, 0.0)
    union = (area_a + area_b) - intersection
    if union.dtype == tl.float64:
        iou = intersection / union
    else:
        iou = tl.div_rn(intersection, union)
    # A bare constant of a comparison is rounded to fp32 by Triton up to 3.7.
    return iou > tl.full((), THRESHOLD, union.dtype)


@triton.jit
def nms_kernel(
    boxes, kept, starts, segments, rank, keep, counts, n, limit,
    THRESHOLD: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Decides what is left (keep is 1) of the segments of up to `limit` boxes; counts the kept boxes of each."""
    lane = tl.arange(0, TILE)
    count = tl.load(segments)
    segment = tl.program_id(0).to(tl.int64)
    while segment < count:
        begin = tl.load(starts + segment)
        end = tl.load(starts + segment + 1)
        end = tl.where(end - begin > limit, begin, end)
        kept_end = begin
        tile = begin
        while tile < end:
            at = tile + lane
            inside = at < end
            x1, y1, x2, y2 = _load_boxes(boxes, at, inside, n)
            place = keep + tl.load(rank + at, mask=inside, other=0)
            alive = tl.load(place, mask=inside, other=0).to(tl.int32)
            other = begin
            while other < kept_end:
                known = other + lane < kept_end
                kx1, ky1, kx2, ky2 = _load_boxes(kept, other + lane, known, n)
                hit = _exceeds(kx1, ky1, kx2, ky2, x1, y1, x2, y2, THRESHOLD, OFFSET) & known[:, None]
                alive = alive & (1 - tl.max(hit.to(tl.int32), axis=0))
                other += TILE
            hit = _exceeds(x1, y1, x2, y2, x1, y1, x2, y2, THRESHOLD, OFFSET) & (lane[:, None] < lane[None, :])
            left = alive
            changes = 1
            while changes > 0:
                taken = tl.max((hit & (left != 0)[:, None]).to(tl.int32), axis=0)
                now = alive & (1 - taken)
                changes = tl.sum((now != left).to(tl.int32), axis=0)
                left = now
            chosen = left != 0
            slot = kept_end + tl.cumsum(left, axis=0) - left
            tl.store(kept + slot, x1, mask=chosen)
            tl.store(kept + n + slot, y1, mask=chosen)
            tl.store(kept + 2 * n + slot, x2, mask=chosen)
            tl.store(kept + 3 * n + slot, y2, mask=chosen)
            tl.store(place, left.to(tl.int8), mask=inside)
            kept_end += tl.sum(left, axis=0)
            # Other threads of the program read the kept list in the next round.
            tl.debug_barrier()
            tile += TILE
        tl.store(counts + segment, kept_end - begin)
        segment += tl.num_programs(0)


@triton.jit
def nms_clear_kernel(
    boxes, kept, starts, rank, keep, counts, n, end,
    THRESHOLD: tl.constexpr, OFFSET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Drops from the boxes after a panel, up to `end`, what the panel's kept ones suppress: one tile per program."""
    lane = tl.arange(0, TILE)
    other = tl.load(starts)
    at = tl.load(starts + 1) + tl.program_id(0).to(tl.int64) * TILE + lane
    kept_end = other + tl.load(counts)
    inside = at < end
    place = keep + tl.load(rank + at, mask=inside, other=0)
    alive = tl.load(place, mask=inside, other=0).to(tl.int32)
    x1, y1, x2, y2 = _load_boxes(boxes, at, inside, n)
    while other < kept_end:
        known = other + lane < kept_end
        kx1, ky1, kx2, ky2 = _load_boxes(kept, other + lane, known, n)
        hit = _exceeds(kx1, ky1, kx2, ky2, x1, y1, x2, y2, THRESHOLD, OFFSET) & known[:, None]
        alive = alive & (1 - tl.max(hit.to(tl.int32), axis=0))
        other += TILE
    tl.store(place, alive.to(tl.int8), mask=inside)


def nms_forward(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, legacy: bool) -> Tensor:
    n = boxes.shape[0]
    order = torch.sort(scores, stable=True, descending=True).indices
    positions = torch.arange(n + 1, device=boxes.device)
    if idxs is None:
        by_class, rank, segments = order, positions, torch.ones_like(positions[:1])
        starts = positions[:: max(n, 1)].contiguous()
    else:
        classes, rank = torch.sort(idxs[order], stable=True)
        by_class = order[rank]
        segment = torch.zeros_like(classes)
        segment[1:] = (classes[1:] != classes[:-1]).cumsum(0)
        segments = segment[-1:] + 1
        # Where each segment begins; n from the last one's end on.
        starts = torch.searchsorted(segment, positions)
    acc = accumulator(boxes.dtype)
    sides = boxes.to(acc).t().index_select(1, by_class)
    kept = torch.empty_like(sides)
    keep = torch.ones(n, dtype=torch.int8, device=boxes.device)
    counts = torch.empty(n, dtype=torch.int64, device=boxes.device)  # kept boxes per segment or panel
    constants = {
        "THRESHOLD": rounded(iou_threshold, boxes.dtype), "OFFSET": 1.0 if legacy else 0.0, "TILE": TILE,
        "num_warps": 8,
    }  # fmt: skip
    large = [] if n <= CHAIN else [(0, n)]
    if large and idxs is not None:
        which = (starts.diff() > CHAIN).nonzero().squeeze(1)
        large = torch.stack([starts[which], starts[which + 1]], 1).tolist()
    if idxs is not None or not large:
        grid = min(1 if idxs is None else MAX_PROGRAMS, n)
        arguments = (sides, kept, starts, segments, rank, keep, counts, n, CHAIN)
        launch.launch(nms_kernel, grid, boxes, *arguments, **constants)
    for begin, end in large:
        panels = torch.arange(begin, end + PANEL, PANEL, device=boxes.device).clamp_(max=end)
        one = torch.ones_like(panels[:1])
        for i in range(len(panels) - 1):
            at = panels[i:]
            launch.launch(nms_kernel, 1, boxes, sides, kept, at, one, rank, keep, counts, n, PANEL, **constants)
            tiles = launch.programs(max(end - begin - (i + 1) * PANEL, 0), TILE)
            launch.launch(nms_clear_kernel, tiles, boxes, sides, kept, at, rank, keep, counts, n, end, **constants)
    return order[keep.view(torch.bool)]
