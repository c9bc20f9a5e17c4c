# SPDX-License-Identifier: Apache-2.0
"""Suppression and post-processing; see `formulas`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bins import integral
from .boxes import distance_to_box, pairwise_iou


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """All overlaps first, 512 boxes at a time; then from the best score down, each kept box drops those it overlaps."""
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes[order]
    over = torch.cat([pairwise_iou(some, boxes) > iou_threshold for some in boxes.split(512)])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        if alive[i]:
            alive[i + 1 :] &= ~over[i, i + 1 :]
    return order[alive]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, one_class: Any = nms) -> Tensor:
    """Each class shifted to coordinates of its own; mmdet's and torchvision's coordinate trick."""
    moved = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
    return one_class(moved, scores, iou_threshold)


def nms_by_class(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """The definition, for all boxes of a class at once: a box is kept if no better one that is kept overlaps it.

    After k passes the first k boxes of every chain of overlaps are decided; then nothing changes any more.
    """
    order = scores.sort(descending=True, stable=True).indices
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for label in idxs.unique():
        ranked = order[idxs[order] == label]
        better = (pairwise_iou(boxes[ranked], boxes[ranked]) > iou_threshold).triu(1)
        alive, before = torch.ones_like(ranked, dtype=torch.bool), None
        while before is None or not torch.equal(alive, before):
            alive, before = ~(better & alive[:, None]).any(0), alive
        kept[ranked[alive]] = True
    return order[kept[order]]


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, limit: int, one_class: Any = nms
) -> tuple[Tensor, Tensor, Tensor]:
    rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
    kept = batched_nms(boxes[rows], scores[rows, labels], labels, iou_threshold, one_class)[:limit]
    return boxes[rows[kept]], scores[rows[kept], labels[kept]], labels[kept]


def soft_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float) -> tuple[Tensor, Tensor]:
    """Linear decay, one box per step."""
    index = torch.arange(len(scores), device=scores.device)
    scores = scores.clone()
    kept, values = [], []
    while index.numel():
        best = int(scores[index].argmax())
        chosen = index[best]
        if not bool(scores[chosen] > min_score):
            break
        kept.append(chosen)
        values.append(scores[chosen])
        index = torch.cat([index[:best], index[best + 1 :]])
        iou = pairwise_iou(boxes[chosen][None], boxes[index])[0]
        scores[index] *= torch.where(iou > iou_threshold, 1 - iou, 1.0)
        index = index[scores[index] > min_score]
    return torch.stack(kept), torch.stack(values)


def detections(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    size: tuple[float, float],
    reg_max: int,
    *,
    score_threshold: float = 0.05,
    nms_pre: int = 1000,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    center_offset: float = 0.0,
    one_class: Any = nms,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes, scores and labels of each image, image by image and level by level; every distribution is integrated."""
    device, found = cls_scores[0].device, []
    for image in range(cls_scores[0].shape[0]):
        levels = []
        for cls, reg, stride in zip(cls_scores, reg_preds, strides):
            height, width = cls.shape[2:]
            y, x = (torch.arange(extent, device=device) for extent in (height, width))
            grid = torch.meshgrid(x, y, indexing="xy")
            points = (torch.stack(grid, -1).reshape(-1, 2).float() + center_offset) * stride
            probability = cls[image].permute(1, 2, 0).reshape(-1, cls.shape[1]).float().sigmoid()
            distance = integral(reg[image].permute(1, 2, 0).reshape(height * width, -1), reg_max) * stride
            valid = probability > score_threshold
            pairs = valid.nonzero()
            value, order = probability[valid].sort(descending=True)
            if nms_pre > 0:
                value, order = value[:nms_pre], order[:nms_pre]
            rows, label = pairs[order].unbind(1)
            levels.append((distance_to_box(points[rows], distance[rows], size), value, label))
        box, value, label = (torch.cat(parts) for parts in zip(*levels))
        sized = (box[:, 2:] > box[:, :2]).all(1)
        box, value, label = box[sized], value[sized], label[sized]
        kept = batched_nms(box, value, label, iou_threshold, one_class)[:max_detections] if len(box) else label
        found.append((box[kept], value[kept], label[kept]))
    return found


def padded(
    found: Sequence[tuple[Tensor, Tensor, Tensor]], limit: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images' detections in `limit` slots each, and their number."""
    batch = len(found)
    boxes, scores = torch.zeros((batch, limit, 4), device=device), torch.zeros((batch, limit), device=device)
    labels, count = torch.full((batch, limit), -1, device=device), torch.zeros(batch, dtype=torch.int32, device=device)
    for image, (box, value, label) in enumerate(found):
        n = len(box)
        boxes[image, :n], scores[image, :n], labels[image, :n], count[image] = box, value, label, n
    return boxes, scores, labels, count


def postprocess(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    size: tuple[int, int],
    reg_max: int,
    limit: int = 100,
    one_class: Any = nms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`detections` in fixed shapes."""
    found = detections(cls_scores, reg_preds, strides, size, reg_max, max_detections=limit, one_class=one_class)
    return padded(found, limit, cls_scores[0].device)


def ultralytics_postprocess(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    size: tuple[int, int],
    reg_max: int,
    suppress: Any,
    limit: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything is decoded, and ultralytics' `non_max_suppression` takes one tensor ``[B, 4+C, A]``."""
    batch, device = cls_scores[0].shape[0], cls_scores[0].device
    rows = []
    for cls, reg, stride in zip(cls_scores, reg_preds, strides):
        height, width = cls.shape[2:]
        y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
        points = torch.stack([x, y], -1).reshape(-1, 2).float() * stride
        distance = integral(reg.permute(0, 2, 3, 1).reshape(batch, height * width, -1), reg_max) * stride
        low = (points - distance[..., :2]).clamp(min=0)
        high = (points + distance[..., 2:]).minimum(points.new_tensor([size[1], size[0]]))
        scores = cls.flatten(2).transpose(1, 2).float().sigmoid()
        rows.append(torch.cat([(low + high) / 2, high - low, scores], 2))
    found = suppress(torch.cat(rows, 1).transpose(1, 2), 0.05, 0.6, multi_label=True, max_det=limit, max_time_img=1e9)
    return padded([(kept[:, :4], kept[:, 4], kept[:, 5].long()) for kept in found], limit, device)
