# SPDX-License-Identifier: Apache-2.0
"""Distributions over bins: the sides of the positives, of the candidates after top-k, and of all locations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gfl_ops.core.registry import SPECS, OpSpec
from harness import Case
from inputs import REG_MAX, Scene, centres, flatten

from .common import accumulator, by_name


def sides(scene: Scene, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """The positives' sides: logits, targets, weights, and another distribution as the teacher's."""
    acc, rows = accumulator(dtype), scene.rows.to(dtype)
    weight = scene.weight.repeat_interleave(4).to(acc)
    pool = {"pred": rows, "target": scene.target.to(acc), "weight": weight, "avg_factor": weight.sum()}
    # Another side's distribution: as far away as a teacher ever is.
    pool |= {"teacher": rows.roll(1, 0), "temperature": 10.0}
    return pool, f"{len(rows)}×{REG_MAX + 1} logits, the positives' sides"


def generic(spec: OpSpec, scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """A loss of one distribution per row."""
    pool, what = sides(scene, dtype)
    case = by_name(spec, "bins", pool, what, gradients=("pred",))
    yield from [case] if case else []


def dfl_two_bin(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    pool, what = sides(scene, dtype)
    target = pool["target"]
    left = target.long()
    pool["target"] = (left, left + 1 - target, target - left)
    case = by_name(SPECS["dfl_two_bin"], "bins", pool, what, gradients=("pred",))
    yield from [case] if case else []


def integral(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    spec = SPECS["integral"]
    rows = scene.rows.reshape(-1, 4 * (REG_MAX + 1)).to(dtype)
    what = f"{len(rows)}×{rows.shape[1]} logits, the positives"
    positives = by_name(spec, "bins", {"pred": rows, "reg_max": REG_MAX}, what, gradients=("pred",))
    # What mmdet and others do before they know which boxes are worth it.
    rows = flatten(scene.head.reg_preds).flatten(0, 1).to(dtype)
    what = f"{len(rows)}×{rows.shape[1]} logits, all locations"
    everywhere = by_name(spec, "bins", {"pred": rows, "reg_max": REG_MAX}, what, name="integral of all")
    yield from (case for case in (positives, everywhere) if case)


def decode(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    spec, found, head = SPECS["decode"], scene.candidates, scene.head
    pool = {
        "pred": found.rows.to(dtype),
        "points": found.points,
        "stride": found.stride,
        "reg_max": scene.trained.reg_max,
        "max_shape": tuple(float(s) for s in scene.size),
    }
    selected = by_name(spec, "bins", pool, f"{len(found.rows)}×{found.rows.shape[1]} logits, candidates")
    # For those who select afterwards: all locations of the batch.
    points, stride = centres(scene.size)
    pool |= {
        "pred": flatten(head.reg_preds).flatten(0, 1).to(dtype),
        "points": points.repeat(scene.batch, 1),
        "stride": stride.repeat(scene.batch),
        "reg_max": head.reg_max,
    }
    what = f"{len(pool['pred'])}×{pool['pred'].shape[1]} logits, all locations"
    yield from (case for case in (selected, by_name(spec, "bins", pool, what, name="decode of all")) if case)


MAKERS = {"dfl_two_bin": dfl_two_bin, "integral": integral, "decode": decode}
