# SPDX-License-Identifier: Apache-2.0
"""Boxes: the positives' predicted boxes against their objects', in units of the stride, and distances to sides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import formulas.boxes
import gfl_ops
from gfl_ops.core.registry import OpSpec
from gfl_ops.ops.boxes.iou import KINDS
from harness import Case
from inputs import REG_MAX, Scene

from .common import accumulator, by_name


def pairs(scene: Scene, dtype: torch.dtype) -> dict[str, Any]:
    """Every argument that a function of boxes may take, by its name."""
    acc = accumulator(dtype)
    # 16-bit boxes may no longer touch; the targets of training are fp32.
    pool = {"pred": scene.pred_boxes.to(dtype), "target": scene.true_boxes.to(acc), "weight": scene.weight.to(acc)}
    pool |= {"avg_factor": pool["weight"].sum(), "points": scene.points.to(dtype), "boxes": scene.true_boxes.to(dtype)}
    return pool | {"distance": scene.target.reshape(-1, 4).to(dtype), "max_distance": float(REG_MAX)}


def generic(spec: OpSpec, scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """A loss of pairs of boxes, or a conversion between boxes and distances."""
    pool = pairs(scene, dtype)
    # Targets are made from boxes without a gradient; predictions are not.
    gradients = tuple(name for name in ("pred", "distance") if name in spec.differentiable)
    case = by_name(spec, "boxes", pool, f"{scene.positives} boxes", gradients=gradients)
    yield from [case] if case else []


def iou(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """One case per kind."""
    for kind in KINDS:
        peers = {}
        if kind in formulas.boxes.IOU_KINDS:
            peers["eager"] = partial(formulas.boxes.box_iou_loss, kind=kind)
        pool = {name: value for name, value in pairs(scene, dtype).items() if name in WEIGHTED_PAIRS}
        ours, what = (
            partial(gfl_ops.box_iou_loss, kind=kind, image_size=scene.size),
            f"{scene.positives} pairs of boxes",
        )
        yield Case("iou", kind, what, pool, ours, peers, peers.get("eager"), gradients=("pred",))


WEIGHTED_PAIRS = ("pred", "target", "weight", "avg_factor")
MAKERS = {"iou": iou}
