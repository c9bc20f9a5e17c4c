# SPDX-License-Identifier: Apache-2.0
"""Post-processing in plain PyTorch, image by image and level by level: the oracle of `postprocess`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..bins.integral import bounded_logits, expectation
from ..boxes.box_ops import aligned_iou, rounded


def ranking_threshold(score_threshold: float, activated: bool) -> float:
    """What a map's value must exceed: the logit of the threshold, or the threshold itself; before rounding to fp32."""
    if activated:
        return score_threshold
    if score_threshold <= 0:
        return -math.inf
    if score_threshold >= 1:
        return math.inf
    return math.log(score_threshold / (1 - score_threshold))


def select(cls_score: Tensor, threshold: float, nms_pre: int, anchor_topk: bool) -> tuple[Tensor, Tensor]:
    """fp32 values and indices ``location · C + class`` of one level's candidates, the greatest value first."""
    classes = cls_score.shape[0]
    flat = cls_score.float().permute(1, 2, 0).reshape(-1)
    # False for NaN, which is never a candidate.
    index = (flat > threshold).nonzero().squeeze(1)
    value = flat[index]
    if anchor_topk and nms_pre > 0:
        best = torch.full((flat.numel() // max(classes, 1),), -math.inf, device=flat.device)
        best.scatter_reduce_(0, index // max(classes, 1), value, "amax")
        rank = best.sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(best, dtype=torch.bool)
        chosen[rank[:nms_pre]] = True
        kept = chosen[index // max(classes, 1)]
        index, value = index[kept], value[kept]
    # `index` rises, so a stable sort leaves equal values in the order of their indices.
    value, order = value.sort(descending=True, stable=True)
    if not anchor_topk and nms_pre > 0:
        value, order = value[:nms_pre], order[:nms_pre]
    return value, index[order]


def reference(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    image_sizes: Tensor,
    scale_factors: Tensor | None,
    reg_max: int,
    score_threshold: float,
    nms_pre: int,
    iou_threshold: float,
    max_detections: int,
    center_offset: Sequence[float],
    anchor_topk: bool,
    activated: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Image by image, level by level; fp32 throughout, fp64 maps are rounded to it."""
    device, batch, classes = cls_scores[0].device, cls_scores[0].shape[0], cls_scores[0].shape[1]
    boxes = torch.zeros((batch, max_detections, 4), device=device)
    scores = torch.zeros((batch, max_detections), device=device)
    labels = torch.full((batch, max_detections), -1, dtype=torch.int64, device=device)
    count = torch.zeros((batch,), dtype=torch.int32, device=device)
    locations = torch.full_like(labels, -1)
    threshold = rounded(ranking_threshold(score_threshold, activated), torch.float32)

    for image in range(batch):
        limit = image_sizes[image].float().flip(0).repeat(2)  # w, h, w, h
        if legacy:
            limit = limit - 1
        found, first = [], 0  # of a level, over all levels
        for cls_score, reg_pred, stride, offset in zip(cls_scores, reg_preds, strides, center_offset, strict=True):
            value, index = select(cls_score[image], threshold, nms_pre, anchor_topk)
            location, label = index // max(classes, 1), index % max(classes, 1)
            width = max(cls_score.shape[3], 1)
            cell = torch.stack([location % width, location // width], 1)
            if legacy:
                centre = cell.float() * stride + (stride - 1) / 2
            else:
                centre = (cell.float() + offset) * stride
            logits = reg_pred[image][:, cell[:, 1], cell[:, 0]].t().float()
            sides = bounded_logits(logits).unflatten(1, (4, reg_max + 1))
            distance = expectation(sides) * stride
            box = torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)
            box = torch.minimum(box.clamp(min=0), limit)
            sized = (box[:, 2] - box[:, 0] > 0) & (box[:, 3] - box[:, 1] > 0)
            found.append((value[sized], label[sized], box[sized], first + location[sized]))
            first += cls_score.shape[2] * cls_score.shape[3]
        value, label, box, location = (torch.cat(parts) for parts in zip(*found, strict=True))
        # Each level is in its own order already, so a stable sort leaves equal values by level, location and class.
        value, order = value.sort(descending=True, stable=True)
        label, box, location = label[order], box[order], location[order]
        kept = _suppress(box, label, iou_threshold, max_detections, legacy)
        n = kept.numel()
        boxes[image, :n] = box[kept] if scale_factors is None else box[kept] / scale_factors[image].float().repeat(2)
        scores[image, :n] = value[kept] if activated else value[kept].sigmoid()
        labels[image, :n] = label[kept]
        count[image] = n
        locations[image, :n] = location[kept]
    return boxes, scores, labels, count, locations


def _suppress(box: Tensor, label: Tensor, iou_threshold: float, max_detections: int, legacy: bool) -> Tensor:
    """Indices that class-wise NMS keeps of boxes in the order of their rank, at most `max_detections`."""
    alive = torch.ones_like(label, dtype=torch.bool)
    threshold = rounded(iou_threshold, torch.float32)
    kept: list[int] = []
    while len(kept) < max_detections and bool(alive.any()):
        best = int(alive.int().argmax())
        kept.append(best)
        alive &= (label != label[best]) | ~(aligned_iou(box[best], box, legacy) > threshold)
        alive[best] = False
    return torch.tensor(kept, dtype=torch.int64, device=box.device)
