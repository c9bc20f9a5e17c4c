# SPDX-License-Identifier: Apache-2.0
"""Task-aligned assignment as its definition has it: metrics of all pairs of a box and a location, and sorts.

A pair's arithmetic is that of csrc/terms/task_aligned.h, operation by operation, so that all backends rank alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .atss import centres
from .elementary import sigmoid

# Pairs that are in memory at a time.
PAIRS = 1 << 22
_LOW = 0xFFFFFFFF


def arc_tangent(x: Tensor) -> Tensor:
    """atan x within 3 ulp: 0, π/4 or π/2 plus a polynomial of a quotient."""
    a = x.abs()
    large, middle = a > 2.4142135, a > 0.41421357
    one = torch.ones_like(a)
    t = torch.where(large, -one, torch.where(middle, a - 1.0, a)) / torch.where(
        large, a, torch.where(middle, a + 1.0, one)
    )
    z = t * t
    p = ((z * 0.080598205 + -0.1387971) * z + 0.19977914) * z + -0.33332956
    angle = torch.where(large, 1.5707964, torch.where(middle, 0.78539819, 0.0)) + (t * z * p + t)
    return torch.where(x < 0, -angle, angle)


def root(x: Tensor) -> Tensor:
    """√x; by way of fp64, since MKL's fp32 square root, which torch uses, may be off by an ulp."""
    return x.double().sqrt().float()


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent by squaring where twice the exponent is an integer up to 64, else by way of fp64."""
    twice = 2 * exponent
    if not 0 <= twice <= 64 or twice != int(twice):
        return x.double().pow(exponent).float()
    result = root(x) if int(twice) % 2 else torch.ones_like(x)
    whole, square = int(twice) // 2, x
    while whole:
        if whole & 1:
            result = result * square
        square = square * square
        whole >>= 1
    return result


def overlap(kind: str, gt: Tensor, pred: Tensor, atan: Callable[[Tensor], Tensor] = arc_tangent) -> Tensor:
    """Overlap of boxes ``[..., 4]``, which broadcast; 0 where it is negative or NaN.

    `kind`: "ciou", "clipped_iou" (sides at least 0, union + 1e-9) or "iou" (union at least 1e-6).
    """
    gx1, gy1, gx2, gy2 = gt.unbind(-1)
    px1, py1, px2, py2 = pred.unbind(-1)
    inner = (torch.minimum(px2, gx2) - torch.maximum(px1, gx1)).clamp(min=0) * (
        torch.minimum(py2, gy2) - torch.maximum(py1, gy1)
    ).clamp(min=0)
    gw, gh, pw, ph = gx2 - gx1, gy2 - gy1, px2 - px1, py2 - py1
    if kind == "ciou":
        gh, ph = gh + 1e-7, ph + 1e-7
        iou = inner / (gw * gh + pw * ph - inner + 1e-7)
        outer_x, outer_y = (
            torch.maximum(px2, gx2) - torch.minimum(px1, gx1),
            torch.maximum(py2, gy2) - torch.minimum(py1, gy1),
        )
        diagonal = outer_x * outer_x + outer_y * outer_y + 1e-7
        shift_x, shift_y = px1 + px2 - gx1 - gx2, py1 + py2 - gy1 - gy2
        distance = (shift_x * shift_x + shift_y * shift_y) * 0.25
        turn = atan(pw / ph) - atan(gw / gh)
        v = turn * turn * (4 / math.pi**2)
        value = iou - (distance / diagonal + v * (v / (1 - iou + v + 1e-7)))
    elif kind == "clipped_iou":
        value = inner / (gw.clamp(min=0) * gh.clamp(min=0) + pw.clamp(min=0) * ph.clamp(min=0) - inner + 1e-9)
    else:
        value = inner / (gw * gh + pw * ph - inner).clamp(min=1e-6)
    return torch.where(value > 0, value, 0.0)


def scores_in_double(
    kind: str,
    score: Tensor,
    pred: Tensor,
    gt: Tensor,
    positive: Tensor,
    slot: Tensor,
    slots: int,
    alpha: float,
    beta: float,
    eps: float,
) -> Tensor:
    """The scores that positives are to learn, ``[B, A]``, in the dtypes and by the functions of the frameworks; for
    training in fp64, which would show the rounding of `task_aligned_assign`'s.

    Args:
        kind: of `overlap`.
        score: ``[B, A]``, of the class to learn.
        pred, gt: ``[B, A, 4]``.
        positive: ``[B, A]``, which locations learn a box.
        slot: ``[B, A]``, in [0, slots).
    """
    reached = torch.where(positive, overlap(kind, gt, pred, torch.atan), 0.0)
    metric = torch.where(positive, score.pow(alpha) * reached.pow(beta), 0.0)

    def largest(x: Tensor) -> Tensor:
        return x.new_zeros((len(x), slots)).scatter_reduce(1, slot, x, "amax").gather(1, slot)

    return metric * largest(reached) / (largest(metric) + eps)


def inside(points: Tensor, gt_boxes: Tensor, min_side: float, margin: float) -> Tensor:
    """Which points ``[A, 2]`` lie in which boxes ``[G, 4]``, each side at least `min_side`: ``[G, A]``."""
    low, high = gt_boxes[:, :2], gt_boxes[:, 2:]
    if min_side > 0:
        centre, half = (low + high) * 0.5, (high - low).clamp(min=min_side) * 0.5
        low, high = centre - half, centre + half
    return ((points - low[:, None] > margin) & (high[:, None] - points > margin)).all(-1)


def keys(values: Tensor, index: Tensor) -> Tensor:
    """Integers that order by value (>= 0), then by the lower index."""
    return (values.contiguous().view(torch.int32).long() << 32) | (_LOW - index)


class _Rule(NamedTuple):
    topk: int
    topk2: int
    alpha: float
    beta: float
    min_side: float
    eps: float
    variant: str
    kind: str
    logits: bool

    def metric(self, score: Tensor, found: Tensor) -> Tensor:
        p = sigmoid(score.float()) if self.logits else score.float().clamp(max=1)
        value = power(p, self.alpha) * power(found, self.beta)
        return torch.where(value > 0, value, 0.0)


def _assign_image(
    rule: _Rule, scores: Tensor, boxes: Tensor, points: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One image; every slot holds a box."""
    count, slots = boxes.shape[0], gt_boxes.shape[0]
    index = torch.arange(count, device=boxes.device)
    mmdet = rule.variant == "mmdet"
    places, chosen, found = [], [], []
    best = torch.zeros(count, dtype=torch.int64, device=boxes.device)
    step = max(1, PAIRS // count)
    for first in range(0, slots, step):
        gt, labels = gt_boxes[first : first + step], gt_labels[first : first + step]
        slot = torch.arange(first, first + len(gt), device=boxes.device)
        within = inside(points, gt, rule.min_side, 0.01 if mmdet else 1e-9)
        pairs = overlap(rule.kind, gt[:, None], boxes[None])
        metric = rule.metric(scores[:, labels].t(), pairs)
        ranked = keys(metric if mmdet else torch.where(within, metric, 0.0), index).topk(min(rule.topk, count), 1)
        place = _LOW - (ranked.values & _LOW)
        taken = within.gather(1, place)
        places.append(place)
        chosen.append(taken & (ranked.values >> 32 > 0) if mmdet else taken)
        found.append(pairs.gather(1, place))
        if rule.variant == "ultralytics":
            pairs = torch.where(within, pairs, 0.0)
        best = torch.maximum(best, keys(pairs, slot[:, None]).amax(0))

    place, taken, reached = torch.cat(places), torch.cat(chosen), torch.cat(found)
    slot = torch.arange(slots, device=boxes.device)[:, None].expand_as(place)[taken]
    place, reached = place[taken], reached[taken]
    times = torch.zeros_like(index).index_add(0, place, torch.ones_like(place))
    only = torch.zeros_like(index).scatter_reduce(0, place, slot, "amax")
    if mmdet:
        best = torch.zeros_like(index).scatter_reduce(0, place, keys(reached, slot), "amax")
    winner = torch.where(times > 1, _LOW - (best & _LOW), only)
    pairs = overlap(rule.kind, gt_boxes[winner], boxes)
    if rule.variant == "ultralytics":
        # Where a conflict is without any overlap inside, the first box has the location, which lies outside of it.
        pairs = torch.where((times > 1) & (best >> 32 == 0), 0.0, pairs)
    metric = rule.metric(scores.gather(1, gt_labels[winner][:, None])[:, 0], pairs)
    positive = times > 0
    if rule.topk2 != rule.topk:
        kept = []
        for first in range(0, slots, step):
            slot = torch.arange(first, min(first + step, slots), device=boxes.device)
            own = torch.where(positive & (winner == slot[:, None]), metric, 0.0)
            place = _LOW - (keys(own, index).topk(min(rule.topk2, count), 1).values & _LOW)
            mine = torch.zeros(own.shape, dtype=torch.bool, device=own.device).scatter(1, place, True)
            kept.append((mine & (winner == slot[:, None])).any(0))
        positive = positive & torch.stack(kept).any(0)

    metric, pairs = torch.where(positive, metric, 0.0), torch.where(positive, pairs, 0.0)
    largest = torch.zeros(slots, device=boxes.device)
    over_metric = largest.scatter_reduce(0, winner, metric, "amax")
    over_overlap = largest.scatter_reduce(0, winner, pairs, "amax")
    if not mmdet:
        metric = metric * over_overlap[winner] / (over_metric[winner] + rule.eps)
    matched = torch.where(positive, winner, -1)
    return torch.where(positive, gt_labels[winner], -1), matched, torch.where(positive, metric, 0.0)


def by_image(
    scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, points: Tensor, assign: Callable[..., Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """`assign`'s labels, slots and values of (scores, boxes, points, boxes and labels of the slots that hold a box)."""
    shape = scores.shape[:2]
    labels = torch.full(shape, -1, dtype=torch.int64, device=boxes.device)
    matched, values = labels.clone(), torch.zeros(shape, device=boxes.device)
    if not shape[1]:
        return labels, matched, values
    real = (gt_labels >= 0) & (gt_labels < scores.shape[2]) & torch.isfinite(gt_boxes).all(-1)
    for b in range(shape[0]):
        slots = real[b].nonzero()[:, 0]
        if len(slots):
            found = assign(scores[b], boxes[b], points, gt_boxes[b, slots], gt_labels[b, slots])
            labels[b], values[b] = found[0], found[2]
            matched[b] = torch.where(found[1] >= 0, slots[found[1].clamp(min=0)], -1)
    return labels, matched, values


def locations(
    level_sizes: Sequence[int], strides: Sequence[float], center_offset: Sequence[float], device: torch.device
) -> Tensor:
    """Centres ``[A, 2]`` of the cells of all levels, in pixels."""
    levels = zip(level_sizes[::2], level_sizes[1::2], strides, center_offset)
    parts = [centres(height, width, stride, offset, False, device) for height, width, stride, offset in levels]
    return torch.cat(parts) if parts else torch.empty((0, 2), device=device)


def reference(
    scores: Tensor,
    boxes: Tensor,
    level_sizes: Sequence[int],
    strides: Sequence[float],
    center_offset: Sequence[float],
    points: Tensor | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    topk: int,
    topk2: int,
    alpha: float,
    beta: float,
    min_side: float,
    eps: float,
    variant: str,
    ciou: bool,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image by image."""
    kind = "ciou" if ciou else "iou" if variant == "mmdet" else "clipped_iou"
    rule = _Rule(topk, topk2, alpha, beta, min_side, eps, variant, kind, logits)
    if points is None:
        points = locations(level_sizes, strides, center_offset, boxes.device)
    return by_image(scores, boxes, gt_boxes, gt_labels, points, lambda *image: _assign_image(rule, *image))
