# SPDX-License-Identifier: Apache-2.0
"""What the families' cases share: arguments filled in by name, and how much two decisions differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

import formulas
import gfl_ops
from clock import tensors
from gfl_ops.core.registry import OpSpec
from harness import Case

try:
    import torchvision
except (ImportError, RuntimeError):  # the latter where it was built for another torch
    torchvision = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def parameters(spec: OpSpec) -> dict[str, inspect.Parameter]:
    """Those of the operator's public function."""
    return dict(inspect.signature(getattr(gfl_ops, spec.public[0])).parameters)


def by_name(
    spec: OpSpec,
    family: str,
    pool: dict[str, Any],
    what: str,
    *,
    name: str = "",
    peers: dict[str, Callable[..., Any] | None] | None = None,
    gradients: tuple[str, ...] = (),
) -> Case | None:
    """The public function with those of its arguments that the pool has; None where it lacks a required one."""
    wanted = parameters(spec)
    given = {key: pool[key] for key in wanted if key in pool}
    if any(p.default is p.empty and key not in given for key, p in wanted.items()):
        return None
    eager, dense = formulas.find(family, spec.stem)
    known = {"eager": eager} if eager else {}
    function = getattr(gfl_ops, spec.public[0])
    return Case(spec.stem, name or spec.stem, what, given, function, known | (peers or {}), dense, gradients)


def different(got: Any, want: Any) -> float:
    """Share of the elements that differ, by more than rounding where they are floats."""
    wrong = total = 0
    for g, w in zip(tensors(got), tensors(want)):
        if g.shape != w.shape:
            return 1.0
        equal = torch.isclose(g.double(), w.double(), rtol=1e-4, atol=1e-4) if w.is_floating_point() else g == w
        wrong, total = wrong + int((~equal).sum()), total + w.numel()
    return wrong / max(total, 1)
