# SPDX-License-Identifier: Apache-2.0
"""What the losses of heads share: checks of their arguments, and drawn ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.random_inputs import boxes as draw_boxes
from ...core.random_inputs import normal


def check_maps(
    op: str, cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor], rule: str, channels: int
) -> tuple[int, int]:
    """How many images and classes there are; `channels` of `reg_preds`, which `rule` has in words."""
    images, classes = checks.maps(op, "cls_scores", cls_scores)
    checks.maps(op, "reg_preds", reg_preds)
    if len(reg_preds) != len(cls_scores):
        wanted = f"must have a level for each of `cls_scores`, {len(cls_scores)}"
        raise ValueError(checks.message(op, "reg_preds", wanted, len(reg_preds)))
    for cls_score, reg_pred in zip(cls_scores, reg_preds):
        height, width = cls_score.shape[2:]
        checks.shape(op, "reg_preds", reg_pred, f"[B, {rule}, H, W]", (images, channels, height, width))
    checks.same_device(op, "reg_preds", reg_preds[0], "cls_scores", cls_scores[0])
    return images, classes


def check_gt_boxes(op: str, gt_boxes: Tensor, images: int, like: Tensor) -> None:
    checks.tensor(op, "gt_boxes", gt_boxes)
    checks.shape(op, "gt_boxes", gt_boxes, "[B, G, 4]", (images, None, 4))
    checks.same_device(op, "gt_boxes", gt_boxes, "cls_scores", like)


def check_gt_labels(op: str, gt_labels: Tensor, gt_boxes: Tensor, name: str, like: Tensor, classes: int) -> None:
    """`name` is what the operator calls `like`."""
    checks.tensor(op, "gt_labels", gt_labels, checks.INTEGER)
    checks.shape(op, "gt_labels", gt_labels, "[B, G]", tuple(gt_boxes.shape[:2]))
    checks.same_device(op, "gt_labels", gt_labels, name, like)
    if checks.SYNCHRONISING and gt_labels.numel() and int(gt_labels.max()) >= classes:
        raise ValueError(checks.message(op, "gt_labels", f"must be below C = {classes}", int(gt_labels.max())))


def with_one_accumulator(
    cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    """The maps and their accumulator: fp64 on either side makes the other fp64 too."""
    cls_maps, reg_maps = list(cls_scores), list(reg_preds)
    if accumulator(cls_maps[0].dtype) != accumulator(reg_maps[0].dtype):
        cls_maps, reg_maps = [m.double() for m in cls_maps], [m.double() for m in reg_maps]
    return cls_maps, reg_maps, accumulator(cls_maps[0].dtype)


def check_weights(op: str, argument: str, weights: Sequence[float], count: str, dtype: torch.dtype) -> list[float]:
    """Of each of the losses, `count` in words."""
    if not isinstance(weights, (tuple, list)) or len(weights) != {"two": 2, "three": 3}[count]:
        raise ValueError(checks.message(op, argument, f"must hold {count} numbers", repr(weights)))
    return [checks.number(op, argument, weight, dtype=dtype) for weight in weights]


def draw_head(
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    images: int,
    classes: int,
    channels: int,
    sizes: list[tuple[int, int]],
    slots: int,
    share: float = 0.2,
) -> list:
    """Maps of classes and of `channels`, strides, labels, slots and boxes.

    The assignment ignores geometry: centres lie inside and outside their boxes. `share` of the locations are positive.
    """
    strides = [8.0 * 2**i for i in range(len(sizes))]
    maps, sides = (
        [normal((images, each, h, w), device, dtype, generator, 2.0) for h, w in sizes] for each in (classes, channels)
    )
    cells = sum(h * w for h, w in sizes)
    drawn_class = torch.randint(0, classes, (images, cells), generator=generator)
    kind = torch.rand((images, cells), generator=generator)
    labels = torch.where(kind < share, drawn_class, torch.where(kind > 0.95, -2, -1))
    matched = torch.randint(0, max(slots, 1), (images, cells), generator=generator)
    matched = torch.where(labels < 0, -1, matched)
    extent = 8.0 * max(*sizes[0])
    gt = draw_boxes(images * slots, device, accumulator(dtype), generator, extent=extent).view(images, slots, 4)
    return [maps, sides, strides, labels.to(device), matched.to(device), gt]
