# SPDX-License-Identifier: Apache-2.0
"""Reading boxes off the maps as it is done elsewhere, in eager PyTorch: what `gfl bench` compares with.

The steps are those of mmdet 3.3.0's GFL head: image by image and level by level a sigmoid of all class logits, the
integral of all locations, the threshold, the best pairs of location and class; then NMS over all classes at once, whose
boxes are moved apart class by class, and the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gfl_ops

from ..config import InferenceConfig, ModelConfig

Nms = Callable[[Tensor, Tensor, float], Tensor]


def available_nms() -> tuple[Nms, str]:
    """torchvision's NMS and its name; where that is not installed ours, which is quicker."""
    try:
        from torchvision.ops import nms
    except ImportError:
        return gfl_ops.nms, "gfl_ops.nms, as torchvision is not installed"
    return nms, "torchvision.ops.nms"


def read_maps(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    image_sizes: Sequence[tuple[float, float]],
    config: ModelConfig,
    test: InferenceConfig,
    nms: Nms,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Boxes ``[n, 4]`` xyxy, scores ``[n]`` and labels ``[n]`` of each image, the best first.

    Args:
        cls_scores: levels of ``[B, C, H, W]``.
        reg_preds: levels of ``[B, 4(R+1), H, W]``.
        image_sizes: (height, width) of each image, without padding.
        config: of the network.
        test: threshold, numbers of candidates and detections.
        nms: as torchvision's.
    """
    bins = torch.arange(config.reg_max + 1, device=cls_scores[0].device, dtype=torch.float32)
    results = []
    for image, (height, width) in enumerate(image_sizes):
        parts = []
        for cls_score, reg_pred, stride in zip(cls_scores, reg_preds, config.strides, strict=True):
            score = cls_score[image].permute(1, 2, 0).reshape(-1, config.num_classes).float().sigmoid()
            side = reg_pred[image].permute(1, 2, 0).reshape(-1, config.reg_max + 1).float()
            distance = (side.softmax(1) @ bins).reshape(-1, 4) * stride
            pairs = (score > test.score_threshold).nonzero()
            value, order = score[pairs[:, 0], pairs[:, 1]].sort(descending=True)
            kept = order[: test.nms_pre] if test.nms_pre > 0 else order
            location, label = pairs[kept].unbind(1)
            across = cls_score.shape[3]
            x = (location % across + config.center_offset) * stride
            y = (location // across + config.center_offset) * stride
            left, top, right, bottom = distance[location].unbind(1)
            box = torch.stack([x - left, y - top, x + right, y + bottom], 1)
            box[:, 0::2] = box[:, 0::2].clamp(0, width)
            box[:, 1::2] = box[:, 1::2].clamp(0, height)
            parts.append((box, value[: len(kept)], label))
        box, value, label = (torch.cat(of_levels) for of_levels in zip(*parts))
        sized = ((box[:, 2:] - box[:, :2]) > 0).all(1)
        box, value, label = box[sized], value[sized], label[sized]
        moved = box + (label * (box.max() + 1 if len(box) else 0))[:, None]
        chosen = nms(moved, value, test.iou_threshold)[: test.max_detections]
        results.append((box[chosen], value[chosen], label[chosen]))
    return results
