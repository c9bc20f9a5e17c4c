# SPDX-License-Identifier: Apache-2.0
"""Calls of `postprocess` on every backend and device that this machine has, and maps for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import Detections
from gfl_ops.core import backends

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
RUNS = [
    pytest.param(b, d, id=f"{b}-{d}")
    for b in ("reference", "native", "triton")
    for d in DEVICES
    if not backends.unavailable(b, "postprocess", d)
]
BACKENDS = [run.values[0] for run in RUNS if run.values[1] == "cpu"]


def moved(value: Any, device: str) -> Any:
    return [v.to(device) if isinstance(v, Tensor) else v for v in value]


def flat(levels: list[tuple[int, int]], batch: int = 1, classes: int = 2, value: float = 0.0) -> tuple[Any, ...]:
    """Maps of one value whose boxes are a bin's half on every side: they don't overlap at the stride 8."""
    cls = [torch.full((batch, classes, h, w), value) for h, w in levels]
    reg = [torch.zeros((batch, 8, h, w)) for h, w in levels]
    strides = [8.0] * len(levels)
    return cls, reg, strides, [(1000.0, 1000.0)] * batch


def run(backend: str, device: str, args: tuple[Any, ...], **keywords: Any) -> Detections:
    keywords = {"reg_max": 1, "center_offset": 0.5, **keywords}
    with gfl_ops.set_backend(backend):
        got = gfl_ops.postprocess(moved(args[0], device), moved(args[1], device), *args[2:], **keywords)
    return Detections(*(t.cpu() for t in got))
