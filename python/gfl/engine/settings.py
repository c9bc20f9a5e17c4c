# SPDX-License-Identifier: Apache-2.0
"""What a training's settings mean for its data and its device."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .. import backbone_weights, checkpoint
from ..config import Config, TrainConfig
from ..data.coco import CocoDataset
from ..data.loader import Batch
from ..models.gfl import GFL
from .distributed import Process
from .step import Step, preserve_training_state

POSITIVE = ("epochs", "lr", "log_steps", "rank_timeout", "accumulate", "layer_decay")
NOT_NEGATIVE = (
    *("steps", "warmup_steps", "clip_grad_norm", "eval_every", "checkpoint_steps", "weight_decay", "patience"),
    *("batch_size", "repeat_threshold", "ema", "aux_epochs"),
)
BALANCED = "balanced"
# Of a GPU's memory, what a batch may take; images that differ in size make the allocator waste some.
SHARE = 0.8
MOST_IMAGES = 256


def check_settings(settings: TrainConfig) -> None:
    """A ValueError for a number that can't be, which names it."""
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value, positive = getattr(settings, name), name in POSITIVE
        if value is not None and (value < 0 or (value == 0 and positive)):
            raise ValueError(f"gfl: `{name}` must {'be positive' if positive else 'not be negative'}, got {value}")
    if settings.ema >= 1:
        raise ValueError(f"gfl: `ema` must be below 1, as 0.999, got {settings.ema}")
    if settings.layer_decay > 1:
        raise ValueError(f"gfl: `layer_decay` must be at most 1, got {settings.layer_decay}")


def initial_weights(model: GFL, settings: TrainConfig) -> list[str]:
    """Puts the weights to start from into a model; returns notes for the log."""
    if settings.init:
        return checkpoint.start(model, settings.init)
    if not settings.backbone_weights:
        raise ValueError(
            "`backbone_weights` must be given: a file, torchvision or timm for weights trained on ImageNet, or none to "
            "train from scratch (all of the backbone, its norms too)"
        )
    return backbone_weights.load(model.backbone, settings.backbone_weights)


def class_weights(text: str, data: CocoDataset, device: torch.device) -> Tensor | None:
    """fp32 ``[C]`` of what `class_weights` says; None for nothing.

    Balanced weights are the inverse square roots of the classes' numbers of objects, with a mean over the objects of 1.
    """
    if not text:
        return None
    count = torch.bincount(data.annotations.labels, minlength=len(data.classes)).double()
    if text == BALANCED:
        inverse = count.clamp(min=1).rsqrt()
        weights = inverse * count.sum().clamp(min=1) / (inverse * count).sum().clamp(min=1e-9)
    else:
        try:
            weights = torch.tensor([float(part) for part in text.split(",")], dtype=torch.float64)
        except ValueError:
            raise ValueError(f"gfl: `class_weights` must be numbers or {BALANCED}, got {text!r}") from None
        if len(weights) != len(data.classes) or not bool((weights.isfinite() & (weights >= 0)).all()):
            rule = f"one number of at least 0 for each of the {len(data.classes)} classes"
            raise ValueError(f"gfl: `class_weights` must be {rule}, got {text!r}")
    return weights.float().to(device)


def largest_batch(model: GFL, config: Config, process: Process) -> int:
    """How many images per step, over all processes, fit the GPU's memory: measured with steps of one and of two."""
    device = process.device
    if device.type != "cuda":
        raise ValueError(f"gfl: `batch_size` 0 measures a GPU's memory; on {device} give a number")
    used = [_memory(model, config, images, device) for images in (1, 2)]
    each = max(used[1] - used[0], 1)
    free, _ = torch.cuda.mem_get_info(device)
    room = SHARE * (free + torch.cuda.memory_reserved(device)) - (used[0] - each)
    share = max(1, min(MOST_IMAGES, int(room // each)))
    return share * process.world


def _memory(model: GFL, config: Config, images: int, device: torch.device) -> int:
    """The most bytes that a step of so many images of the largest size takes; the model stays as it is."""
    train, divisor = config.train, config.test.size_divisor
    height, width = (-(-side // divisor) * divisor for side in (train.train_short_side[1], train.train_long_side))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # AdamW's two moments are the most that an optimizer here keeps.
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    step = Step(model, model, optimizer, dataclasses.replace(train, graph=False), device)
    batch = Batch(
        torch.zeros(images, 3, height, width, dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
        torch.tensor([[float(height), float(width)]] * images),
        torch.ones(images, 2),
        torch.tensor([[0.0, 0.0, width / 2, height / 2]] * images),
        torch.zeros(images, dtype=torch.int64),
        [1] * images,
        list(range(images)),
        [(height, width)] * images,
    ).to(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    model.train()
    with preserve_training_state(step):
        step(batch, 0.0)
    return torch.cuda.max_memory_allocated(device)
