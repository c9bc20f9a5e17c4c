# SPDX-License-Identifier: Apache-2.0
"""The whole loss of an RTMDet head: dynamic soft labels, quality focal loss of them, and GIoU of the positives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...core import checks
from ...core.dtypes import detached
from ..boxes.distance import box_of
from .atss import check_strides, per_level
from .dynamic_k import assign
from .head_inputs import check_gt_boxes, check_maps, check_weights, with_one_accumulator
from .task_aligned_reference import locations
from .yolo_loss import head_loss, joined, rows

OP = "rtmdet_loss"


class RtmdetLoss(NamedTuple):
    """The scalars that `rtmdet_loss` returns; see there."""

    cls: Tensor
    box: Tensor
    num_pos: Tensor
    score_sum: Tensor


def rtmdet_loss(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    topk: int = 13,
    iou_weight: float = 3.0,
    soft_center_radius: float = 3.0,
    center_offset: float | Sequence[float] = 0.0,
    beta: float = 2.0,
    loss_weights: Sequence[float] = (1.0, 2.0),
    variant: str = "mmdet",
) -> RtmdetLoss:
    r"""The whole loss of an RTMDet head, weighted and normalised: classes and boxes.

    .. math::
        L_{cls} = \frac{w_0}{n} \sum_{\text{locations}} \mathrm{QFL}, \quad
        L_{box} = \frac{w_1}{n} \sum_{\text{positives}} o \, (1 - \mathrm{GIoU}), \quad
        n = \max \Big( \sum o, 1 \Big)

    The boxes are decoded and `dynamic_soft_label_assign` assigns the locations; o is the overlap of a positive's box
    with the object, which its class learns by the quality focal loss, while all other classes learn 0. What the
    RTMDetHead of mmdet 3.3 or mmyolo 0.6 gives, summed over its levels. Lyu et al., RTMDet (arXiv 2212.07784).

    Args:
        cls_scores: one tensor per level, fp32, fp16, bf16 or fp64 ``[B, C, H, W]``: class logits.
        reg_preds: one tensor per level, ``[B, 4, H, W]``: distances to the left, top, right and bottom side, in pixels
            as mmdet's head gives them (mmyolo's are in cells: times the stride). The dtype may differ from that of
            `cls_scores`. Any memory format.
        strides: pixels per cell of each level, > 0.
        gt_boxes: ``[B, G, 4]`` xyxy in pixels.
        gt_labels: integer ``[B, G]``, in [0, C); a slot with any other label, −1 for padding, holds no box, nor does
            one with a coordinate that is not finite.
        topk, iou_weight, soft_center_radius: of `dynamic_soft_label_assign`.
        center_offset: position of a location within its cell, in cells; one number, or one per level.
        beta: exponent of the quality focal loss, >= 0.
        loss_weights: w, of the class and box loss.
        variant: "mmdet" or "mmyolo", of `dynamic_soft_label_assign`.

    Returns:
        ``RtmdetLoss(cls, box, num_pos, score_sum)``: the two losses, the number of positives and Σ o, as scalars on the
        maps' device; fp32, or fp64 for fp64 maps.

    The gradient reaches `cls_scores` and `reg_preds`, through the losses alone: not through the assignment, o or n.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Arithmetic in fp32 (fp64 for fp64, but for the assigner's), whatever autocast says. Repeatable bit for bit;
        nothing waits for the device, and no target ``[B, A, C]`` is made. Without positives `box` is 0 and still
        attached to the graph. mmdet's n is a mean over ranks: with several, multiply both losses by
        ``score_sum.clamp(min=1) / mean.clamp(min=1)``. NanoDet-Plus' loss is `gfl_loss` of what
        `dynamic_soft_label_assign` gives with its variant.
    """
    checks.choice(OP, "variant", variant, ("mmdet", "mmyolo"))
    images, _classes = check_maps(OP, cls_scores, reg_preds, "4", 4)
    stride_list = check_strides(OP, strides, len(cls_scores))
    offsets = per_level(OP, "center_offset", center_offset, len(cls_scores))
    check_gt_boxes(OP, gt_boxes, images, cls_scores[0])
    cls_maps, reg_maps, acc = with_one_accumulator(cls_scores, reg_preds)
    beta = checks.number(OP, "beta", beta, 0, dtype=acc)
    weights = check_weights(OP, "loss_weights", loss_weights, "two", acc)
    sizes = [(m.shape[2], m.shape[3]) for m in cls_maps]
    flat = [n for size in sizes for n in size]
    logits = rows(joined([detached(m) for m in cls_maps]))
    points = locations(flat, stride_list, offsets, logits.device)
    boxes = box_of(points.to(acc), rows(joined([detached(m) for m in reg_maps])).to(acc), None)
    found = assign(
        OP,
        "cls_scores",
        logits,
        boxes,
        sizes,
        stride_list,
        gt_boxes,
        gt_labels,
        offsets,
        None,
        variant,
        {"topk": topk, "iou_weight": iou_weight, "cls_weight": 1.0, "soft_center_radius": soft_center_radius},
    )
    cls, box, _none, num_pos, score_sum = head_loss(
        cls_maps,
        reg_maps,
        flat,
        stride_list,
        offsets,
        found.labels,
        found.matched,
        found.iou.to(acc),
        gt_boxes.detach().to(acc),
        1,
        [*weights, 0.0],
        beta,
        "rtmdet",
    )
    return RtmdetLoss(cls, box, num_pos.detach(), score_sum.detach())
