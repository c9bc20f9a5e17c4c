# SPDX-License-Identifier: Apache-2.0
"""The detector: backbone, pyramid and head, with the loss and the reading of boxes by the operators of `gfl_ops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

import gfl_ops

from ..config import InferenceConfig, ModelConfig
from . import _inputs
from .backbone import Backbone
from .fpn import FPN
from .head import GFLHead


class GFL(nn.Module):
    """A detector of Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

    Its parameters and buffers are named as in mmdet 3.3.0. `gfl.create_model` makes one by name.

    Args:
        backbone: gives maps of strides 8, 16 and 32.
        config: of the network; says what neck and head are.
        test: how boxes are read off the maps.

    Attributes:
        config: the network's, with the backbone's frozen stages and norms as they are now.
        test: may be changed at any time.
        backbone, neck, bbox_head: the three parts.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, test: InferenceConfig | None = None) -> None:
        super().__init__()
        self._config = config
        self.test = InferenceConfig() if test is None else test
        self.backbone = backbone
        self.neck = FPN(backbone.channels, config.neck_channels, len(config.strides))
        self.bbox_head = GFLHead(
            config.neck_channels,
            config.num_classes,
            config.head_channels,
            config.head_convs,
            config.head_groups,
            config.reg_max,
            len(config.strides),
            config.quality_branch,
        )

    @property
    def config(self) -> ModelConfig:
        return dataclasses.replace(
            self._config, frozen_stages=self.backbone.frozen_stages, norm_eval=self.backbone.norm_eval
        )

    def forward(
        self,
        images: Tensor,
        image_sizes: Tensor | Sequence[Sequence[float]] | None = None,
        scale_factors: Tensor | Sequence[Sequence[float]] | None = None,
        *,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> gfl_ops.Detections | dict[str, Tensor]:
        """Detections of a batch; with `targets` its losses, so that wrappers of a module such as DDP see them.

        Args:
            images: normalised RGB, floating ``[B, 3, H, W]``, padded below and to the right with 0.
            image_sizes: ``[B, 2]``, height and width of each image without its padding, in pixels; by default H, W.
                Boxes are clipped to them.
            scale_factors: ``[B, 2]``, horizontal and vertical: boxes are divided by it. By default they are in pixels
                of `images`.
            targets: as `loss` takes them.

        Returns:
            `gfl_ops.Detections` ``(boxes [B, K, 4] fp32 xyxy, scores [B, K] fp32, labels [B, K] int64, count [B]
            int32)``, K = ``test.max_detections``, the best first, label −1 in unused slots; no gradient. With `targets`
            what `loss` returns.

        Raises:
            RuntimeError: the model is in training mode and there are no `targets`.
            TypeError, ValueError: an argument of another dtype or shape.
        """
        if targets is not None:
            return self.loss(images, targets, image_sizes)
        if self.training:
            raise RuntimeError("gfl.GFL: detects in evaluation mode: call `eval()` first, or give `targets` for a loss")
        with torch.no_grad():
            sizes = _inputs.sizes("forward", images, image_sizes)
            factors = (
                None if scale_factors is None else _inputs.pairs("forward", "scale_factors", scale_factors, images)
            )
            return self.read_maps(*self.predict_maps(images), sizes, factors)

    def read_maps(
        self,
        cls_scores: Sequence[Tensor],
        reg_preds: Sequence[Tensor],
        image_sizes: Tensor,
        scale_factors: Tensor | None = None,
    ) -> gfl_ops.Detections:
        """Detections of what `predict_maps` gave, as `test` says; sizes and factors are `forward`'s, as tensors."""
        config, test = self._config, self.test
        return gfl_ops.postprocess(
            cls_scores,
            reg_preds,
            config.strides,
            image_sizes,
            reg_max=config.reg_max,
            score_threshold=test.score_threshold,
            nms_pre=test.nms_pre,
            iou_threshold=test.iou_threshold,
            max_detections=test.max_detections,
            center_offset=config.center_offset,
            topk_mode=config.topk_mode,
            scale_factors=scale_factors,
            legacy=config.legacy,
        )

    def loss(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        image_sizes: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> dict[str, Tensor]:
        """The three losses of a batch, weighted and normalised; their sum is what is minimised.

        Where `torch.distributed` is initialised, the normalisers are means over the ranks, so that the mean of the
        ranks' gradients is that of the whole batch.

        Args:
            images: normalised RGB, floating ``[B, 3, H, W]``.
            targets: one an image: ``{"boxes": [n, 4] xyxy in pixels of images, "labels": [n] integers in [0, C)}``,
                n = 0 for an image without objects. Labels are checked where they are on the CPU; on another device one
                outside [0, C) counts as background, since a check would wait for the device.
            image_sizes: ``[B, 2]`` (h, w) without padding: locations beyond ceil(size/stride) cells are left out.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_dfl``: fp32 scalars on the maps' device.

        Raises:
            TypeError, ValueError: an argument of another dtype or shape; labels out of range.
        """
        sizes = _inputs.sizes("loss", images, image_sizes)
        return self.padded_loss(images, *_inputs.padded_targets(targets, images, self._config.num_classes), sizes)

    def padded_loss(
        self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        """`loss` of objects in slots; values are not checked, so that nothing waits for a device.

        Args:
            images: as for `loss`.
            gt_boxes: fp32 ``[B, G, 4]`` xyxy, on the images' device as the others.
            gt_labels: int64 ``[B, G]`` in [0, C), −1 in slots that are not used.
            image_sizes: fp32 ``[B, 2]``.
        """
        config = self._config
        cls_scores, reg_preds = self.predict_maps(images)
        assignment = gfl_ops.atss_assign(
            [(m.shape[2], m.shape[3]) for m in cls_scores],
            config.strides,
            gt_boxes,
            gt_labels,
            valid_sizes=image_sizes,
            topk=config.topk,
            anchor_scale=config.anchor_scale,
            center_offset=config.center_offset,
            legacy=config.legacy,
        )
        cls_norm, box_norm = _shared_norms(cls_scores, assignment)
        losses = gfl_ops.gfl_loss(
            cls_scores,
            reg_preds,
            config.strides,
            assignment,
            gt_boxes,
            reg_max=config.reg_max,
            loss_weights=config.loss_weights,
            beta=config.beta,
            cls_norm=cls_norm,
            box_norm=box_norm,
            center_offset=config.center_offset,
            legacy=config.legacy,
        )
        return {"loss_cls": losses.cls, "loss_bbox": losses.box, "loss_dfl": losses.dfl}

    def predict_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits ``[B, C, H_l, W_l]`` and distribution logits ``[B, 4(R+1), H_l, W_l]``, one of each a level.

        Args:
            images: normalised RGB, floating ``[B, 3, H, W]``; levels have ceil(H/stride) × ceil(W/stride) cells.

        Raises:
            TypeError, ValueError: `images` of another dtype or shape.
        """
        _inputs.check_images("predict_maps", images)
        return self.bbox_head(self.neck(self.backbone(images)))


def _shared_norms(
    cls_scores: Sequence[Tensor], assignment: gfl_ops.Assignment
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Normalisers of the class losses and of the box losses as means over ranks; None for one process's own."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None, None
    norms = gfl_ops.head_loss_norms(cls_scores, assignment)
    distributed.all_reduce(norms)
    norms = norms / distributed.get_world_size()
    return norms[0], norms[1].clamp(min=1)
