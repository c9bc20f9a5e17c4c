# SPDX-License-Identifier: Apache-2.0
"""Losses of class scores: the logits of all locations against their labels and the IoU of the predicted box."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

import formulas.common
import gfl_ops
from gfl_ops.core.registry import OpSpec
from harness import Case
from inputs import CLASSES, Scene

from .common import accumulator, by_name, parameters, torchvision


def generic(spec: OpSpec, scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """A target ``(label, score)`` with a weight per row where the loss takes one, else a dense target."""
    logits, targets = list(parameters(spec))[:2]
    acc, score = accumulator(dtype), scene.score
    pool = {logits: scene.pred.to(dtype), "avg_factor": (scene.labels >= 0).sum(1).clamp(min=1).sum().to(acc)}
    if "tuple" in str(get_type_hints(getattr(gfl_ops, spec.public[0]))[targets]):
        pool |= {targets: (scene.label, score.to(acc)), "weight": torch.ones_like(score, dtype=acc)}
    else:
        # The focal loss knows no quality: its target is 1 at a positive.
        quality = score if "avg_factor" in parameters(spec) else torch.ones_like(score)
        pool[targets] = dense_target(scene, quality).to(acc)
    if "avg_factor" not in parameters(spec):
        pool["reduction"] = "sum"
    what = f"{scene.pred.shape[0]}×{CLASSES} logits, {scene.positives} positives"
    case = by_name(spec, "score", pool, what, gradients=(logits,), peers=PEERS.get(spec.stem))
    yield from [case] if case else []


def dense_target(scene: Scene, value: Tensor) -> Tensor:
    """`value` at each positive's class, 0 elsewhere."""
    target = F.one_hot(scene.label, CLASSES + 1)[:, :CLASSES].to(value)
    return target * value[:, None]


def torchvision_focal(inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return torchvision.ops.sigmoid_focal_loss(formulas.common.widen(inputs), targets, reduction=reduction)


MAKERS: dict[str, object] = {}
PEERS = {"focal": {"torchvision": torchvision_focal if torchvision else None}}
