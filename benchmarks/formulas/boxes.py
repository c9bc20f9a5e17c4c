# SPDX-License-Identifier: Apache-2.0
"""Boxes and their overlap; see `formulas`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common import average, widen

IOU_KINDS = ("iou", "giou", "diou", "ciou")


def distance_to_box(points: Tensor, distance: Tensor, max_shape: tuple[float, float] | None = None) -> Tensor:
    x1, y1 = points[..., 0] - distance[..., 0], points[..., 1] - distance[..., 1]
    x2, y2 = points[..., 0] + distance[..., 2], points[..., 1] + distance[..., 3]
    boxes = torch.stack([x1, y1, x2, y2], -1)
    if max_shape is not None:
        boxes[..., 0::2].clamp_(min=0, max=max_shape[1])
        boxes[..., 1::2].clamp_(min=0, max=max_shape[0])
    return boxes


def box_to_distance(points: Tensor, boxes: Tensor, max_distance: float, eps: float = 0.1) -> Tensor:
    left, top = points[..., 0] - boxes[..., 0], points[..., 1] - boxes[..., 1]
    right, bottom = boxes[..., 2] - points[..., 0], boxes[..., 3] - points[..., 1]
    return torch.stack([side.clamp(min=0, max=max_distance - eps) for side in (left, top, right, bottom)], -1)


def box_iou_loss(
    pred: Tensor, target: Tensor, weight: Tensor, avg_factor: Tensor | float, kind: str, eps: float = 1e-7
) -> Tensor:
    """One of `IOU_KINDS`."""
    pred = widen(pred)
    extent = (torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])).clamp(min=0)
    common = extent[:, 0] * extent[:, 1]
    w1, h1 = pred[:, 2] - pred[:, 0], pred[:, 3] - pred[:, 1]
    w2, h2 = target[:, 2] - target[:, 0], target[:, 3] - target[:, 1]
    union = w1 * h1 + w2 * h2 - common
    whole = torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])
    if kind == "iou":
        return average(1 - common / union.clamp(min=eps), weight, avg_factor)
    if kind == "giou":
        enclosing = (whole[:, 0] * whole[:, 1]).clamp(min=eps)
        iou = common / union.clamp(min=eps)
        return average(1 - (iou - (enclosing - union) / enclosing), weight, avg_factor)
    iou = common / (union + eps)
    diagonal = whole.clamp(min=0).square().sum(1) + eps
    between = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]).square().sum(1) / 4
    value = iou - between / diagonal
    if kind == "ciou":
        angle = torch.atan(w2 / (h2 + eps)) - torch.atan(w1 / (h1 + eps))
        v = 4 / math.pi**2 * angle.square()
        with torch.no_grad():
            share = (iou > 0.5).to(v.dtype) * v / (1 - iou + v)
        value = (value - share * v).clamp(min=-1, max=1)
    return average(1 - value, weight, avg_factor)


def pairwise_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    extent = (torch.min(a[:, None, 2:], b[None, :, 2:]) - torch.max(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    common = extent[..., 0] * extent[..., 1]
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return common / (area_a[:, None] + area_b[None] - common).clamp(min=eps)
