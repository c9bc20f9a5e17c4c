# SPDX-License-Identifier: Apache-2.0
"""YOLOv6's and PP-YOLOE's losses against their formulas.

github.com/meituan/YOLOv6, yolov6/models/losses/loss.py and yolov6/utils/figure_iou.py;
github.com/Deci-AI/super-gradients, src/super_gradients/training/losses/ppyolo_loss.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peers.compare import assert_as_exact, evaluate
from torch import Tensor
from torch.nn import functional as F

from gfl_ops.compat import yolov6 as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

CPU = torch.device("cpu")


@pytest.mark.parametrize("activated", [True, False], ids=["yolov6", "super-gradients"])
@pytest.mark.parametrize("case", ["mixed", "negative", "empty"])
def test_varifocal_loss(activated: bool, case: str, generator: torch.Generator) -> None:
    """Sum of (α pᵞ (1 − label) + q·label) · BCE(p, q), p the score, q its target."""
    shape = (2, 0 if case == "empty" else 30, 5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    x = (x.sigmoid() * 0.98 + 0.01 if activated else x).requires_grad_()
    label = (torch.rand(shape, generator=generator) < (0.2 if case == "mixed" else 0)).long()
    q = torch.rand(shape, generator=generator, dtype=torch.float64) * label
    q = q * (torch.rand(shape, generator=generator) < 0.8)  # positives whose score came out as 0
    p = x if activated else x.sigmoid()
    want = ((0.75 * p**2 * (1 - label) + q * label) * F.binary_cross_entropy(p, q, reduction="none")).sum()
    ours = compat.VarifocalLoss(activated)(x, q, label)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)
    got, wanted = (torch.autograd.grad(loss, x)[0] for loss in (ours, want))
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


def scene(positives: int, g: torch.Generator, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As BboxLoss.forward's arguments: two images of 60 points, 17 bins a side."""
    target = draw_boxes(120, CPU, torch.float64, g, extent=30.0).reshape(2, 60, 4)
    pred = target + torch.randn(2, 60, 4, generator=g, dtype=torch.float64)
    pred[..., 2:] = torch.maximum(pred[..., 2:], pred[..., :2] + 0.5)
    fg = torch.zeros(120, dtype=torch.bool)
    fg[torch.randperm(120, generator=g)[:positives]] = True
    fg = fg.reshape(2, 60)
    scores = torch.rand(2, 60, 3, generator=g, dtype=torch.float64) * fg[..., None]
    dist = torch.randn(2, 60, 68, generator=g, dtype=torch.float64)
    points = torch.rand(60, 2, generator=g, dtype=torch.float64) * 30
    given = [dist, pred, points, target, scores, scores.sum()]
    return [*(x.to(dtype) for x in given), fg]


def by_the_formula(
    dist: Tensor, pred: Tensor, points: Tensor, target: Tensor, scores: Tensor, total: Tensor, fg: Tensor
) -> tuple[Tensor, Tensor]:
    """Box by box: GIoU of xyxy boxes, and the mean over the sides of the two bins' cross entropy."""
    loss_iou, loss_dfl, norm = dist.sum() * 0, dist.sum() * 0, max(float(total), 1.0)
    for b, a in fg.nonzero().tolist():
        w, p, t = scores[b, a].sum(), pred[b, a], target[b, a]
        inter = (torch.minimum(p[2:], t[2:]) - torch.maximum(p[:2], t[:2])).clamp(min=0).prod()
        union = (p[2:] - p[:2]).prod() + (t[2:] - t[:2]).prod() - inter
        hull = (torch.maximum(p[2:], t[2:]) - torch.minimum(p[:2], t[:2])).prod()
        loss_iou = loss_iou + w * (1 - (inter / union - (hull - union) / hull)) / norm
        ltrb = torch.cat([points[a] - t[:2], t[2:] - points[a]]).clamp(0, 16 - 0.01)
        for side, y in enumerate(ltrb):
            log_p = dist[b, a, 17 * side : 17 * side + 17].log_softmax(0)
            low = int(y)
            cost = -((low + 1 - y) * log_p[low] + (y - low) * log_p[low + 1])
            loss_dfl = loss_dfl + w * cost / 4 / norm
    return loss_iou, loss_dfl


@pytest.mark.parametrize("positives", [0, 1, 40])
def test_bbox_loss(positives: int, generator: torch.Generator) -> None:
    given = scene(positives, generator)
    leaves = [given[0].requires_grad_(), given[1].requires_grad_()]
    ours = compat.BboxLoss(3, 16, use_dfl=True, iou_type="giou")(*given)
    theirs = by_the_formula(*given)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
        got = torch.autograd.grad(a, leaves[1 - i], retain_graph=True)[0] if positives else torch.zeros(1)
        want = torch.autograd.grad(b, leaves[1 - i], retain_graph=True)[0] if positives else torch.zeros(1)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-12)
    sum(ours).backward()
    assert leaves[0].grad is not None, "without a positive too"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, generator: torch.Generator) -> None:
    given = scene(30, generator, torch.float32)
    given[0], given[1] = given[0].to(dtype), given[1].to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compat.BboxLoss(3, 16, use_dfl=True)(*given)
    theirs = by_the_formula(*(x.double() if x.is_floating_point() else x for x in given))
    for a, b in zip(ours, theirs):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_without_distributions_and_with_other_overlaps(generator: torch.Generator) -> None:
    given = scene(20, generator)
    _, nothing = compat.BboxLoss(3, 16)(*given)
    assert nothing == 0
    diou, _ = compat.BboxLoss(3, 16, iou_type="diou")(*given)
    assert diou > 0
    with pytest.raises(NotImplementedError, match="`iou_type` must be 'giou' or 'diou', got siou"):
        compat.BboxLoss(3, 16, iou_type="siou")
    with pytest.raises(ValueError, match="`iou_type` must be one of"):
        compat.BboxLoss(3, 16, iou_type="iou2")


@pytest.mark.peers
@pytest.mark.parametrize("positives", [40, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("iou_type", ["giou", "diou"])
def test_the_losses_of_the_package(
    iou_type: str, dtype: torch.dtype, positives: int, generator: torch.Generator
) -> None:
    """YOLOv6's own code, as yolov6detect packs it: values and gradients of all three losses."""
    if importlib.util.find_spec("yolov6") is None:
        pytest.skip("yolov6detect is not installed (tests/support/peers/requirements_alone.txt)")
    from yolov6.models.losses import loss as theirs

    dist, pred, points, target, scores, total, fg = scene(positives, generator)
    # What all compute from is rounded once.
    scores = scores.to(dtype).double()
    probability = (torch.rand(scores.shape, generator=generator) * 0.96 + 0.02).to(dtype)
    label = (scores > 0).long()

    def call(vfl: torch.nn.Module, bbox: torch.nn.Module, p: Tensor, d: Tensor, b: Tensor) -> list[Tensor]:
        wide = torch.promote_types(p.dtype, torch.float32)
        given = [x.to(wide) for x in (points, target, scores, total)]
        return [vfl(p, scores.to(p.dtype), label), *bbox(d, b, *given, fg)]

    def of_theirs(*leaves: Tensor) -> list[Tensor]:
        return call(theirs.VarifocalLoss(), theirs.BboxLoss(3, 16, True, iou_type), *leaves)

    def of_ours(*leaves: Tensor) -> list[Tensor]:
        return call(compat.VarifocalLoss(), compat.BboxLoss(3, 16, True, iou_type), *leaves)

    leaves = [probability, dist.to(dtype), pred.to(dtype)]
    exact = evaluate(of_theirs, [leaf.double() for leaf in leaves])
    # Sums of hundreds of losses in another order. Theirs casts the scores to fp32 and adds 1e-7 to a height.
    share = 2.0**31 if dtype == torch.float64 else 100.0
    assert_as_exact(evaluate(of_ours, leaves), evaluate(of_theirs, leaves), exact, share)
