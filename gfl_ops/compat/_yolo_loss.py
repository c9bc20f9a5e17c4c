# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""ultralytics' whole detection loss by ours: a method that stands in for v8DetectionLoss' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.bins.integral import MAX_REG_MAX
from ..ops.head.yolo_loss import assigned_loss


def _padded(loss: Any, batch: Any, images: int, image_size: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes ``[B, G, 4]`` in pixels and labels ``[B, G]``, −1 where a slot is empty, by their padding."""
    rows = torch.cat((batch["batch_idx"].view(-1, 1), batch["cls"].view(-1, 1), batch["bboxes"]), 1)
    targets = loss.preprocess(rows.to(loss.device), images, scale_tensor=image_size[[1, 0, 1, 0]])
    labels, boxes = targets.split((1, 4), 2)
    return boxes, torch.where(boxes.sum(2) > 0, labels[..., 0].long(), -1)


def _parts(loss: Any, preds: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Class maps ``[B, C, A]``, box maps ``[B, 4·bins, A]``, and maps of the levels' sizes."""
    if isinstance(preds, dict):
        return preds["scores"], preds["boxes"], preds["feats"]
    maps = preds[1] if isinstance(preds, tuple) else preds
    boxes, scores = torch.cat([m.flatten(2) for m in maps], 2).split((4 * loss.reg_max, loss.nc), 1)
    return scores, boxes, maps


def detection_loss(theirs: Any, method: str, assigner: Any, bbox_loss: Any, enlarges: bool) -> Callable[..., Any]:
    """The method that computes a batch's loss, ours for plain detection, their own for what a subclass defines anew.

    Args:
        theirs: v8DetectionLoss.
        method: "loss" in 8.4, before that "__call__".
        assigner, bbox_loss: their classes.
        enlarges: their assigner makes any side at least the second stride, as 8.4 does.
    """
    original = getattr(theirs, method)
    steps = {name: value for name, value in vars(theirs).items() if callable(value)}
    for name in ("__init__", "__call__", method):
        steps.pop(name, None)

    def plain(loss: Any) -> bool:
        return (
            all(getattr(type(loss), name) is value for name, value in steps.items())
            and type(loss.assigner) is assigner
            and type(loss.bbox_loss) is bbox_loss
            and type(loss.bce) is torch.nn.BCEWithLogitsLoss
            and loss.bce.weight is loss.bce.pos_weight is getattr(loss, "class_weights", None) is None
            and 1 <= loss.reg_max <= MAX_REG_MAX + 1
        )

    def call(self: Any, preds: Any, batch: Any) -> tuple[Tensor, Any]:
        """Their call and results: the three losses times the images, and without."""
        if not plain(self):
            return original(self, preds, batch)
        scores, boxes, maps = _parts(self, preds)
        images = len(scores)
        image_size = torch.tensor(maps[0].shape[2:], device=self.device, dtype=scores.dtype) * self.stride[0]
        gt_boxes, gt_labels = _padded(self, batch, images, image_size)
        settings, hyp = self.assigner, self.hyp
        # Times the images here, so that 1 arrives as the losses' gradient, which the forward pass has computed then.
        # 8.3 has no loss of distances without bins.
        dfl = hyp.dfl if enlarges or self.reg_max > 1 else 0.0
        found = assigned_loss(
            [scores],
            [boxes],
            [n for m in maps for n in m.shape[2:]],
            # The assigner of 8.4 has them too, as numbers, which are not read from the device.
            settings.stride if enlarges else self.stride.tolist(),
            gt_boxes,
            gt_labels,
            bins=self.reg_max,
            topk=settings.topk,
            topk2=getattr(settings, "topk2", settings.topk),
            alpha=settings.alpha,
            beta=settings.beta,
            gains=[gain * images for gain in (hyp.box, hyp.cls, dfl)],
            min_side=float(settings.stride_val) if enlarges else 0.0,
        )
        total = torch.stack([found.box, found.cls, found.dfl]).float()
        items = total.detach() / max(images, 1)
        return total, dict(zip(self.loss_names, items)) if method == "loss" else items

    return call
