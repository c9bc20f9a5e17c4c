# SPDX-License-Identifier: Apache-2.0
"""Every public function; each is written and documented beside its operator in `gfl_ops.ops`."""

from .ops.bins.decode import decode
from .ops.bins.dfl import dfl_integral, distribution_focal_loss
from .ops.bins.integral import integral
from .ops.bins.ld import distillation_loss
from .ops.boxes.distance import box_to_distance, distance_to_box
from .ops.boxes.iou import box_iou_loss, giou_loss
from .ops.head.atss import Assignment, atss_assign
from .ops.head.dynamic_k import dynamic_soft_label_assign, simota_assign
from .ops.head.gfl_loss import HeadLoss, gfl_loss
from .ops.head.group_norm_relu import group_norm_relu
from .ops.head.head_loss_norms import head_loss_norms
from .ops.head.rtmdet_loss import RtmdetLoss, rtmdet_loss
from .ops.head.task_aligned import TaskAlignedAssignment, task_aligned_assign
from .ops.head.yolo_loss import YoloLoss, yolo_loss
from .ops.score.focal import sigmoid_focal_loss
from .ops.score.mal import matchability_aware_loss
from .ops.score.qfl import quality_focal_loss
from .ops.score.soft_bce import soft_target_bce
from .ops.score.vfl import varifocal_loss
from .ops.select.multiclass_nms import multiclass_nms
from .ops.select.nms import batched_nms, nms
from .ops.select.postprocess import Detections, postprocess
from .ops.select.soft_nms import soft_nms
from .ops.select.uncertainty import side_distributions, side_uncertainty

__all__ = [
    "Assignment",
    "Detections",
    "HeadLoss",
    "RtmdetLoss",
    "TaskAlignedAssignment",
    "YoloLoss",
    "atss_assign",
    "batched_nms",
    "box_iou_loss",
    "box_to_distance",
    "decode",
    "dfl_integral",
    "distance_to_box",
    "distillation_loss",
    "distribution_focal_loss",
    "dynamic_soft_label_assign",
    "gfl_loss",
    "giou_loss",
    "group_norm_relu",
    "head_loss_norms",
    "integral",
    "matchability_aware_loss",
    "multiclass_nms",
    "nms",
    "postprocess",
    "quality_focal_loss",
    "rtmdet_loss",
    "side_distributions",
    "side_uncertainty",
    "sigmoid_focal_loss",
    "simota_assign",
    "soft_nms",
    "soft_target_bce",
    "task_aligned_assign",
    "varifocal_loss",
    "yolo_loss",
]
