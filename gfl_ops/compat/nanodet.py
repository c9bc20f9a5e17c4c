# SPDX-License-Identifier: Apache-2.0
"""NanoDet and NanoDet-Plus (github.com/RangiLyu/nanodet): losses, `Integral`, `multiclass_nms`, NanoDet-Plus' assigner.

The losses are mmdet's: labels 0 to C − 1, anything else is background. In place of its own modules::

    from .nanodet import DistributionFocalLoss, DynamicSoftLabelAssigner, GIoULoss, Integral, QualityFocalLoss
    from .nanodet import multiclass_nms

For `gfl_ops.postprocess` and `gfl_ops.atss_assign`: NanoDet's centres are those of the cells, ``center_offset=0.5``,
and its priors' side is `octave_base_scale` of its configs, in strides (``anchor_scale``); reg_max is 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..core import checks
from ..losses import DistributionFocalLoss, GIoULoss, QualityFocalLoss
from ._dynamic_k import NanoDetAssigner as DynamicSoftLabelAssigner

__all__ = [
    "DistributionFocalLoss",
    "DynamicSoftLabelAssigner",
    "GIoULoss",
    "Integral",
    "QualityFocalLoss",
    "multiclass_nms",
]


class Integral(nn.Module):
    """Expected distances of distributions over 0 … R (arXiv 2006.04388, eq. 5), the leading dimensions kept.

    Args:
        reg_max: R, the last bin.
    """

    project: Tensor

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        reg_max = self.reg_max = checks.number("Integral", "reg_max", reg_max, 1, integer=True)
        self.register_buffer("project", torch.linspace(0, reg_max, reg_max + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[…, 4(R+1)]`` -> distances ``[…, 4]`` in bins, order l, t, r, b; at least fp32."""
        return functional.integral(x, self.reg_max)


def multiclass_nms(
    multi_bboxes: Tensor,
    multi_scores: Tensor,
    score_thr: float,
    nms_cfg: dict[str, Any],
    max_num: int = -1,
    score_factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Detections from boxes with a score for every class and the background.

    Args:
        multi_bboxes: ``[N, 4]``, shared by the classes, or ``[N, 4C]``.
        multi_scores: ``[N, C + 1]``; the last column, the background, is of no account.
        score_thr: only scores above it count.
        nms_cfg: ``iou_threshold``; ``class_agnostic``: boxes of different classes suppress each other.
        max_num: how many to return at most; 0 or less for all.
        score_factors: ``[N]``, multiplies the scores after the threshold.

    Returns:
        boxes with their scores ``[K, 5]``, by falling score, and labels, int64 ``[K]``. No gradient. Classes are
        compared: no offset costs low bits.

    Raises:
        TypeError, ValueError: as `gfl_ops.multiclass_nms`; a key of `nms_cfg` other than these, ``type`` ("nms") and
            ``split_thr``, which is of no account.
    """
    config = dict(nms_cfg)
    kind, threshold = config.pop("type", "nms"), config.pop("iou_threshold", None)
    agnostic = bool(config.pop("class_agnostic", False))
    config.pop("split_thr", None)
    if kind != "nms" or threshold is None or config:
        rule = "must have `iou_threshold`, and of others `type`, `class_agnostic` and `split_thr` only"
        raise ValueError(checks.message("compat.nanodet.multiclass_nms", "nms_cfg", rule, nms_cfg))
    scores = multi_scores[:, :-1]
    if score_factors is None and not agnostic:
        found = functional.multiclass_nms(multi_bboxes, scores, score_thr, float(threshold), max_num)
        return torch.cat([found[0], found[1][:, None]], 1), found[2]
    row, label = (scores > score_thr).nonzero(as_tuple=True)
    boxes = multi_bboxes[row] if multi_bboxes.shape[1] == 4 else multi_bboxes.unflatten(1, (-1, 4))[row, label]
    score = scores[row, label]
    score = score if score_factors is None else score * score_factors[row]
    group = torch.zeros_like(label) if agnostic else label
    keep = functional.batched_nms(boxes, score, group, float(threshold))
    keep = keep[:max_num] if max_num > 0 else keep
    return torch.cat([boxes[keep], score[keep, None]], 1), label[keep]
