# SPDX-License-Identifier: Apache-2.0
"""Every public function; each is written and documented beside its operator in `gfl_ops.ops`."""

from .ops.atss import Assignment, atss_assign
from .ops.boxes import box_to_distance, distance_to_box
from .ops.decode import decode
from .ops.dfl import distribution_focal_loss
from .ops.dfl_integral import dfl_integral
from .ops.focal import sigmoid_focal_loss
from .ops.gfl_loss import HeadLoss, gfl_loss, head_loss_norms
from .ops.group_norm_relu import group_norm_relu
from .ops.integral import integral
from .ops.iou import box_iou_loss, giou_loss
from .ops.ld import distillation_loss
from .ops.multiclass_nms import multiclass_nms
from .ops.nms import batched_nms, nms
from .ops.postprocess import Detections, UncertainDetections, postprocess
from .ops.qfl import quality_focal_loss
from .ops.soft_nms import soft_nms
from .ops.vfl import varifocal_loss

__all__ = [
    "Assignment",
    "Detections",
    "HeadLoss",
    "UncertainDetections",
    "atss_assign",
    "batched_nms",
    "box_iou_loss",
    "box_to_distance",
    "decode",
    "dfl_integral",
    "distance_to_box",
    "distillation_loss",
    "distribution_focal_loss",
    "gfl_loss",
    "giou_loss",
    "group_norm_relu",
    "head_loss_norms",
    "integral",
    "multiclass_nms",
    "nms",
    "postprocess",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "soft_nms",
    "varifocal_loss",
]
