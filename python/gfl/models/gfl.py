# SPDX-License-Identifier: Apache-2.0
"""The detector: backbone, pyramid and head, with loss and decoding by the operators of `gfl_ops`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gfl_ops
from gfl_ops.ops.head.atss import centres

from ..config import Config, InferenceConfig, ModelConfig
from . import _inputs, losses
from .auxiliary import AuxiliaryHead
from .backbone import Backbone
from .fpn import FPN
from .ghost_pan import GhostPAN
from .head import GFLHead
from .nanodet_head import NanoDetPlusHead

Pairs = Tensor | Sequence[Sequence[float]]
# The key of a state dict's metadata that holds the configuration.
METADATA = "gfl"
NECKS: dict[str, Callable[..., nn.Module]] = {"fpn": FPN, "ghost_pan": GhostPAN}
HEADS: dict[str, Callable[[ModelConfig], Any]] = {"gfl": GFLHead, "nanodet_plus": NanoDetPlusHead}


class GFL(nn.Module):
    """A detector of Generalized Focal Loss (Li et al., NeurIPS 2020, arXiv 2006.04388).

    Its parameters and buffers are named as in mmdet 3.3.0. `gfl.create_model` makes one by name.

    Args:
        backbone: gives maps of strides 8, 16 and 32.
        config: of the network; defines neck and head. The attribute has the backbone's current frozen stages and norms.
        test: how boxes are read from the maps; the attribute may be changed at any time.

    The attribute `class_weights`, fp32 ``[C]`` on the network's device or None, multiplies the gradient of each class's
    logits, which is what weights of the classes in their loss do; the loss that is returned is without them.
    `aux_detached` says that the auxiliary head, which `add_auxiliary` adds, trains nothing but itself.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, test: InferenceConfig | None = None) -> None:
        super().__init__()
        self._config = config
        self.test = InferenceConfig() if test is None else test
        self.backbone = backbone
        self.neck = NECKS[config.neck](backbone.channels, config.neck_channels, len(config.strides))
        self.bbox_head = HEADS[config.head](config)
        self.class_weights: Tensor | None = None
        self.aux_fpn: nn.Module | None = None
        self.aux_head: AuxiliaryHead | None = None
        self.aux_detached = False

    def add_auxiliary(self) -> None:
        """Adds the second pyramid and head that the configuration has for a training, if any, with random weights."""
        if self._config.aux_convs:
            self.aux_fpn, self.aux_head = copy.deepcopy(self.neck), AuxiliaryHead(self._config)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Of what `loss` returns."""
        return losses.LOSSES if self.aux_head is None else (*losses.LOSSES, losses.AUXILIARY)

    @property
    def config(self) -> ModelConfig:
        frozen, norm_eval = self.backbone.frozen_stages, self.backbone.norm_eval
        return dataclasses.replace(self._config, frozen_stages=frozen, norm_eval=norm_eval)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's, with the configuration in its metadata, where ``torch.save(model.state_dict(), …)`` keeps it."""
        result = super().state_dict(*args, **kwargs)
        metadata = getattr(result, "_metadata", {}).get(kwargs.get("prefix", "")[:-1])
        if metadata is not None:
            metadata[METADATA] = Config(model=self.config, test=self.test).to_dict()
        return result

    def forward(
        self,
        images: Tensor,
        image_sizes: Pairs | None = None,
        scale_factors: Pairs | None = None,
        *,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> gfl_ops.Detections | dict[str, Tensor]:
        """Detections of a batch, or with `targets` its losses, so that wrappers of a module such as DDP see them.

        Args:
            images: normalised, in the `channel_order` of `config`, floating ``[B, 3, H, W]``, padded with 0 below and
                to the right.
            image_sizes: ``[B, 2]``, height and width of each image without its padding, in pixels; by default H, W.
                Boxes are clipped to them.
            scale_factors: ``[B, 2]``, horizontal and vertical; boxes are divided by them. By default boxes are in
                pixels of `images`.
            targets: as `loss` takes them.

        Returns:
            What `gfl_ops.postprocess` returns, K = ``test.max_detections`` slots per image; or what `loss` returns.

        Raises:
            RuntimeError: the model is in training mode and there are no `targets`.
            TypeError, ValueError: an argument of wrong dtype or shape.
        """
        if targets is not None:
            return self.loss(images, targets, image_sizes)
        if self.training:
            raise RuntimeError("gfl.GFL: detects in evaluation mode: call `eval()` first, or give `targets` for a loss")
        with torch.no_grad():
            sizes, factors = _inputs.sizes("forward", images, image_sizes), None
            if scale_factors is not None:
                factors = _inputs.pairs("forward", "scale_factors", scale_factors, images)
            return self.read_maps(*self.predict_maps(images), sizes, factors)

    def read_maps(
        self,
        cls_scores: Sequence[Tensor],
        reg_preds: Sequence[Tensor],
        image_sizes: Tensor,
        scale_factors: Tensor | None = None,
    ) -> gfl_ops.Detections:
        """Detections from what `predict_maps` returns, by the settings in `test`; sizes and factors as tensors."""
        config, names = self._config, ("score_threshold", "nms_pre", "iou_threshold", "max_detections")
        return gfl_ops.postprocess(
            cls_scores,
            reg_preds,
            config.strides,
            image_sizes,
            reg_max=config.reg_max,
            topk_mode=config.topk_mode,
            scale_factors=scale_factors,
            **{name: getattr(self.test, name) for name in names},
            **losses.geometry(config),
        )

    def loss(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], image_sizes: Pairs | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch, weighted and normalised, to be summed.

        Where `torch.distributed` is initialised, the normalisers are means over the ranks, so that the mean of the
        ranks' gradients is that of the whole batch.

        Args:
            images: normalised, floating ``[B, 3, H, W]``.
            targets: per image ``{"boxes": [n, 4] xyxy in pixels of images, "labels": [n] integers in [0, C)}``, n = 0
                for an image without objects. Labels are checked where they are on the CPU; on another device one
                outside [0, C) counts as background, since a check would wait for the device.
            image_sizes: ``[B, 2]`` (h, w) without padding: locations beyond ceil(size/stride) cells are left out.

        Returns:
            ``loss_cls``, ``loss_bbox``, ``loss_dfl``, and with an auxiliary head ``loss_aux``, its three in one: fp32
            scalars on the maps' device.

        Raises:
            TypeError, ValueError: an argument of wrong dtype or shape; labels out of range.
        """
        sizes = _inputs.sizes("loss", images, image_sizes)
        return self.padded_loss(images, *_inputs.padded_targets(targets, images, self._config.num_classes), sizes)

    def padded_loss(
        self, images: Tensor, gt_boxes: Tensor, gt_labels: Tensor, image_sizes: Tensor
    ) -> dict[str, Tensor]:
        """`loss` of objects in slots: boxes fp32 ``[B, G, 4]``, labels int64 ``[B, G]``, −1 in unused slots.

        Sizes are fp32 ``[B, 2]``, everything is on the images' device, and values are not checked, so nothing waits.
        """
        maps, auxiliary = self._training_maps(images)
        objects = losses.Objects(gt_boxes, gt_labels, image_sizes)
        if self._config.assignment == losses.ATSS:
            return losses.atss_losses(self._config, maps, objects)
        return losses.soft_label_losses(self._config, maps, auxiliary, objects)

    def _training_maps(self, images: Tensor) -> tuple[losses.Maps, losses.Maps | None]:
        """Of the head, and of the auxiliary one if there is one."""
        _inputs.check_images("predict_maps", images)
        features = self.backbone(images)
        pyramid = self.neck(features)
        maps = self._weighted(self.bbox_head(pyramid))
        if self.aux_fpn is None or self.aux_head is None:
            return maps, None
        if self.aux_detached:
            features, pyramid = ([x.detach() for x in of] for of in (features, pyramid))
        both = [torch.cat(pair, 1) for pair in zip(pyramid, self.aux_fpn(features), strict=True)]
        return maps, self._weighted(self.aux_head(both))

    def _weighted(self, maps: tuple[list[Tensor], list[Tensor]]) -> losses.Maps:
        cls_scores, reg_preds = maps
        if self.class_weights is not None:
            cls_scores = [_scale_gradient(logits, self.class_weights) for logits in cls_scores]
        return losses.Maps(cls_scores, reg_preds)

    def predict_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits ``[B, C, H_l, W_l]`` and distribution logits ``[B, 4(R+1), H_l, W_l]`` per level.

        Levels have ceil(H/stride) × ceil(W/stride) cells; `images` as for `forward`, and so the errors.
        """
        _inputs.check_images("predict_maps", images)
        return self.bbox_head(self.neck(self.backbone(images)))


def _scale_gradient(logits: Tensor, weights: Tensor) -> Tensor:
    """The logits ``[B, C, H, W]``, whose gradient will be multiplied by ``[C]``, out of place."""
    if logits.requires_grad:
        logits = logits.view_as(logits)
        logits.register_hook(lambda gradient: gradient * weights[:, None, None].to(gradient.dtype))
    return logits


def locations(
    config: ModelConfig, cells: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Of all levels, of (height, width) `cells` each: centres ``[A, 2]`` (x, y) in pixels, and strides ``[A, 1]``."""
    where, offset, legacy = torch.device(device), config.center_offset, config.legacy
    levels = zip(cells, config.strides, strict=True)
    points = [centres(*size, stride, offset, legacy, where) for size, stride in levels]
    strides = [p.new_full((len(p), 1), stride) for p, stride in zip(points, config.strides)]
    return torch.cat(points), torch.cat(strides)
