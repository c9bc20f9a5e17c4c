# SPDX-License-Identifier: Apache-2.0
"""What a head's maps learn: objects are assigned to locations, and the operators of `gfl_ops` compute the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

import gfl_ops
from gfl_ops.ops.head.atss import centres

from ..config import ModelConfig

# What the losses of a detector are called; the last one is that of an auxiliary head.
LOSSES, AUXILIARY = ("loss_cls", "loss_bbox", "loss_dfl"), "loss_aux"
ATSS, SOFT_LABELS = "atss", "soft_labels"
# The operators of each assignment and its losses.
OPERATORS = {ATSS: ("atss", "gfl_loss"), SOFT_LABELS: ("decode", "dynamic_k", "qfl", "gfl_loss")}


class Maps(NamedTuple):
    """Logits per level: of the classes ``[B, C, H_l, W_l]``, of the distributions ``[B, 4(R+1), H_l, W_l]``."""

    cls_scores: list[Tensor]
    reg_preds: list[Tensor]


class Objects(NamedTuple):
    """What is to be found in a batch."""

    boxes: Tensor  # fp32 [B, G, 4], xyxy in pixels
    labels: Tensor  # int64 [B, G], −1 in unused slots
    image_sizes: Tensor  # fp32 [B, 2], (height, width) without padding


def atss_losses(config: ModelConfig, maps: Maps, objects: Objects) -> dict[str, Tensor]:
    """The losses of locations that geometry alone assigns; a location's score to learn is its own box's overlap."""
    assignment = gfl_ops.atss_assign(
        _sizes(maps),
        config.strides,
        objects.boxes,
        objects.labels,
        valid_sizes=objects.image_sizes,
        topk=config.topk,
        anchor_scale=config.anchor_scale,
        **geometry(config),
    )
    norms: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if _several_ranks():
        over_ranks = _mean_over_ranks(gfl_ops.head_loss_norms(maps.cls_scores, assignment))
        norms = over_ranks[0], over_ranks[1].clamp(min=1)
    losses = _head_loss(config, maps, assignment, objects, config.loss_weights, *norms)
    return dict(zip(LOSSES, losses[:3], strict=True))


def soft_label_losses(config: ModelConfig, maps: Maps, auxiliary: Maps | None, objects: Objects) -> dict[str, Tensor]:
    """The losses of locations that predictions assign, as NanoDet-Plus is trained.

    An auxiliary head assigns for both, if there is one. Both learn, as the score of a location, the overlap of the box
    that was predicted there by the head which assigned it.
    """
    heads = [maps] if auxiliary is None else [maps, auxiliary]
    assignment = _by_soft_labels(config, heads[-1], objects)
    # Positives of the batch, and for each head the sum of their weights.
    norms = [(assignment.labels >= 0).sum(dtype=torch.float32)]
    norms += [gfl_ops.head_loss_norms(head.cls_scores, assignment)[1].float() for head in heads]
    for_cls, *for_box = _mean_over_ranks(torch.stack(norms)).clamp(min=1)
    inside = _inside(config, maps, objects.image_sizes).flatten().float()
    found = []
    for head, norm in zip(heads, for_box, strict=True):
        rows = torch.cat([_rows(scores) for scores in head.cls_scores], 1).flatten(0, 1)
        target = assignment.labels.flatten(), assignment.iou.flatten()
        quality = gfl_ops.quality_focal_loss(rows, target, inside, beta=config.beta, avg_factor=for_cls)
        # Its own quality loss aims at the overlap of the head's own boxes, so that loss counts for nothing here.
        weights = (0.0, *config.loss_weights[1:])
        losses = _head_loss(config, head, assignment, objects, weights, for_cls, norm)
        found.append((config.loss_weights[0] * quality, losses.box, losses.dfl))
    result = dict(zip(LOSSES, found[0], strict=True))
    return result if auxiliary is None else result | {AUXILIARY: torch.stack(found[1]).sum()}


@torch.no_grad()
def _by_soft_labels(config: ModelConfig, maps: Maps, objects: Objects) -> gfl_ops.Assignment:
    """Which location learns which object, by what these maps predict."""
    offset, levels = config.center_offset, zip(maps.reg_preds, config.strides, strict=True)
    boxes = [
        gfl_ops.decode(
            _rows(x), centres(x.shape[2], x.shape[3], stride, offset, False, x.device), stride, config.reg_max
        )
        for x, stride in levels
    ]
    return gfl_ops.dynamic_soft_label_assign(
        torch.cat([_rows(x) for x in maps.cls_scores], 1).sigmoid(),
        torch.cat(boxes, 1),
        _sizes(maps),
        config.strides,
        objects.boxes,
        objects.labels,
        topk=config.topk,
        center_offset=offset,
        variant="nanodet",
    )


def _head_loss(
    config: ModelConfig,
    maps: Maps,
    assignment: gfl_ops.Assignment,
    objects: Objects,
    weights: Sequence[float],
    cls_norm: Tensor | None,
    box_norm: Tensor | None,
) -> gfl_ops.HeadLoss:
    return gfl_ops.gfl_loss(
        *maps,
        config.strides,
        assignment,
        objects.boxes,
        reg_max=config.reg_max,
        loss_weights=weights,
        beta=config.beta,
        cls_norm=cls_norm,
        box_norm=box_norm,
        **geometry(config),
    )


def geometry(config: ModelConfig) -> dict[str, Any]:
    """Where a location is within its cell, as the operators take it."""
    return {"center_offset": config.center_offset, "legacy": config.legacy}


def _rows(level: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, H·W, C]``."""
    return level.flatten(2).transpose(1, 2)


def _sizes(maps: Maps) -> list[tuple[int, int]]:
    return [(x.shape[2], x.shape[3]) for x in maps.cls_scores]


def _inside(config: ModelConfig, maps: Maps, image_sizes: Tensor) -> Tensor:
    """Which locations ``[B, A]`` are not in the padding of their image."""
    inside = []
    for (height, width), stride in zip(_sizes(maps), config.strides, strict=True):
        count = (image_sizes / torch.full_like(image_sizes, stride)).ceil()
        rows = torch.arange(height, device=count.device) < count[:, :1]
        columns = torch.arange(width, device=count.device) < count[:, 1:]
        inside.append((rows[:, :, None] & columns[:, None]).flatten(1))
    return torch.cat(inside, 1)


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _mean_over_ranks(values: Tensor) -> Tensor:
    if not _several_ranks():
        return values
    distributed.all_reduce(values)
    return values / distributed.get_world_size()
