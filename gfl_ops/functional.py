# SPDX-License-Identifier: Apache-2.0
"""Every public function; each is written and documented beside its operator in `gfl_ops.ops`."""

from .ops.atss import Assignment, atss_assign
from .ops.focal import sigmoid_focal_loss
from .ops.iou import box_iou_loss, giou_loss
from .ops.nms import batched_nms, nms
from .ops.postprocess import Detections, postprocess
from .ops.qfl import quality_focal_loss
from .ops.vfl import varifocal_loss

__all__ = [
    "Assignment",
    "Detections",
    "atss_assign",
    "batched_nms",
    "box_iou_loss",
    "giou_loss",
    "nms",
    "postprocess",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "varifocal_loss",
]
