# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients against torchvision's, in fp64."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core.random_inputs import boxes

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"),
]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    import torchvision

    return torchvision.ops


@pytest.fixture(params=["auto", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user gets, the compiled kernels where they are, and the reference."""
    with gfl_ops.set_backend(request.param):
        yield request.param


def evaluate(function: Any, leaves: list[Tensor], scale: Tensor | None, **options: Any) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves, **options)
    return [loss, *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if scale is None else scale)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.6, "gamma": 1.5}, {"alpha": -1}], ids=str)
def test_sigmoid_focal_loss(
    options: dict[str, Any], reduction: str, ops: ModuleType, generator: torch.Generator
) -> None:
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64) * 3
    targets = torch.rand(9, 4, generator=generator, dtype=torch.float64).round(decimals=1)
    scale = torch.randn(9, 4, generator=generator, dtype=torch.float64) if reduction == "none" else None
    ours = evaluate(gfl_ops.sigmoid_focal_loss, [logits, targets], scale, reduction=reduction, **options)
    theirs = evaluate(ops.sigmoid_focal_loss, [logits, targets], scale, reduction=reduction, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_box_losses(kind: str, ops: ModuleType, generator: torch.Generator) -> None:
    """It adds eps everywhere, below 1e-7 of these areas, and CIoU's last term to pairs of low IoU too, left out."""
    name = {"giou": "generalized", "diou": "distance", "ciou": "complete"}[kind]
    target = boxes(65, torch.device("cpu"), torch.float64, generator)
    size = (target[:, 2:] - target[:, :2]).repeat(1, 2)
    pred = target + torch.randn(65, 4, generator=generator, dtype=torch.float64) * 0.05 * size
    pred[::7] = target[::7]
    pred[::7, 2] += size[::7, 2]
    if kind == "ciou":
        better = gfl_ops.box_iou_loss(pred, target, kind="iou", eps=1e-7, reduction="none") < 0.49
        pred, target = pred[better], target[better]
    scale = torch.randn(len(pred), generator=generator, dtype=torch.float64)
    ours = evaluate(lambda p, t: gfl_ops.box_iou_loss(p, t, kind=kind, reduction="none"), [pred, target], scale)
    theirs = evaluate(getattr(ops, f"{name}_box_iou_loss"), [pred, target], scale)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
