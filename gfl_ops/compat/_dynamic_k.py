# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""Assigners with a dynamic k of other frameworks, by ours: methods that stand in for those of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional import dynamic_soft_label_assign, simota_assign
from ..ops.head.atss import Assignment

# What mmdet's assigners give as the overlap of a prior without a box.
NO_OVERLAP, _NO_OVERLAP_SIMOTA = -100000000.0, -100000.0


class AssignResult(NamedTuple):
    """What mmdet and NanoDet call so: 1-based box of each prior, 0 for none, its overlap and its label."""

    num_gts: int
    gt_inds: Tensor
    max_overlaps: Tensor
    labels: Tensor


def result_of(found: Assignment, boxes: int, no_overlap: float) -> AssignResult:
    """Of one image. Nothing is positive where no prior lies in a box: the overlaps are 0 then."""
    matched = found.matched[0]
    positive = matched >= 0
    without = torch.where(positive.any(), no_overlap, 0.0)
    return AssignResult(boxes, matched + 1, torch.where(positive, found.iou[0], without), found.labels[0])


def plain_iou(assigner: Any, *tensors: Tensor) -> bool:
    """Whether an assigner measures overlap as ours does, of tensors that are fp32 and not empty."""
    from mmdet.models.task_modules.assigners.iou2d_calculator import BboxOverlaps2D

    return (
        type(assigner.iou_calculator) is BboxOverlaps2D
        and assigner.iou_calculator.dtype is None
        and all(type(t) is Tensor and t.dtype == torch.float32 and t.numel() for t in tensors)
    )


def _mmdet(call: Callable[..., Assignment], no_overlap: float) -> Callable[..., Any]:
    """A maker of `assign`; `call` takes the assigner, scores, boxes, and what both of our functions do by name."""

    def assign_by(original: Any) -> Callable[..., Any]:
        def assign(
            self: Any, pred_instances: Any, gt_instances: Any, gt_instances_ignore: Any = None, **others: Any
        ) -> Any:
            """mmdet's call and its AssignResult: 1-based box of each prior, 0 for none."""
            from mmdet.models.task_modules.assigners import AssignResult as TheirResult

            priors, boxes, truth = pred_instances.priors, pred_instances.bboxes, gt_instances.bboxes
            if not plain_iou(self, priors, boxes, truth) or priors.shape[1] != 4 or hasattr(gt_instances, "masks"):
                return original(self, pred_instances, gt_instances, gt_instances_ignore, **others)
            found = call(
                self,
                pred_instances.scores[None],
                boxes[None],
                level_sizes=None,
                strides=None,
                gt_boxes=truth[None],
                gt_labels=gt_instances.labels[None],
                points=priors,
            )
            result = result_of(found, len(truth), no_overlap)
            return TheirResult(result.num_gts, result.gt_inds, result.max_overlaps, labels=result.labels)

        return assign

    return assign_by


def _soft_label(self: Any, *arguments: Any, **named: Any) -> Assignment:
    return dynamic_soft_label_assign(
        *arguments, **named, topk=self.topk, iou_weight=self.iou_weight, soft_center_radius=self.soft_center_radius
    )


def _simota(self: Any, *arguments: Any, **named: Any) -> Assignment:
    return simota_assign(
        *arguments,
        **named,
        center_radius=self.center_radius,
        candidate_topk=self.candidate_topk,
        iou_weight=self.iou_weight,
        cls_weight=self.cls_weight,
    )


# DynamicSoftLabelAssigner's and SimOTAAssigner's `assign`, served by ours for fp32 boxes without masks, else by theirs.
soft_label_assign = _mmdet(_soft_label, NO_OVERLAP)
simota_by = _mmdet(_simota, _NO_OVERLAP_SIMOTA)


def batch_soft_label_forward(original: Any) -> Callable[..., Any]:
    """BatchDynamicSoftLabelAssigner's `forward`, served by ours for upright fp32 boxes, else by `original`."""

    @torch.no_grad()
    def forward(
        self: Any,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        priors: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        pad_bbox_flag: Tensor,
    ) -> dict[str, Tensor]:
        """mmyolo's call: `assigned_labels`, `assigned_labels_weights`, `assigned_bboxes` and `assign_metrics`."""
        ours = plain_iou(self, priors, pred_bboxes, gt_bboxes) and gt_bboxes.shape[-1] == priors.shape[-1] == 4
        if not ours:
            return original(self, pred_bboxes, pred_scores, priors, gt_labels, gt_bboxes, pad_bbox_flag)
        found = dynamic_soft_label_assign(
            pred_scores,
            pred_bboxes,
            None,
            None,
            gt_bboxes,
            torch.where(pad_bbox_flag[..., 0].bool(), gt_labels[..., 0].long(), -1),
            points=priors,
            topk=self.topk,
            iou_weight=self.iou_weight,
            soft_center_radius=self.soft_center_radius,
            variant="mmyolo",
        )
        positive = found.matched >= 0
        boxes = gt_bboxes.gather(1, found.matched.clamp(min=0)[..., None].expand(-1, -1, 4))
        return {
            "assigned_labels": torch.where(positive, found.labels, self.num_classes),
            "assigned_labels_weights": torch.ones_like(found.iou),
            "assigned_bboxes": torch.where(positive[..., None], boxes, 0.0),
            "assign_metrics": found.iou,
        }

    return forward


class NanoDetAssigner:
    """NanoDet-Plus' `DynamicSoftLabelAssigner`: constructor, call and results.

    Args:
        topk: how many overlaps the number of a box's priors is the sum of.
        iou_factor: weight of the overlap in the cost.
    """

    def __init__(self, topk: int = 13, iou_factor: float = 3.0) -> None:
        self.topk = topk
        self.iou_factor = iou_factor

    @torch.no_grad()
    def assign(
        self, pred_scores: Tensor, priors: Tensor, decoded_bboxes: Tensor, gt_bboxes: Tensor, gt_labels: Tensor
    ) -> AssignResult:
        """The box of each prior of one image.

        Args:
            pred_scores: ``[A, C]`` probabilities.
            priors: ``[A, 4]`` (x, y, stride, stride along y) in pixels.
            decoded_bboxes: ``[A, 4]`` xyxy in pixels.
            gt_bboxes: ``[G, 4]`` xyxy in pixels.
            gt_labels: ``[G]``.

        Returns:
            `num_gts`; `gt_inds` ``[A]``, the box of a prior counted from 1, 0 for none; `max_overlaps` ``[A]``, the
            overlap of a positive; `labels` ``[A]``, −1 for none.
        """
        found = dynamic_soft_label_assign(
            pred_scores[None],
            decoded_bboxes[None],
            None,
            None,
            gt_bboxes[None],
            gt_labels[None].long(),
            points=priors,
            topk=self.topk,
            iou_weight=self.iou_factor,
            variant="nanodet",
        )
        return result_of(found, len(gt_bboxes), NO_OVERLAP)
