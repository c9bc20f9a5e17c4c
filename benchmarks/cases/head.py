# SPDX-License-Identifier: Apache-2.0
"""The head as a whole: assignment, all of its losses, and the norm layers of its towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import formulas.head
import gfl_ops
from harness import Case
from inputs import CLASSES, STRIDES, Scene, level_sizes

from .common import accumulator


def atss(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    sizes, strides = level_sizes(scene.size), [float(s) for s in STRIDES]
    inputs = {"gt_boxes": scene.gt_boxes, "gt_labels": scene.gt_labels}

    def ours(gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return gfl_ops.atss_assign(sizes, strides, gt_boxes, gt_labels)

    def eager(gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas.head.atss(sizes, strides, gt_boxes, gt_labels)

    def agree(got: Any, want: Any) -> float:
        """Share of the positives, over 10: torch's top-k breaks exact ties of distance differently."""
        return int((got[1] != want[1]).sum()) / max(int((want[0] >= 0).sum()), 1) / 10

    what = f"{scene.labels.shape[1]} locations, {int((scene.gt_labels >= 0).sum())} boxes"
    yield Case("atss", "atss", what, inputs, ours, {"eager": eager}, agree=agree)


def predictions(scene: Scene, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor]:
    """Scores as the head has them; boxes some pixels off where a location has one, else a square around it."""
    device = scene.gt_boxes.device
    levels = zip(level_sizes(scene.size), STRIDES)
    points = torch.cat([(formulas.head.grid(h, w, device) + 0.5) * s for (h, w), s in levels])
    truth = scene.gt_boxes.gather(1, scene.matched.clamp(min=0)[..., None].expand(-1, -1, 4))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0)) * 4
    around = torch.cat([points - 40, points + 40], 1)
    inputs = {
        "scores": torch.cat([m.flatten(2).transpose(1, 2) for m in scene.head.cls_scores], 1).to(dtype),
        "boxes": torch.where(scene.matched[..., None] >= 0, truth, around) + noise.to(device),
        "gt_boxes": scene.gt_boxes,
        "gt_labels": scene.gt_labels,
    }
    return inputs, points


def moved(got: Any, want: Any) -> float:
    """Share of the positives that learn a score, over 10: metrics a rounding apart change places."""
    differs = (got[1] != want[1]) & ((got[2] > 0) | (want[2] > 0))
    return int(differs.sum()) / max(int((want[2] > 0).sum()), 1) / 10


def task_aligned(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    sizes, strides = level_sizes(scene.size), [float(s) for s in STRIDES]
    inputs, points = predictions(scene, dtype)
    inputs["scores"] = inputs["scores"].sigmoid()

    def ours(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return gfl_ops.task_aligned_assign(scores, boxes, sizes, strides, gt_boxes, gt_labels)

    def eager(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas.head.task_aligned(scores, boxes, points, gt_boxes, gt_labels, strides[1])

    what = f"{scene.labels.shape[1]} locations, {int((scene.gt_labels >= 0).sum())} boxes"
    yield Case("task_aligned", "task_aligned", what, inputs, ours, {"eager": eager}, agree=moved)


def dynamic_k(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    sizes, strides = level_sizes(scene.size), [float(s) for s in STRIDES]
    inputs, points = predictions(scene, dtype)
    stride = torch.cat([torch.full((h * w,), s, device=points.device) for (h, w), s in zip(sizes, strides)])

    def ours(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return gfl_ops.dynamic_soft_label_assign(scores, boxes, sizes, strides, gt_boxes, gt_labels)

    def eager(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas.head.dynamic_soft_labels(scores, boxes, points, stride, gt_boxes, gt_labels)

    what = f"{scene.labels.shape[1]} locations, {int((scene.gt_labels >= 0).sum())} boxes"
    yield Case("dynamic_k", "dynamic_k", what, inputs, ours, {"eager": eager}, agree=moved)


def gfl_loss(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    head, acc = scene.head, accumulator(dtype)
    inputs = {
        "cls_scores": [m.to(dtype) for m in head.cls_scores],
        "reg_preds": [m.to(dtype) for m in head.reg_preds],
        "labels": scene.labels,
        "matched": scene.matched,
        "iou": scene.iou,
        "gt_boxes": scene.gt_boxes.to(acc),
    }

    def ours(
        cls_scores: list[Tensor],
        reg_preds: list[Tensor],
        labels: Tensor,
        matched: Tensor,
        iou: Tensor,
        gt_boxes: Tensor,
    ) -> Any:
        assignment = gfl_ops.Assignment(labels, matched, iou)
        return tuple(gfl_ops.gfl_loss(cls_scores, reg_preds, head.strides, assignment, gt_boxes))[:3]

    def peer(formula: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            cls_scores: list[Tensor],
            reg_preds: list[Tensor],
            labels: Tensor,
            matched: Tensor,
            iou: Tensor,
            gt_boxes: Tensor,
        ) -> Any:
            return formula(cls_scores, reg_preds, head.strides, labels, matched, gt_boxes, head.reg_max)

        return call

    reads = sum(m.numel() * m.element_size() for m in inputs["cls_scores"]) + scene.labels.numel() * 16
    reads += scene.rows.numel() * inputs["reg_preds"][0].element_size()
    peers, dense = {"eager": peer(formulas.head.gfl_loss)}, peer(formulas.head.dense_gfl_loss)
    gradients = ("cls_scores", "reg_preds")
    what = f"{scene.batch} images, {scene.positives} positives"
    yield Case("gfl_loss", "gfl_loss", what, inputs, ours, peers, dense, gradients, reads=reads)


def head_loss_norms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs = {
        "cls_scores": [m.to(dtype) for m in scene.head.cls_scores],
        "labels": scene.labels,
        "matched": scene.matched,
        "iou": scene.iou,
    }

    def ours(cls_scores: list[Tensor], labels: Tensor, matched: Tensor, iou: Tensor) -> Tensor:
        return gfl_ops.head_loss_norms(cls_scores, gfl_ops.Assignment(labels, matched, iou))

    reads = scene.labels.numel() * 16 + scene.positives * CLASSES * dtype.itemsize
    what = f"{scene.batch} images, {scene.positives} positives"
    yield Case("head_loss_norms", "head_loss_norms", what, inputs, ours, reads=reads)


def group_norm_relu(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """One layer of a head's tower: 256 channels in 32 groups, all levels."""
    channels, groups, generator = 256, 32, torch.Generator().manual_seed(0)
    sizes = level_sizes(scene.size)
    # No value lies near a group's mean, where rounding decides whether ReLU passes the gradient.
    values = [torch.randn((scene.batch, channels, h, w), generator=generator) for h, w in sizes]
    maps = [(m + 0.3 * m.sign()).to(dtype) for m in values]
    acc = accumulator(dtype)
    parameters = {"weight": torch.rand(channels, generator=generator).to(acc), "bias": torch.zeros(channels, dtype=acc)}

    def ours(maps: list[Tensor], weight: Tensor, bias: Tensor) -> Any:
        return gfl_ops.group_norm_relu(maps, groups, weight, bias)

    def eager(maps: list[Tensor], weight: Tensor, bias: Tensor) -> Any:
        return [F.relu(F.group_norm(m, groups, weight.to(m.dtype), bias.to(m.dtype))) for m in maps]

    for name, layout in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        inputs = {"maps": [m.contiguous(memory_format=layout) for m in maps], **parameters}
        what = f"{scene.batch} images, {channels} channels, {name.upper()}"
        label, reached = f"norm+relu {name}", ("maps", "weight", "bias")
        yield Case("group_norm_relu", label, what, inputs, ours, {"eager": eager}, eager, reached)


def yolo_loss(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """With the assignment, and as many bins as the scene's head has."""
    head = scene.head
    bins = head.reg_max + 1
    inputs = {
        "reg_preds": [m.to(dtype) for m in head.reg_preds],
        "cls_scores": [m.to(dtype) for m in head.cls_scores],
        "gt_boxes": scene.gt_boxes,
        "gt_labels": scene.gt_labels,
    }

    def ours(reg_preds: list[Tensor], cls_scores: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return tuple(gfl_ops.yolo_loss(reg_preds, cls_scores, head.strides, gt_boxes, gt_labels, bins=bins))[:3]

    def eager(reg_preds: list[Tensor], cls_scores: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas.head.yolo_loss(reg_preds, cls_scores, head.strides, gt_boxes, gt_labels, bins)

    reads = sum(m.numel() * m.element_size() for name in ("reg_preds", "cls_scores") for m in inputs[name])
    gradients = ("cls_scores", "reg_preds")
    what = f"{scene.batch} images, {int((scene.gt_labels >= 0).sum())} boxes"
    yield Case("yolo_loss", "yolo_loss", what, inputs, ours, {"eager": eager}, None, gradients, reads=reads)
    yield rtmdet_loss(scene, dtype)


def rtmdet_loss(scene: Scene, dtype: torch.dtype) -> Case:
    """With the assignment; the boxes are those that the assigners' cases have."""
    strides, (given, points) = scene.head.strides, predictions(scene, dtype)
    boxes = given["boxes"]
    distance = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1).transpose(1, 2)
    sizes = level_sizes(scene.size)
    parts = distance.split([h * w for h, w in sizes], 2)
    inputs = {
        "cls_scores": [m.to(dtype) for m in scene.head.cls_scores],
        "reg_preds": [part.unflatten(2, size).to(dtype) for part, size in zip(parts, sizes)],
        "gt_boxes": scene.gt_boxes,
        "gt_labels": scene.gt_labels,
    }

    def ours(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        found = gfl_ops.rtmdet_loss(cls_scores, reg_preds, strides, gt_boxes, gt_labels, center_offset=0.5)
        return tuple(found)[:2]

    def eager(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas.head.rtmdet_loss(cls_scores, reg_preds, strides, gt_boxes, gt_labels)

    reads = sum(m.numel() * m.element_size() for name in ("reg_preds", "cls_scores") for m in inputs[name])
    what = f"{scene.batch} images, {int((scene.gt_labels >= 0).sum())} boxes"
    gradients = ("cls_scores", "reg_preds")
    return Case("yolo_loss", "rtmdet_loss", what, inputs, ours, {"eager": eager}, None, gradients, reads=reads)


MAKERS = {
    "atss": atss,
    "gfl_loss": gfl_loss,
    "head_loss_norms": head_loss_norms,
    "group_norm_relu": group_norm_relu,
    "task_aligned": task_aligned,
    "yolo_loss": yolo_loss,
    "dynamic_k": dynamic_k,
}
