# SPDX-License-Identifier: Apache-2.0
"""Assignment with a dynamic k as its definition has it: costs of all pairs of a box and a location, and sorts.

A pair's arithmetic is that of csrc/terms/dynamic_k.h, operation by operation, so that all backends rank alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .elementary import exponential, logarithm, logarithm_of_sum, power_of_ten
from .task_aligned_reference import PAIRS, by_image, inside, locations, overlap, root

# Partial sums of a row of classes.
_LANES = 16
_OUTSIDE_ALL, _OUTSIDE = 1e8, 1e5


def lane_sum(x: Tensor) -> Tensor:
    """Sums ``[N, C]`` over the classes: 16 partial ones, then a tree."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % _LANES))
    total = x.new_zeros(x.shape[0], _LANES)
    for part in x.split(_LANES, 1):
        total = total + part
    width = _LANES // 2
    while width:
        total = total[:, :width] + total[:, width : 2 * width]
        width //= 2
    return total[:, 0]


def _below_zero(x: Tensor) -> Tensor:
    """min(x, 0) and NaN of NaN."""
    return torch.where(x > 0, 0.0, x)


class _Rule(NamedTuple):
    topk: int
    iou_weight: float
    cls_weight: float
    radius: float
    cost: str

    def prepare(self, scores: Tensor) -> Tensor:
        """fp32, and probabilities within [0, 1]."""
        scores = scores.float()
        return scores.clamp(0, 1) if self.cost in ("nanodet", "simota") else scores

    def background(self, x: Tensor) -> Tensor:
        """The class cost of a class that is not the box's."""
        if self.cost == "mmyolo":
            return torch.zeros_like(x)
        if self.cost in ("nanodet", "simota"):
            loss = -logarithm_of_sum(-x, 1.0 - x)
            return loss if self.cost == "simota" else loss * (x * x)
        e = exponential(-x.abs())
        p = torch.where(x < 0, e, 1.0) / (1.0 + e)
        return (logarithm_of_sum(e, 1.0 + e) + torch.where(x < 0, 0.0, x)) * (p * p)

    def foreground(self, x: Tensor, iou: Tensor) -> Tensor:
        """The class cost of the box's class."""
        if self.cost == "simota":
            return -logarithm(x)
        if self.cost == "nanodet":
            loss = -(iou * logarithm(x) + (1.0 - iou) * logarithm_of_sum(-x, 1.0 - x))
            p = x
        else:
            e = exponential(-x.abs())
            p = torch.where(x < 0, e, 1.0) / (1.0 + e)
            loss = (1.0 - iou) * x + (logarithm_of_sum(e, 1.0 + e) - _below_zero(x))
        return loss * ((iou - p) * (iou - p))

    def near(self, points: Tensor, gt_boxes: Tensor) -> Tensor:
        """Which points lie within the radius of which boxes' centres: ``[G, A]``."""
        centre = (gt_boxes[:, None, :2] + gt_boxes[:, None, 2:]) * 0.5
        reach = points[:, 2:] * self.radius
        return ((points[:, :2] - (centre - reach) > 0) & (centre + reach - points[:, :2] > 0)).all(-1)

    def penalty(self, points: Tensor, gt_boxes: Tensor) -> Tensor:
        if self.cost == "nanodet":
            return torch.zeros((), device=points.device)
        if self.cost == "simota":
            within = inside(points[:, :2], gt_boxes, 0.0, 0.0) & self.near(points, gt_boxes)
            return torch.where(within, 0.0, _OUTSIDE)
        centre = (gt_boxes[:, None, :2] + gt_boxes[:, None, 2:]) * 0.5
        square = (points[:, :2] - centre).square()
        return power_of_ten(root(square[..., 0] + square[..., 1]) / points[:, 2] - self.radius)

    def costs(self, score: Tensor, others: Tensor, iou: Tensor, points: Tensor, gt_boxes: Tensor) -> Tensor:
        """Of pairs ``[G, A]``; `score` is of the box's class, `others` ``[A]`` the sum of `background`."""
        found = others + (self.foreground(score, iou) - self.background(score))
        found = torch.where(found < 0, 0.0, found) * self.cls_weight
        found = found - logarithm(iou + 1e-7) * self.iou_weight + self.penalty(points, gt_boxes)
        return torch.where(found == found, found, float("inf"))


def cost_keys(cost: Tensor, index: Tensor) -> Tensor:
    """Integers that order by cost, then by index."""
    bits = cost.contiguous().view(torch.int32).long()
    return (torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) << 32) + index


def _assign_image(
    rule: _Rule, scores: Tensor, boxes: Tensor, points: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One image; every slot holds a box."""
    count, slots, device = boxes.shape[0], gt_boxes.shape[0], boxes.device
    step = max(1, PAIRS // count)
    valid = torch.zeros(count, dtype=torch.bool, device=device)
    for gt in gt_boxes.split(step):
        valid |= inside(points[:, :2], gt, 0.0, 0.0).any(0)
        if rule.cost == "simota":
            valid |= rule.near(points, gt).any(0)
    places = torch.arange(count, device=device) if rule.cost == "mmyolo" else valid.nonzero()[:, 0]
    labels = torch.full((count,), -1, dtype=torch.int64, device=device)
    matched, reached = labels.clone(), torch.zeros(count, device=device)
    if not len(places):
        return labels, matched, reached

    scores, boxes, points, valid = rule.prepare(scores[places]), boxes[places], points[places], valid[places]
    others = lane_sum(rule.background(scores))
    index = torch.arange(len(places), device=device)
    topk = min(rule.topk, len(places))
    times = torch.zeros_like(index)
    only = torch.zeros_like(index)
    best = torch.full_like(index, torch.iinfo(torch.int64).max)
    for first in range(0, slots, step):
        gt = gt_boxes[first : first + step]
        iou = overlap("iou", gt[:, None], boxes[None])
        cost = rule.costs(scores[:, gt_labels[first : first + step]].t(), others, iou, points, gt)
        cost = torch.where(valid, cost, _OUTSIDE_ALL)
        # From the largest to the smallest, one after another.
        largest = iou.topk(topk, 1).values
        total = torch.zeros(len(gt), device=device)
        for column in largest.unbind(1):
            total = total + column
        chosen = cost_keys(cost, index).topk(topk, 1, largest=False).values & 0xFFFFFFFF
        taken = torch.arange(topk, device=device) < total.long().clamp(min=1)[:, None]
        slot = torch.arange(first, first + len(gt), device=device)
        times.index_add_(0, chosen[taken], torch.ones_like(chosen[taken]))
        only.index_add_(0, chosen[taken], slot[:, None].expand_as(chosen)[taken])
        best = torch.minimum(best, cost_keys(cost, slot[:, None]).amin(0))

    winner = torch.where(times > 1, best & 0xFFFFFFFF, torch.where(times == 1, only, 0))
    positive = times > 0
    labels[places] = torch.where(positive, gt_labels[winner], -1)
    matched[places] = torch.where(positive, winner, -1)
    reached[places] = torch.where(positive, overlap("iou", gt_boxes[winner], boxes), 0.0)
    return labels, matched, reached


def grid_points(
    level_sizes: Sequence[int], strides: Sequence[float], center_offset: Sequence[float], device: torch.device
) -> Tensor:
    """Centres of the cells of all levels with their strides, ``[A, 4]``."""
    cells = torch.tensor([h * w for h, w in zip(level_sizes[::2], level_sizes[1::2])], device=device)
    stride = torch.tensor(strides, dtype=torch.float32, device=device).repeat_interleave(cells)
    centre = locations(level_sizes, strides, center_offset, device)
    return torch.cat([centre, stride[:, None].expand(-1, 2)], 1)


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
    iou_weight: float,
    cls_weight: float,
    center_radius: float,
    cost: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image by image."""
    rule = _Rule(topk, iou_weight, cls_weight, center_radius, cost)
    if points is None:
        points = grid_points(level_sizes, strides, center_offset, boxes.device)
    return by_image(scores, boxes, gt_boxes, gt_labels, points, lambda *image: _assign_image(rule, *image))
