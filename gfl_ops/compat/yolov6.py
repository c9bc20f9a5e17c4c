# SPDX-License-Identifier: Apache-2.0
"""YOLOv6 (github.com/meituan/YOLOv6) and the like: PP-YOLOE as super-gradients has it, and Paddle's.

`reg_max` is the last bin there, as in `gfl_ops`: 16 for 17 bins. Both losses are sums, for the caller to divide by the
sum of the target scores (`VarifocalLoss`), or do so themselves where it is above 1 (`BboxLoss`). YOLOv6 gives
probabilities to `VarifocalLoss`, super-gradients logits: ``VarifocalLoss(activated=False)``. With its labels
`assigned`, super-gradients' positives are ``fg_mask=assigned != num_classes``. `integral` decodes distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import accumulator
from ..functional import distribution_focal_loss, integral, varifocal_loss
from ..ops.boxes.iou import pairs
from ._task_aligned import YOLOv6Assigner as TaskAlignedAssigner

__all__ = ["BboxLoss", "TaskAlignedAssigner", "VarifocalLoss", "integral"]

# How far a target stays below the last bin, and what their GIoU adds to areas.
_MARGIN = 0.01
_EPS = 1e-10


class VarifocalLoss(nn.Module):
    """Varifocal loss (arXiv 2008.13367, eq. 2) of a batch, summed.

    Args:
        activated: the scores are probabilities, as in YOLOv6; else logits.
    """

    def __init__(self, activated: bool = True) -> None:
        super().__init__()
        self.activated = activated

    def forward(
        self, pred_score: Tensor, gt_score: Tensor, label: Tensor, alpha: float = 0.75, gamma: float = 2.0
    ) -> Tensor:
        """Sum of the losses of `pred_score`, of any shape, against `gt_score`; `label` is 1 at a positive's class.

        `gt_score` is above 0 only there. A positive of score 0 costs nothing.
        """
        counted = (gt_score > 0) | (label == 0)
        return varifocal_loss(
            pred_score, gt_score, counted, alpha=alpha, gamma=gamma, reduction="sum", activated=self.activated
        )


class BboxLoss(nn.Module):
    """IoU and distribution focal losses of the boxes at the positives.

    Args:
        num_classes: not used; theirs has it.
        reg_max: the last bin, 1 to 128.
        use_dfl: the distances are distributions with a loss of their own.
        iou_type: "giou" or "diou".

    Raises:
        NotImplementedError: an `iou_type` of "ciou" or "siou", which theirs has too.
        ValueError: any other.
    """

    def __init__(self, num_classes: int, reg_max: int, use_dfl: bool = False, iou_type: str = "giou") -> None:
        super().__init__()
        if iou_type in ("ciou", "siou"):
            raise NotImplementedError(checks.message("BboxLoss", "iou_type", "must be 'giou' or 'diou'", iou_type))
        checks.choice("BboxLoss", "iou_type", iou_type, ("giou", "diou"))
        self.num_classes = num_classes
        self.reg_max = reg_max
        self.use_dfl = use_dfl
        self.iou_type = iou_type

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        fg_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The two losses, scalars, each positive weighted by its summed score, over `target_scores_sum` if above 1.

        Args:
            pred_dist: ``[B, A, 4(R+1)]`` logits.
            pred_bboxes: ``[B, A, 4]`` xyxy, in units of the stride.
            anchor_points: ``[A, 2]``, in units of the stride.
            target_bboxes: ``[B, A, 4]`` xyxy, in units of the stride.
            target_scores: ``[B, A, C]``.
            target_scores_sum: a tensor of one number; not read by the host.
            fg_mask: bool ``[B, A]``, the positives. Without any, both losses are 0, attached to the graph.
        """
        chosen = fg_mask.nonzero(as_tuple=True)
        weight = target_scores[chosen].sum(-1)
        weight = weight.to(accumulator(weight.dtype))
        boxes, norm = target_bboxes[chosen], target_scores_sum.to(weight.dtype).clamp(min=1)
        overlap = pairs("BboxLoss", pred_bboxes[chosen], boxes, self.iou_type, _EPS)
        loss_iou = (overlap * weight).sum() / norm
        if not self.use_dfl:
            return loss_iou, pred_dist.sum() * 0.0
        points = anchor_points.expand(*fg_mask.shape, 2)[chosen]
        target = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], 1).detach().to(weight.dtype)
        target = target.clamp(0, self.reg_max - _MARGIN).reshape(-1)
        logits = pred_dist[chosen].reshape(-1, self.reg_max + 1)
        rows = (weight / 4).repeat_interleave(4)
        return loss_iou, distribution_focal_loss(logits, target, rows, reduction="sum") / norm
