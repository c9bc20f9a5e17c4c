# SPDX-License-Identifier: Apache-2.0
"""GFocal v1's losses against its formulas: github.com/implus/GFocal, mmdet/models/losses/gfocal_loss.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gfl_ops
from gfl_ops.compat import gfocal_v1 as compat


def by_the_formula(pred: Tensor, label: Tensor, score: Tensor, beta: float) -> Tensor:
    """Every class an element, [N, C]: |t − p|^β BCE; label 0 is background, label c has its target in column c − 1."""
    target = torch.zeros_like(pred)
    rows = (label > 0).nonzero()[:, 0]
    target = target.index_put((rows, label[rows] - 1), score[rows])
    p = pred.sigmoid()
    return (target - p).abs() ** beta * F.binary_cross_entropy_with_logits(pred, target, reduction="none")


def drawn(n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    pred = (torch.randn(n, 5, generator=g, dtype=torch.float64) * 2).requires_grad_()
    score = torch.rand(n, generator=g, dtype=torch.float64).requires_grad_()
    return pred, torch.randint(0, 6, (n,), generator=g), score


@pytest.mark.parametrize("beta", [2.0, 1.5])
@pytest.mark.parametrize("weighted", [None, "elements", "rows"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "factor"])
@pytest.mark.parametrize("case", ["mixed", "negative", "empty"])
def test_quality_focal_loss(
    case: str, reduction: str, weighted: str | None, beta: float, generator: torch.Generator
) -> None:
    n = 0 if case == "empty" else 23
    pred, label, score = drawn(n, generator)
    label = label * (case != "negative")
    weight = None
    if weighted:
        weight = torch.rand(n, 5 if weighted == "elements" else 1, generator=generator, dtype=torch.float64)
    call: dict[str, Any] = {"avg_factor": 7.0} if reduction == "factor" else {"reduction_override": reduction}
    ours = compat.QualityFocalLoss(beta=beta, loss_weight=0.5)(pred, label, score, weight, **call)

    want = 0.5 * by_the_formula(pred, label, score, beta) * (1.0 if weight is None else weight)
    if reduction == "factor":
        want = want.sum() / (7.0 + torch.finfo(torch.float32).eps)
    elif reduction != "none":
        want = getattr(want, reduction)()
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12, equal_nan=case == "empty")
    if n:
        scale = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        got = torch.autograd.grad(ours, [pred, score], scale)
        wanted = torch.autograd.grad(want, [pred, score], scale)
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    pred, label, score = (x.detach() for x in drawn(40, generator))
    pred, score = pred.to(dtype), score.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compat.quality_focal_loss(pred, label, score, reduction="sum")
    assert ours.dtype == torch.float32
    want = by_the_formula(pred.double(), label, score.double(), 2.0).sum()
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=0)


def test_wrong_input() -> None:
    pred, label, score = torch.randn(3, 5), torch.zeros(3, dtype=torch.long), torch.rand(3)
    with pytest.raises(ValueError, match=r"`weight` must have shape \[N, C\] = \[3, 5\] or \[N, 1\], got \[3\]"):
        compat.quality_focal_loss(pred, label, score, torch.ones(3))
    with pytest.raises(ValueError, match="avg_factor can not be used"):
        compat.quality_focal_loss(pred, label, score, reduction="sum", avg_factor=2)
    with pytest.raises(NotImplementedError, match="`use_sigmoid` must be True"):
        compat.QualityFocalLoss(use_sigmoid=False)


def test_its_geometry() -> None:
    """Centres (s − 1)/2 pixels on, boxes that name their last pixel, the best places by their best class."""
    cls, reg = [torch.full((1, 2, 2, 2), -9.0)], [torch.zeros(1, 68, 2, 2)]
    cls[0][0, :, 1, 1] = torch.tensor([2.0, 1.0])
    found = compat.postprocess(cls, reg, [8], [[64, 64]], nms_pre=1)
    assert found.labels[0, :2].tolist() == [0, 1] and int(found.count) == 2
    centre = 8 + 3.5
    assert found.boxes[0, 0].tolist() == [max(centre - 64, 0)] * 2 + [min(centre + 64, 63)] * 2
    same = gfl_ops.atss_assign([(8, 8)], [8], torch.tensor([[[4.0, 4, 40, 40]]]), torch.tensor([[1]]), legacy=True)
    own = compat.atss_assign([(8, 8)], [8], torch.tensor([[[4.0, 4, 40, 40]]]), torch.tensor([[1]]))
    assert torch.equal(same.labels, own.labels)
