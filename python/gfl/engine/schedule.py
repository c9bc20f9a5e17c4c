# SPDX-License-Identifier: Apache-2.0
"""How long a training is, and the learning rate of each of its steps."""

from __future__ import annotations

import math

from ..config import TrainConfig

# The paper's learning rate is for 16 images per step (arXiv 2006.04388, section 4).
BASE_BATCH = 16
WARMUP_START, DROP = 1e-3, 0.1
# The paper's warm-up, and the share of a short training that it may take.
WARMUP, WARMUP_SHARE = 500, 0.1
# Of the asked rate: a schedule that stays below is told of.
REACHED = 0.9


def total_steps(steps_per_epoch: int, train: TrainConfig) -> int:
    """Of the whole training."""
    return train.steps or steps_per_epoch * train.epochs


def warmup_steps(steps_per_epoch: int, train: TrainConfig) -> int:
    """Those asked for, or the paper's but at most a tenth of the training."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return min(WARMUP, int(WARMUP_SHARE * total_steps(steps_per_epoch, train)))


def learning_rate(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """At a step, from 0: a linear warm-up, times drops at epochs or half a cosine over the training."""
    rate = train.lr * train.batch_size / BASE_BATCH
    warmup = warmup_steps(steps_per_epoch, train)
    if step < warmup:
        rate *= WARMUP_START + (1 - WARMUP_START) * step / warmup
    if train.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * step / total_steps(steps_per_epoch, train))) / 2
    return rate * DROP ** sum(step >= epoch * steps_per_epoch for epoch in train.lr_drops)


def schedule_warnings(steps_per_epoch: int, train: TrainConfig) -> list[str]:
    """What of a schedule will not happen, in lines."""
    total = total_steps(steps_per_epoch, train)
    highest = max(learning_rate(step, steps_per_epoch, train) for step in range(total))
    share = highest / (train.lr * train.batch_size / BASE_BATCH)
    lines = []
    if share < REACHED:
        lines.append(
            f"warning: the learning rate never exceeds {share:.0%} of what `lr` asks for: {total} steps with a warm-up "
            f"of {warmup_steps(steps_per_epoch, train)}; lower `warmup_steps`, or train for more `epochs`"
        )
    late = [epoch for epoch in train.lr_drops if epoch * steps_per_epoch >= total]
    if late and train.schedule == "step":
        end = total / steps_per_epoch
        lines.append(
            f"warning: the training ends after {end:g} epochs, before the drop of the learning rate after epoch "
            f"{late[0]}; set `lr_drops`, or `schedule` to cosine"
        )
    return lines
