# SPDX-License-Identifier: Apache-2.0
"""What people use today, written out in plain PyTorch after the definitions of mmdet 3.3.0: the providers "eager".

16-bit logits are widened to fp32 first, as detectors do in mixed precision. `dense_*` are the forms that torch.compile
makes the most of: no nonzero, no indexed writes, one expression over all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BCE = F.binary_cross_entropy_with_logits
MEAN_EPS = 1.1920929e-07


def widen(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def average(loss: Tensor, weight: Tensor | None, factor: Tensor | float) -> Tensor:
    return (loss if weight is None else loss * weight).sum() / (factor + MEAN_EPS)


def qfl(pred: Tensor, label: Tensor, score: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Everything as background first, then the positives written over it."""
    pred = widen(pred)
    sigmoid = pred.sigmoid()
    loss = BCE(pred, torch.zeros_like(pred), reduction="none") * sigmoid.pow(2.0)
    rows = ((label >= 0) & (label < pred.size(1))).nonzero().squeeze(1)
    classes = label[rows].long()
    distance = score[rows] - sigmoid[rows, classes]
    loss[rows, classes] = BCE(pred[rows, classes], score[rows], reduction="none") * distance.abs().pow(2.0)
    return average(loss.sum(1), weight, factor)


def dense_qfl(pred: Tensor, label: Tensor, score: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    pred = widen(pred)
    target = torch.where(label[:, None] == torch.arange(pred.size(1), device=pred.device), score[:, None], 0.0)
    loss = BCE(pred, target, reduction="none") * (target - pred.sigmoid()).square()
    return average(loss.sum(1), weight, factor)


def focal(pred: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    pred = widen(pred)
    p = pred.sigmoid()
    missed = (1 - p) * target + p * (1 - target)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return BCE(pred, target, reduction="none") * balance * missed.pow(gamma)


def varifocal(pred: Tensor, target: Tensor, factor: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    pred = widen(pred)
    positive = (target > 0).to(target.dtype)
    weight = target * positive + alpha * (pred.sigmoid() - target).abs().pow(gamma) * (1 - positive)
    return average(BCE(pred, target, reduction="none") * weight, None, factor)


def dfl(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Two cross entropies, each with its own softmax."""
    pred = widen(pred)
    left = target.long()
    right = left + 1
    loss = F.cross_entropy(pred, left, reduction="none") * (right - target)
    loss = loss + F.cross_entropy(pred, right, reduction="none") * (target - left)
    return average(loss, weight, factor)


def dense_dfl(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The two bins' weights are a hat function of the bin's distance to the target: one log-softmax, no gather."""
    bins = torch.arange(pred.size(1), device=pred.device)
    share = (1 - (bins - target[:, None]).abs()).clamp(min=0)
    return average(-(share * widen(pred).log_softmax(1)).sum(1), weight, factor)


def two_bin_dfl(
    pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor, weight: Tensor, factor: Tensor
) -> Tensor:
    pred = widen(pred)
    loss = F.cross_entropy(pred, left, reduction="none") * weight_left
    loss = loss + F.cross_entropy(pred, left + 1, reduction="none") * weight_right
    return average(loss, weight, factor)


def integral(pred: Tensor, reg_max: int) -> Tensor:
    pred = widen(pred)
    project = torch.linspace(0, reg_max, reg_max + 1, dtype=pred.dtype, device=pred.device)
    softmax = F.softmax(pred.reshape(-1, reg_max + 1), dim=1)
    return F.linear(softmax, project[None]).reshape(*pred.shape[:-1], 4)


def dense_integral(pred: Tensor, reg_max: int) -> Tensor:
    bins = torch.arange(reg_max + 1, device=pred.device)
    return (widen(pred).unflatten(-1, (4, reg_max + 1)).softmax(-1) * bins).sum(-1)


def dfl_integral(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    project = torch.linspace(0, pred.size(1) - 1, pred.size(1), dtype=widen(pred).dtype, device=pred.device)
    distance = F.linear(F.softmax(widen(pred), dim=1), project[None]).squeeze(1)
    return dfl(pred, target, weight, factor), distance


def dense_dfl_integral(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    bins = torch.arange(pred.size(1), device=pred.device)
    return dense_dfl(pred, target, weight, factor), (widen(pred).softmax(1) * bins).sum(1)


def distillation(pred: Tensor, teacher: Tensor, weight: Tensor, factor: Tensor, temperature: float) -> Tensor:
    """A softmax, a log-softmax, and the divergence of each element."""
    target = F.softmax(widen(teacher) / temperature, dim=1)
    log_p = F.log_softmax(widen(pred) / temperature, dim=1)
    loss = F.kl_div(log_p, target, reduction="none").mean(1) * temperature**2
    return average(loss, weight, factor)


def box_from_distance(points: Tensor, distance: Tensor, max_shape: tuple[float, float] | None = None) -> Tensor:
    x1, y1 = points[..., 0] - distance[..., 0], points[..., 1] - distance[..., 1]
    x2, y2 = points[..., 0] + distance[..., 2], points[..., 1] + distance[..., 3]
    boxes = torch.stack([x1, y1, x2, y2], -1)
    if max_shape is not None:
        boxes[..., 0::2].clamp_(min=0, max=max_shape[1])
        boxes[..., 1::2].clamp_(min=0, max=max_shape[0])
    return boxes


def distance_from_box(points: Tensor, boxes: Tensor, max_distance: float, eps: float = 0.1) -> Tensor:
    left, top = points[..., 0] - boxes[..., 0], points[..., 1] - boxes[..., 1]
    right, bottom = boxes[..., 2] - points[..., 0], boxes[..., 3] - points[..., 1]
    return torch.stack([side.clamp(min=0, max=max_distance - eps) for side in (left, top, right, bottom)], -1)


def decode(
    pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: tuple[float, float] | None = None
) -> Tensor:
    return box_from_distance(points, integral(pred, reg_max) * stride[:, None], max_shape)


def dense_decode(
    pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: tuple[float, float] | None = None
) -> Tensor:
    distance = dense_integral(pred, reg_max) * stride[:, None]
    boxes = torch.cat([points - distance[:, :2], points + distance[:, 2:]], 1)
    if max_shape is None:
        return boxes
    return boxes.clamp(min=0).minimum(boxes.new_tensor([max_shape[1], max_shape[0]] * 2))


def box_iou_loss(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor, kind: str, eps: float = 1e-7) -> Tensor:
    pred = widen(pred)
    extent = (torch.min(pred[:, 2:], target[:, 2:]) - torch.max(pred[:, :2], target[:, :2])).clamp(min=0)
    common = extent[:, 0] * extent[:, 1]
    w1, h1 = pred[:, 2] - pred[:, 0], pred[:, 3] - pred[:, 1]
    w2, h2 = target[:, 2] - target[:, 0], target[:, 3] - target[:, 1]
    union = w1 * h1 + w2 * h2 - common
    whole = torch.max(pred[:, 2:], target[:, 2:]) - torch.min(pred[:, :2], target[:, :2])
    if kind == "iou":
        return average(1 - common / union.clamp(min=eps), weight, factor)
    if kind == "giou":
        enclosing = (whole[:, 0] * whole[:, 1]).clamp(min=eps)
        iou = common / union.clamp(min=eps)
        return average(1 - (iou - (enclosing - union) / enclosing), weight, factor)
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
    return average(1 - value, weight, factor)


def pairwise_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    extent = (torch.min(a[:, None, 2:], b[None, :, 2:]) - torch.max(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    common = extent[..., 0] * extent[..., 1]
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return common / (area_a[:, None] + area_b[None] - common).clamp(min=eps)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """All overlaps first, 512 boxes at a time; then from the best to the last, who is left drops whom it overlaps."""
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes[order]
    over = torch.cat([pairwise_iou(some, boxes) > iou_threshold for some in boxes.split(512)])
    alive = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in range(len(boxes)):
        if alive[i]:
            alive[i + 1 :] &= ~over[i, i + 1 :]
    return order[alive]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, one_class: Any = nms) -> Tensor:
    """Each class moved to a place of its own; mmdet's and torchvision's coordinate trick."""
    moved = boxes + (idxs.to(boxes) * (boxes.max() + 1))[:, None]
    return one_class(moved, scores, iou_threshold)


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, limit: int, one_class: Any = nms
) -> tuple[Tensor, Tensor, Tensor]:
    rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
    kept = batched_nms(boxes[rows], scores[rows, labels], labels, iou_threshold, one_class)[:limit]
    return boxes[rows[kept]], scores[rows[kept], labels[kept]], labels[kept]


def soft_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, min_score: float) -> tuple[Tensor, Tensor]:
    """Linear decay, one box a step."""
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


def ultralytics_postprocess(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    size: tuple[int, int],
    reg_max: int,
    suppress: Any,
    limit: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ultralytics' way: everything is decoded, and its `non_max_suppression` takes one tensor ``[B, 4+C, A]``."""
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
    boxes, scores = torch.zeros((batch, limit, 4), device=device), torch.zeros((batch, limit), device=device)
    labels, count = torch.full((batch, limit), -1, device=device), torch.zeros(batch, dtype=torch.int32, device=device)
    for image, kept in enumerate(found):
        n = len(kept)
        boxes[image, :n], scores[image, :n], labels[image, :n] = kept[:, :4], kept[:, 4], kept[:, 5].long()
        count[image] = n
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
    """Image by image and level by level; every location's distribution is integrated."""
    batch, device = cls_scores[0].shape[0], cls_scores[0].device
    boxes, scores = torch.zeros((batch, limit, 4), device=device), torch.zeros((batch, limit), device=device)
    labels, count = torch.full((batch, limit), -1, device=device), torch.zeros(batch, dtype=torch.int32, device=device)
    for image in range(batch):
        found = []
        for cls, reg, stride in zip(cls_scores, reg_preds, strides):
            height, width = cls.shape[2:]
            y, x = torch.meshgrid(
                torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
            )
            points = torch.stack([x, y], -1).reshape(-1, 2).float() * stride
            probability = cls[image].permute(1, 2, 0).reshape(-1, cls.shape[1]).float().sigmoid()
            distance = integral(reg[image].permute(1, 2, 0).reshape(height * width, -1), reg_max) * stride
            valid = probability > 0.05
            pairs = valid.nonzero()
            value, order = probability[valid].sort(descending=True)
            value, order = value[:1000], order[:1000]
            rows, label = pairs[order].unbind(1)
            found.append((box_from_distance(points[rows], distance[rows], size), value, label))
        box, value, label = (torch.cat(parts) for parts in zip(*found))
        sized = (box[:, 2:] > box[:, :2]).all(1)
        box, value, label = box[sized], value[sized], label[sized]
        kept = batched_nms(box, value, label, 0.6, one_class)[:limit]
        n = len(kept)
        boxes[image, :n], scores[image, :n], labels[image, :n], count[image] = box[kept], value[kept], label[kept], n
    return boxes, scores, labels, count
