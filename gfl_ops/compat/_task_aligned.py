# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""Task-aligned assigners of other frameworks, by ours: modules, and methods that stand in for those of theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import task_aligned_assign
from ..ops.head.task_aligned_reference import overlap, scores_in_double
from ._dynamic_k import NO_OVERLAP, plain_iou


class Targets(NamedTuple):
    """Dense targets of every location; those of the background are the first box's, with scores of 0."""

    labels: Tensor
    boxes: Tensor
    scores: Tensor
    positive: Tensor
    matched: Tensor


def dense_targets(
    pred_scores: Tensor,
    pred_boxes: Tensor,
    points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    mask: Tensor,
    classes: int,
    **options: Any,
) -> Targets:
    """`task_aligned_assign`'s result as the frameworks have it, for at least one slot.

    Args:
        pred_scores: ``[B, A, C]`` probabilities.
        pred_boxes: ``[B, A, 4]`` xyxy in pixels.
        points: ``[A, 2]`` in pixels.
        gt_labels, mask: ``[B, G, 1]`` of any dtype; a slot counts where its mask is not 0.
        gt_boxes: ``[B, G, 4]``.
        classes: size of the scores' last dimension.
        options: of `task_aligned_assign`.
    """
    labels = gt_labels[..., 0].long()
    padded = torch.where(mask[..., 0].bool(), labels, -1)
    found = task_aligned_assign(pred_scores, pred_boxes, None, None, gt_boxes, padded, points=points, **options)
    slot = found.matched.clamp(min=0)
    target = labels.gather(1, slot).clamp(min=0)
    boxes = gt_boxes.gather(1, slot[..., None].expand(-1, -1, 4))
    positive, dtype = found.matched >= 0, torch.promote_types(pred_scores.dtype, pred_boxes.dtype)
    learnt = found.scores.to(dtype)
    if dtype == torch.float64:
        score = pred_scores.gather(2, target[..., None])[..., 0]
        kind = options.get("overlap", "iou" if options.get("variant") == "yolov6" else "ciou")
        learnt = scores_in_double(
            "ciou" if kind == "ciou" else "clipped_iou",
            score,
            pred_boxes,
            boxes,
            positive,
            slot,
            gt_boxes.shape[1],
            *(options[name] for name in ("alpha", "beta", "eps")),
        )
    scores = learnt.new_zeros((*target.shape, classes)).scatter_(2, target[..., None], learnt[..., None])
    return Targets(target, boxes, scores, positive, slot)


class TaskAlignedAssigner(nn.Module):
    """ultralytics' assigner (8.4): constructor, call and results.

    Args:
        topk: candidates per box.
        num_classes: size of the target scores' last dimension.
        alpha, beta: exponents of score and overlap.
        stride: pixels per cell of each level; sides below the second count as long as that. [8, 16, 32] by default.
        eps: of the normalisation.
        topk2: how many of its locations a box keeps; `topk` by default.
    """

    def __init__(
        self,
        topk: int = 13,
        num_classes: int = 80,
        alpha: float = 1.0,
        beta: float = 6.0,
        stride: list[float] | None = None,
        eps: float = 1e-9,
        topk2: int | None = None,
    ) -> None:
        super().__init__()
        self.topk = topk
        self.topk2 = topk2 or topk
        self.num_classes = num_classes
        self.alpha = alpha
        self.beta = beta
        self.stride = stride if stride is not None else [8, 16, 32]
        self.stride_val = self.stride[1] if len(self.stride) > 1 else self.stride[0]
        self.eps = eps

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Labels ``[B, A]``, boxes ``[B, A, 4]``, scores ``[B, A, C]``, mask and slots ``[B, A]`` of the targets.

        Args:
            pd_scores: ``[B, A, C]`` probabilities.
            pd_bboxes: ``[B, A, 4]`` xyxy in pixels.
            anc_points: ``[A, 2]`` in pixels.
            gt_labels, mask_gt: ``[B, G, 1]``; a slot counts where its mask is not 0.
            gt_bboxes: ``[B, G, 4]`` xyxy in pixels.
        """
        return _ultralytics(
            self, float(self.stride_val), pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt
        )


def _without_objects(scores: Tensor, boxes: Tensor, background: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, boxes, scores and mask of a batch without a slot, which have the scores' dtype there."""
    first = scores[..., 0]
    labels = torch.full_like(first, background)
    return labels, torch.zeros_like(boxes), torch.zeros_like(scores), torch.zeros_like(first)


def _ultralytics(
    settings: Any,
    min_side: float,
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    gt_labels: Tensor,
    gt_boxes: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not gt_boxes.shape[1]:
        *targets, none = _without_objects(scores, boxes, settings.num_classes)
        return (*targets, none > 0, none)  # type: ignore[return-value]
    found = dense_targets(
        scores,
        boxes,
        points,
        gt_labels,
        gt_boxes,
        mask,
        settings.num_classes,
        topk=settings.topk,
        topk2=getattr(settings, "topk2", None),
        alpha=settings.alpha,
        beta=settings.beta,
        eps=settings.eps,
        min_side=min_side,
    )
    return tuple(found)  # type: ignore[return-value]


def _enlarges(theirs: Any, side: float) -> bool:
    """Whether their assigner gives a box of that side, in the middle between points 8 pixels apart, a candidate."""
    box = torch.tensor([[[8 - side / 2, 8 - side / 2, 8 + side / 2, 8 + side / 2]]])
    points = torch.tensor([[1.0, 1.0]])
    arguments = (points, box, torch.ones(1, 1, 1))
    try:
        return bool(theirs.select_candidates_in_gts(*arguments).any())
    except TypeError:  # before 8.4 it takes no mask
        return bool(theirs.select_candidates_in_gts(*arguments[:2]).any())


def enlarges(theirs: Any) -> bool | None:
    """Whether their assigner makes any side at least the second stride, as 8.4 does; 8.3 leaves boxes as they are. None
    for those in between, where only sides below the first stride became that long, which ours does not do."""
    small, middling = (_enlarges(theirs(num_classes=1), side) for side in (6.0, 12.0))
    return small if small == middling else None


def ultralytics_forward(theirs: Any) -> Callable[..., Any]:
    """A `forward` for their class: ours for upright boxes, their own for what a subclass defines anew."""
    original, enlarged = theirs.forward, enlarges(theirs)
    steps = {name: value for name, value in vars(theirs).items() if callable(value) and name != "forward"}
    del steps["__init__"]

    @torch.no_grad()
    def forward(self: Any, *arguments: Any, **extra: Any) -> Any:
        """Their call and results."""
        plain = all(getattr(type(self), name) is value for name, value in steps.items())
        if not plain or extra or len(arguments) != 6 or enlarged is None:
            return original(self, *arguments, **extra)
        return _ultralytics(self, float(self.stride_val) if enlarged else 0.0, *arguments)

    return forward


class YOLOv6Assigner(nn.Module):
    """YOLOv6's `TaskAlignedAssigner`: constructor, call and results; PP-YOLOE's decides the same.

    Args:
        topk: candidates per box.
        num_classes: size of the target scores' last dimension.
        alpha, beta: exponents of score and overlap.
        eps: of the normalisation.
    """

    def __init__(
        self, topk: int = 13, num_classes: int = 80, alpha: float = 1.0, beta: float = 6.0, eps: float = 1e-9
    ) -> None:
        super().__init__()
        self.topk = topk
        self.num_classes = num_classes
        self.bg_idx = num_classes
        self.alpha = alpha
        self.beta = beta
        self.eps = eps

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels ``[B, A]``, boxes ``[B, A, 4]``, scores ``[B, A, C]`` and mask ``[B, A]`` of the targets."""
        if not gt_bboxes.shape[1]:
            return _without_objects(pd_scores, pd_bboxes, self.bg_idx)
        options = {"topk": self.topk, "alpha": self.alpha, "beta": self.beta, "eps": self.eps, "variant": "yolov6"}
        found = dense_targets(
            pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, self.num_classes, **options
        )
        return found[:4]


def mmyolo_forward(original: Any) -> Callable[..., Any]:
    """BatchTaskAlignedAssigner's `forward` by ours."""

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
        """mmyolo's call: `assigned_labels`, `assigned_bboxes`, `assigned_scores` and `fg_mask_pre_prior`."""
        if not gt_bboxes.shape[1]:
            return original(self, pred_bboxes, pred_scores, priors, gt_labels, gt_bboxes, pad_bbox_flag)
        found = dense_targets(
            pred_scores,
            pred_bboxes,
            priors[:, :2],
            gt_labels,
            gt_bboxes,
            pad_bbox_flag,
            self.num_classes,
            topk=self.topk,
            alpha=self.alpha,
            beta=self.beta,
            eps=self.eps,
            variant="yolov6",
            overlap="ciou" if self.use_ciou else "iou",
        )
        return {
            "assigned_labels": found.labels,
            "assigned_bboxes": found.boxes,
            "assigned_scores": found.scores,
            "fg_mask_pre_prior": found.positive,
        }

    return forward


def mmdet_assign(original: Any) -> Callable[..., Any]:
    """TaskAlignedAssigner's `assign`, served by ours for fp32 boxes, else by `original`."""

    def assign(
        self: Any,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        alpha: float = 1,
        beta: float = 6,
    ) -> Any:
        """mmdet's call and its AssignResult with `assign_metrics`: 1-based box of each prior, 0 for none."""
        from mmdet.models.task_modules.assigners import AssignResult

        priors, boxes, scores = pred_instances.priors, pred_instances.bboxes, pred_instances.scores
        truth, classes = gt_instances.bboxes, gt_instances.labels
        if not plain_iou(self, boxes, truth):
            return original(self, pred_instances, gt_instances, gt_instances_ignore, alpha, beta)
        found = task_aligned_assign(
            scores[None],
            boxes[None],
            None,
            None,
            truth[None],
            classes[None],
            points=(priors[:, :2] + priors[:, 2:4]) / 2.0,
            topk=self.topk,
            alpha=alpha,
            beta=beta,
            variant="mmdet",
        )
        matched = found.matched[0]
        reached = overlap("iou", truth[matched.clamp(min=0)], boxes.detach())
        result = AssignResult(
            len(truth), matched + 1, torch.where(matched >= 0, reached, NO_OVERLAP), labels=found.labels[0]
        )
        result.assign_metrics = found.scores[0]
        return result

    return assign
