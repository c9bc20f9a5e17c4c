# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule, a function of the step alone."""

from __future__ import annotations

import math

from ..config import TrainConfig

# The paper's learning rate is for 16 images per step (arXiv 2006.04388, section 4).
BASE_BATCH = 16
WARMUP_START = 1e-3
DROP = 0.1


def learning_rate(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """At a step, from 0: a linear warm-up, times drops at epochs or half a cosine over the training."""
    rate = train.lr * train.batch_size / BASE_BATCH
    if step < train.warmup_steps:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / train.warmup_steps
    if train.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * step / (steps_per_epoch * train.epochs))) / 2
    return rate * DROP ** sum(step >= epoch * steps_per_epoch for epoch in train.lr_drops)
