# SPDX-License-Identifier: Apache-2.0
"""Assignment and the whole head loss; see `formulas`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bins import dense_dfl, dense_integral, dfl, integral
from .boxes import box_iou_loss, box_to_distance, distance_to_box, pairwise_iou
from .common import MEAN_EPS, widen
from .score import dense_qfl, qfl

CLS_WEIGHT, BOX_WEIGHT, DFL_WEIGHT = 1.0, 2.0, 0.25
# `average` adds its epsilon, which the loss of the whole head is defined without.
ONE, FOUR = 1.0 - MEAN_EPS, 4.0 - MEAN_EPS


def grid(height: int, width: int, device: torch.device) -> Tensor:
    """Centres ``[H·W, 2]`` in cells."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2).float()


def atss(
    level_sizes: Sequence[tuple[int, int]], strides: Sequence[float], gt_boxes: Tensor, gt_labels: Tensor, topk: int = 9
) -> tuple[Tensor, Tensor, Tensor]:
    """Image by image, with all distances and IoUs as ``[A, G]`` matrices."""
    device = gt_boxes.device
    points = torch.cat([grid(h, w, device) * s for (h, w), s in zip(level_sizes, strides)])
    half = torch.cat([torch.full((h * w, 1), 4.0 * s, device=device) for (h, w), s in zip(level_sizes, strides)])
    priors = torch.cat([points - half, points + half], 1)
    results = []
    for boxes, classes in zip(gt_boxes, gt_labels):
        boxes, classes = boxes[classes >= 0], classes[classes >= 0]
        if not len(boxes):
            none = torch.full((len(points),), -1, device=device)
            results.append((none, none, torch.zeros(len(points), device=device)))
            continue
        iou = pairwise_iou(priors, boxes)
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance = (points[:, None] - middle[None]).square().sum(-1).sqrt()
        nearest, start = [], 0
        for h, w in level_sizes:
            cells = distance[start : start + h * w]
            nearest.append(cells.topk(min(topk, h * w), 0, largest=False).indices + start)
            start += h * w
        candidates = torch.cat(nearest)
        slots = torch.arange(len(boxes), device=device)
        overlaps = iou[candidates, slots]
        positive = overlaps >= overlaps.mean(0) + overlaps.std(0)
        centre = points[candidates]
        margin = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], -1)
        positive &= margin.amin(-1) > 0.01
        table = torch.full_like(iou, -torch.inf)
        columns = slots.expand_as(candidates)
        table[candidates[positive], columns[positive]] = overlaps[positive]
        best, matched = table.max(1)
        taken = best > -torch.inf
        labels = torch.where(taken, classes[matched], -1)
        results.append((labels, torch.where(taken, matched, -1), torch.where(taken, best, 0.0)))
    labels, matched, best = (torch.stack(parts) for parts in zip(*results))
    return labels, matched, best


def task_aligned(
    scores: Tensor, boxes: Tensor, points: Tensor, gt_boxes: Tensor, gt_labels: Tensor, min_side: float, topk: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """As YOLOv8 to 26 train, the whole batch at once: metrics and masks are ``[B, G, A]`` matrices."""
    real = (gt_labels >= 0)[..., None]
    middle, side = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2, gt_boxes[..., 2:] - gt_boxes[..., :2]
    half = side.clamp(min=min_side)[:, :, None] / 2
    margin = half - (points - middle[:, :, None]).abs()
    inside = (margin.amin(-1) > 1e-9) & real
    image, slot, place = inside.nonzero(as_tuple=True)
    iou = complete_iou(boxes[image, place], gt_boxes[image, slot]).clamp(min=0)
    found = widen(scores[image, place, gt_labels[image, slot]])
    overlap, metric = boxes.new_zeros(inside.shape), found.new_zeros(inside.shape)
    overlap[inside], metric[inside] = iou, found.sqrt() * iou.pow(6)
    chosen = torch.zeros_like(inside).scatter_(2, metric.topk(topk, 2).indices, True) & inside
    several = chosen.sum(1, keepdim=True) > 1
    best = torch.zeros_like(inside).scatter_(1, overlap.argmax(1, keepdim=True), True)
    chosen = torch.where(several, best, chosen)
    positive, matched = chosen.any(1), chosen.byte().argmax(1)
    metric, overlap = metric * chosen, overlap * chosen
    score = (metric * overlap.amax(2, keepdim=True) / (metric.amax(2, keepdim=True) + 1e-9)).amax(1)
    matched = torch.where(positive, matched, -1)
    return torch.where(positive, gt_labels.gather(1, matched.clamp(min=0)), -1), matched, score


def dynamic_soft_labels(
    logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor, gt_boxes: Tensor, gt_labels: Tensor, topk: int = 13
) -> tuple[Tensor, Tensor, Tensor]:
    """As RTMDet trains, image by image: costs are ``[A, G]`` matrices, the classes' ``[A, G, C]``."""
    results = []
    for x, pred, slots, classes in zip(logits, boxes, gt_boxes, gt_labels):
        real = (classes >= 0).nonzero()[:, 0]
        gt, label = slots[real], classes[real]
        margin = torch.cat([points[:, None] - gt[:, :2], gt[:, 2:] - points[:, None]], -1)
        places = (margin.amin(-1) > 0).any(1).nonzero()[:, 0]
        matched = torch.full((len(points),), -1, device=x.device)
        best = torch.zeros(len(points), device=x.device)
        if len(places):
            overlap, found = pairwise_iou(pred[places], gt), x[places].float()[:, None].expand(-1, len(gt), -1)
            soft = F.one_hot(label, x.shape[1]).float() * overlap[..., None]
            cost = F.binary_cross_entropy_with_logits(found, soft, reduction="none")
            cost = (cost * (soft - found.sigmoid()).square()).sum(-1) - 3 * (overlap + 1e-7).log()
            apart = (points[places, None] - (gt[:, :2] + gt[:, 2:]) / 2).square().sum(-1).sqrt()
            cost = cost + 10 ** (apart / strides[places, None] - 3)
            chosen = torch.zeros_like(cost, dtype=torch.bool)
            many = overlap.topk(min(topk, len(places)), 0).values.sum(0).int().clamp(min=1).tolist()
            for slot, k in enumerate(many):
                chosen[cost[:, slot].topk(k, largest=False).indices, slot] = True
            several = chosen.sum(1) > 1
            chosen[several] = F.one_hot(cost[several].argmin(1), len(gt)).bool()
            row, slot = chosen.nonzero(as_tuple=True)
            matched[places[row]], best[places[row]] = real[slot], overlap[row, slot]
        results.append((torch.where(matched >= 0, classes[matched.clamp(min=0)], -1), matched, best))
    labels, matched, best = (torch.stack(parts) for parts in zip(*results))
    return labels, matched, best


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """CIoU of each pair, as ultralytics has it."""
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    common = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = common / (size_a.prod(1) + size_b.prod(1) - common + eps)
    whole = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).square().sum(1) + eps
    apart = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(1) / 4
    turn = torch.atan(size_a[:, 0] / (size_a[:, 1] + eps)) - torch.atan(size_b[:, 0] / (size_b[:, 1] + eps))
    v = 4 / math.pi**2 * turn.square()
    return iou - apart / whole - v * (v / (1 - iou + v + eps)).detach()


def gfl_loss(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    reg_max: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Level by level; the positives picked by nonzero."""
    classes = cls_scores[0].shape[1]
    images = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    cls_norm = (labels >= 0).sum(1).clamp(min=1).sum()
    losses, start, weights = [], 0, gt_boxes.new_zeros(())
    for cls, reg, stride in zip(cls_scores, reg_preds, strides):
        height, width = cls.shape[2:]
        part = slice(start, start + height * width)
        start += height * width
        cls = cls.permute(0, 2, 3, 1).reshape(-1, classes)
        reg = reg.permute(0, 2, 3, 1).reshape(-1, 4 * (reg_max + 1))
        label = labels[:, part].reshape(-1)
        rows = (label >= 0).nonzero().squeeze(1)
        score = torch.zeros(len(label), dtype=widen(cls[:0]).dtype, device=cls.device)
        box = edge = reg.sum() * 0
        if len(rows):
            true = gt_boxes[images[:, part].reshape(-1)[rows], matched[:, part].reshape(-1)[rows]] / stride
            centre = grid(height, width, cls.device).repeat(len(labels), 1)[rows]
            predicted = distance_to_box(centre, integral(reg[rows], reg_max))
            weight = cls.detach()[rows].sigmoid().amax(1).to(score.dtype)
            weights = weights + weight.sum()
            score[rows] = 1 - element_iou(predicted.detach(), true)
            box = box_iou_loss(predicted, true, weight, ONE, "giou")
            target = box_to_distance(centre, true, float(reg_max)).reshape(-1)
            spread = weight[:, None].expand(-1, 4).reshape(-1)
            edge = dfl(reg[rows].reshape(-1, reg_max + 1), target.to(score.dtype), spread, FOUR)
        label = torch.where(label < 0, classes, label)
        losses.append((qfl(cls, (label, score), torch.ones_like(score), cls_norm - MEAN_EPS), box, edge))
    norm = weights.clamp(min=1)
    cls, box, edge = (sum(parts) for parts in zip(*losses))
    return CLS_WEIGHT * cls, BOX_WEIGHT * box / norm, DFL_WEIGHT * edge / norm


def dense_gfl_loss(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    reg_max: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One graph of fixed shapes: dense QFL, and slots for nine positives per level and box, zero where unused."""
    batch, slots = gt_boxes.shape[:2]
    classes = cls_scores[0].shape[1]
    cls_norm = (labels >= 0).sum(1).clamp(min=1).sum()
    losses, start, weights = [], 0, gt_boxes.new_zeros(())
    for cls, reg, stride in zip(cls_scores, reg_preds, strides):
        height, width = cls.shape[2:]
        cells = height * width
        part = slice(start, start + cells)
        start += cells
        cls = cls.permute(0, 2, 3, 1).reshape(-1, classes)
        label = labels[:, part].reshape(-1)
        slots_in_level = min(9 * slots * batch, label.numel())
        rows = torch.nonzero_static(label >= 0, size=slots_in_level, fill_value=-1).squeeze(1)
        used = (rows >= 0).to(widen(cls[:0]).dtype)
        rows = rows.clamp(min=0)
        image, cell = rows // cells, rows % cells
        true = gt_boxes[image, matched[:, part].reshape(-1)[rows].clamp(min=0)] / stride
        sides = reg.reshape(batch, -1, cells)[image, :, cell]
        centre = torch.stack([cell % width, cell // width], 1).to(gt_boxes.dtype)
        distance = dense_integral(sides, reg_max)
        predicted = torch.cat([centre - distance[:, :2], centre + distance[:, 2:]], 1)
        weight = cls.detach()[rows].sigmoid().amax(1).to(used.dtype) * used
        weights = weights + weight.sum()
        iou = 1 - element_iou(predicted.detach(), true)
        score = torch.zeros(label.shape, dtype=used.dtype, device=cls.device).index_add(0, rows, iou * used)
        # Unused slots hold cell 0's box, which is finite, with weight 0.
        box = box_iou_loss(predicted, true, weight, ONE, "giou")
        target = box_to_distance(centre, true, float(reg_max)).reshape(-1)
        edge = dense_dfl(sides.reshape(-1, reg_max + 1), target, weight.repeat_interleave(4), FOUR)
        background = torch.where(label < 0, classes, label)
        losses.append((dense_qfl(cls, (background, score), torch.ones_like(score), cls_norm - MEAN_EPS), box, edge))
    norm = weights.clamp(min=1)
    cls, box, edge = (sum(parts) for parts in zip(*losses))
    return CLS_WEIGHT * cls, BOX_WEIGHT * box / norm, DFL_WEIGHT * edge / norm


def yolo_loss(
    reg_preds: Sequence[Tensor],
    cls_scores: Sequence[Tensor],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    bins: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ultralytics has it: all boxes decoded, dense targets of the classes, positives picked by nonzero."""
    sizes, device = [m.shape[2:] for m in cls_scores], gt_boxes.device
    x = widen(torch.cat([m.flatten(2) for m in cls_scores], 2).transpose(1, 2).contiguous())
    sides = torch.cat([m.flatten(2) for m in reg_preds], 2).transpose(1, 2).contiguous()
    points = torch.cat([grid(h, w, device) for h, w in sizes]) + 0.5
    step = torch.cat([torch.full((h * w, 1), s, device=device) for (h, w), s in zip(sizes, strides)])
    distance = integral(sides, bins - 1)
    boxes = torch.cat([points - distance[..., :2], points + distance[..., 2:]], -1)
    labels, matched, score = task_aligned(
        x.detach().sigmoid(), (boxes.detach() * step).float(), points * step, gt_boxes, gt_labels, strides[1]
    )
    target = F.one_hot(labels.clamp(min=0), x.shape[2]) * score[..., None]
    norm = score.sum().clamp(min=1)
    cls = F.binary_cross_entropy_with_logits(x, target.to(x.dtype), reduction="none").sum() / norm
    image, place = (labels >= 0).nonzero(as_tuple=True)
    true = gt_boxes[image, matched[image, place]] / step[place]
    weight = score[image, place]
    box = ((1 - complete_iou(boxes[image, place], true)) * weight).sum() / norm
    centre = points[place]
    edge = torch.cat([centre - true[:, :2], true[:, 2:] - centre], 1).clamp(0, bins - 1.01)
    left = edge.long()
    log_p = widen(sides[image, place]).unflatten(1, (4, bins)).log_softmax(-1)
    below, above = (log_p.gather(2, (left + i)[..., None])[..., 0] for i in (0, 1))
    dfl = -((below * (left + 1 - edge) + above * (edge - left)).mean(1) * weight).sum() / norm
    return 7.5 * box, 0.5 * cls, 1.5 * dfl


def rtmdet_loss(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """As mmdet has it: all boxes decoded, the positives picked by nonzero. Centres lie in the middle of their cells."""
    sizes, device = [m.shape[2:] for m in cls_scores], gt_boxes.device
    x, sides = (torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2) for maps in (cls_scores, reg_preds))
    points = torch.cat([(grid(h, w, device) + 0.5) * s for (h, w), s in zip(sizes, strides)])
    step = torch.cat([torch.full((h * w,), s, device=device) for (h, w), s in zip(sizes, strides)])
    boxes = distance_to_box(points, widen(sides))
    labels, matched, overlap = dynamic_soft_labels(
        x.detach(), boxes.detach().float(), points, step, gt_boxes.float(), gt_labels
    )
    score, norm = overlap.to(boxes.dtype), overlap.sum().clamp(min=1) - MEAN_EPS
    flat, target = widen(x).flatten(0, 1), (labels.flatten(), score.flatten())
    cls = qfl(flat, target, torch.ones_like(target[1]), norm)
    image, place = (labels >= 0).nonzero(as_tuple=True)
    true = gt_boxes[image, matched[image, place]].to(boxes.dtype)
    box = box_iou_loss(boxes[image, place], true, score[image, place], norm, "giou", 1e-6)
    return CLS_WEIGHT * cls, BOX_WEIGHT * box


def element_iou(pred: Tensor, target: Tensor) -> Tensor:
    """1 − IoU of each pair."""
    extent = (torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])).clamp(min=0)
    common = extent[:, 0] * extent[:, 1]
    union = (pred[:, 2:] - pred[:, :2]).prod(1) + (target[:, 2:] - target[:, :2]).prod(1) - common
    return 1 - common / union.clamp(min=1e-6)
