# SPDX-License-Identifier: Apache-2.0
"""The cases of every operator in the registry, made from a scene.

An operator's family is the folder of its public function, ``gfl_ops/ops/<family>``. The module of that name here turns
a scene into inputs of real shapes: for a named operator by its entry in `MAKERS`, for any other by `generic`, which
fills in the public function's arguments by their names. An operator that neither covers is timed on the largest of its
own samples. So a new operator is timed without an edit here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import gfl_ops
from clock import tensors
from gfl_ops.core.registry import SPECS, OpSpec
from harness import Case
from inputs import Scene

from .common import different

FAMILIES = ("score", "bins", "boxes", "select", "head")


def family(spec: OpSpec) -> str:
    """The folder of the operator's public function."""
    return getattr(gfl_ops, spec.public[0]).__module__.split(".")[-2]


def order() -> list[str]:
    """Every operator, family by family."""
    return sorted(SPECS, key=lambda stem: [*FAMILIES, family(SPECS[stem])].index(family(SPECS[stem])))


def make(stem: str, scene: Scene, dtype: torch.dtype, device: str) -> list[Case]:
    """The operator's cases with their inputs on the device; none for a dtype that it does not take."""
    if dtype not in SPECS[stem].dtypes:
        return []
    made = list(maker(SPECS[stem])(scene, dtype)) or [from_sample(SPECS[stem], dtype)]
    return [on(case, device) for case in made]


def on(case: Case, device: str) -> Case:
    """The case with its inputs on the device."""
    return replace(case, inputs=tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, case.inputs))


def maker(spec: OpSpec) -> Callable[[Scene, torch.dtype], Iterator[Case]]:
    """What makes the operator's cases; nothing comes out of it where its family can't fill in the arguments."""
    name = f"{__name__}.{family(spec)}"
    if importlib.util.find_spec(name) is None:
        return lambda scene, dtype: iter(())
    module = importlib.import_module(name)
    if spec.stem in module.MAKERS:
        return module.MAKERS[spec.stem]
    return lambda scene, dtype: module.generic(spec, scene, dtype) if hasattr(module, "generic") else iter(())


def from_sample(spec: OpSpec, dtype: torch.dtype) -> Case:
    """The operator itself on the largest of its samples."""
    samples = spec.samples(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))
    sample = max(samples, key=lambda s: sum(t.numel() for t in tensors(s.args)))
    inputs = dict(zip(spec.arguments, sample.args))

    def ours(**arguments: Any) -> Any:
        return spec(next(iter(tensors(arguments))).device.type, *arguments.values())

    agree = None if spec.differentiable else different
    return Case(spec.stem, spec.stem, f"sample {sample.id}", inputs, ours, gradients=spec.differentiable, agree=agree)
