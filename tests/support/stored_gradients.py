# SPDX-License-Identifier: Apache-2.0
"""Inputs for the losses that compute their gradient in forward, and a mode that sees which operators run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gfl_ops
from gfl_ops.core.random_inputs import boxes as draw_boxes


class Operators(TorchDispatchMode):
    """The package's operators that run while the mode is on, in turn, and address and shape of what each returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[list[tuple[int, torch.Size]]] = []  # not the tensors, which would be shared then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace.startswith("gfl"):
            self.names.append(func._opname)
            self.results.append([(t.data_ptr(), t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)])
        return result


class Subclass(Tensor):
    """Changes nothing, but no kernel may know that: the ordinary operators and their autograd compute its loss."""


@dataclass(frozen=True)
class Case:
    """One loss: `leaves` that its gradient reaches, `call` on them, gradients that may arrive at its outputs, and the
    other tensors."""

    leaves: list[Tensor]
    call: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    factors: list[tuple[Any, ...]]
    tensors: tuple[Tensor, ...] = ()

    def gradient(self, outputs: tuple[Tensor, ...], factor: tuple[Any, ...], **options: Any) -> tuple[Tensor, ...]:
        outputs = outputs[: len(factor)]
        arriving = [torch.as_tensor(f).to(o).expand_as(o) for f, o in zip(factor, outputs)]
        return torch.autograd.grad(outputs, self.leaves, arriving, **{"retain_graph": True} | options)

    def ordinary(self) -> tuple[Tensor, ...]:
        outputs = self.call([leaf.as_subclass(Subclass) for leaf in self.leaves])  # type: ignore[arg-type]
        return tuple(o.as_subclass(Tensor) for o in outputs)


@dataclass(frozen=True)
class Family:
    """A loss, the operators of its three steps in turn, and those that run where nothing is stored."""

    name: str
    draw: Callable[[torch.Generator, torch.device], Case]
    steps: tuple[str, str, str]
    backends: tuple[tuple[str, str], ...] = (("native", "cpu"), ("native", "cuda"))


SCALARS = [(1.0,), (0.0,), (2.0,), (float("nan"),)]


def quality(generator: torch.Generator, device: torch.device, n: int = 333, c: int = 37, **options: Any) -> Case:
    pred = (torch.randn(n, c, generator=generator) * 3).to(device).requires_grad_()
    label = torch.randint(-2, c + 4, (n,), generator=generator).to(device)
    score = torch.rand(n, generator=generator).to(device)
    return Case([pred], lambda x: (gfl_ops.quality_focal_loss(x[0], (label, score), **options),), SCALARS)


def bins(generator: torch.Generator, device: torch.device, rows: int = 2005, **options: Any) -> Case:
    pred = (torch.randn(rows, 17, generator=generator) * 3).to(device).requires_grad_()
    target = (torch.rand(rows, generator=generator) * 16).to(device)
    mixed = torch.randn(rows, generator=generator).to(device)
    factors = [(1.0, mixed), (0.0, 2 * mixed), (2.0, 0.0), (float("nan"), 1.0)]
    return Case([pred], lambda x: gfl_ops.dfl_integral(x[0], target, **options), factors)


STRIDES, SIZES, CLASSES, REG_MAX = [8.0, 16.0, 32.0], [(19, 23), (5, 7), (1, 1)], 37, 7


def head(
    generator: torch.Generator,
    device: torch.device,
    change: Callable[[Tensor], Tensor] = lambda m: m,
    **options: Any,
) -> Case:
    """Maps of two images and what is asked of them: a tenth of the locations positive, a tenth left out."""
    cells = sum(h * w for h, w in SIZES)
    maps = [
        (torch.randn((2, channels, h, w), generator=generator) * 2).to(device)
        for channels in (CLASSES, 4 * (REG_MAX + 1))
        for h, w in SIZES
    ]
    kind = torch.rand((2, cells), generator=generator)
    drawn = torch.randint(0, CLASSES, (2, cells), generator=generator)
    labels = torch.where(kind < 0.1, drawn, torch.where(kind > 0.9, -2, -1)).to(device)
    matched = torch.randint(0, 3, (2, cells), generator=generator).to(device)
    assignment = gfl_ops.Assignment(labels, matched, torch.zeros(2, cells, device=device))
    gt_boxes = draw_boxes(6, device, torch.float32, generator, extent=180.0).view(2, 3, 4)

    def call(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        half = len(maps) // 2
        scores, preds = list(maps[:half]), list(maps[half:])
        return tuple(gfl_ops.gfl_loss(scores, preds, STRIDES, assignment, gt_boxes, reg_max=REG_MAX, **options))

    factors = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.5, -3.0), (1.0, 1.0, float("nan"))]
    leaves = [change(m).detach().requires_grad_() for m in maps]
    return Case(leaves, call, factors, (labels, matched, gt_boxes))


FAMILIES = [
    Family(
        "score",
        quality,
        ("score_loss_fwd", "score_loss_finish", "score_loss_bwd"),
        (("native", "cpu"), ("native", "cuda"), ("triton", "cpu"), ("triton", "cuda")),
    ),
    Family("bins", bins, ("dfl_keep", "dfl_finish", "dfl_keep dfl_finish"), (("native", "cpu"),)),
    Family("head", head, ("gfl_loss_fwd_and_grad", "gfl_loss_finish", "gfl_loss_bwd")),
]
STEMS = {"score": "qfl", "bins": "dfl_integral", "head": "gfl_loss"}
