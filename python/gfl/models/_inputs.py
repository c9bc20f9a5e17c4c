# SPDX-License-Identifier: Apache-2.0
"""Checks and conversions of a detector's inputs; nothing here waits for a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_images(function: str, images: Tensor) -> None:
    """Raises unless `images` is a floating ``[B, 3, H, W]``, none of them 0."""
    what = f"gfl.GFL.{function}: `images`"
    if not isinstance(images, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(f"{what} must have shape [B, 3, H, W], none of them 0, got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{what} must be normalised, of a floating dtype, got {images.dtype}")


def sizes(function: str, images: Tensor, image_sizes: Tensor | Sequence[Sequence[float]] | None) -> Tensor:
    """fp32 ``[B, 2]`` (h, w) on the images' device."""
    check_images(function, images)
    height, width = images.shape[2:]
    if image_sizes is None:
        # Filled on the device: a copy from the host would wait.
        whole = torch.empty(images.shape[0], 2, device=images.device)
        whole[:, 0], whole[:, 1] = height, width
        return whole
    return pairs(function, "image_sizes", image_sizes, images, limit=(height, width))


def pairs(
    function: str,
    name: str,
    values: Tensor | Sequence[Sequence[float]],
    images: Tensor,
    limit: tuple[int, int] | None = None,
) -> Tensor:
    """fp32 ``[B, 2]`` on the images' device, of values > 0, and at most `limit`; checked where the host has them."""
    what = f"gfl.GFL.{function}: `{name}`"
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a tensor or pairs of numbers: {error}") from None
    if found.shape != (images.shape[0], 2):
        raise ValueError(f"{what} must have shape [B, 2] = [{images.shape[0]}, 2], got {list(found.shape)}")
    if found.dtype not in INTEGER and not found.is_floating_point():
        raise TypeError(f"{what} must hold numbers, got {found.dtype}")
    found = found.float()
    if found.device.type == "cpu":
        if not bool((found > 0).all()):
            raise ValueError(f"{what} must be > 0, got {found.tolist()}")
        if limit is not None and bool((found > torch.tensor(limit)).any()):
            raise ValueError(f"{what} must be at most the batch's (h, w), {limit}, got {found.tolist()}")
    return found.to(images.device, non_blocking=True)


def padded_targets(targets: Sequence[Mapping[str, Tensor]], images: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """fp32 boxes ``[B, G, 4]`` and int64 labels ``[B, G]`` on the images' device; padding has label −1, G is >= 1."""
    what = "gfl.GFL.loss: `targets`"
    if not isinstance(targets, Sequence):
        raise TypeError(f"{what} must be a list with one dictionary per image, got {type(targets).__name__}")
    if len(targets) != images.shape[0]:
        raise ValueError(f"{what} must hold one dictionary per image, {images.shape[0]}, got {len(targets)}")
    boxes, labels = zip(*(_target(f"{what}[{i}]", target, num_classes) for i, target in enumerate(targets)))
    # At least one slot, so that no operator gets a dimension of 0.
    one = boxes[0].new_zeros(1, 4), labels[0].new_zeros(1)
    return (
        pad_sequence([*boxes, one[0]], batch_first=True)[:-1].to(images.device, non_blocking=True),
        pad_sequence([*labels, one[1]], batch_first=True, padding_value=-1)[:-1].to(images.device, non_blocking=True),
    )


def _target(what: str, target: Mapping[str, Tensor], num_classes: int) -> tuple[Tensor, Tensor]:
    if not isinstance(target, Mapping):
        raise TypeError(f"{what} must be a dictionary of `boxes` and `labels`, got {type(target).__name__}")
    for name in ("boxes", "labels"):
        if name not in target:
            raise ValueError(f"{what} must have `boxes` and `labels`, got {', '.join(map(str, target)) or 'nothing'}")
        if not isinstance(target[name], Tensor):
            raise TypeError(f"{what}: `{name}` must be a tensor, got {type(target[name]).__name__}")
    boxes, labels = target["boxes"].detach(), target["labels"].detach()
    if labels.dim() != 1:
        raise ValueError(f"{what}: `labels` must have shape [n], got {list(labels.shape)}")
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"{what}: `boxes` must have shape [n, 4] = [{len(labels)}, 4], got {list(boxes.shape)}")
    if labels.dtype not in INTEGER:
        raise TypeError(f"{what}: `labels` must be integers, got {labels.dtype}")
    if boxes.dtype not in INTEGER and not boxes.is_floating_point():
        raise TypeError(f"{what}: `boxes` must hold numbers, got {boxes.dtype}")
    if labels.device.type == "cpu":
        wrong = labels[(labels < 0) | (labels >= num_classes)].tolist()
        if wrong:
            raise ValueError(f"{what}: `labels` must be in [0, {num_classes}), got {wrong}")
    return boxes.float(), labels.long()
