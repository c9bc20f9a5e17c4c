# SPDX-License-Identifier: Apache-2.0
"""NanoDet's dialect against its formulas: github.com/RangiLyu/nanodet, nanodet/model/{loss,head,module}."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gfl_ops.compat import nanodet as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.ops.head.assign import draw_objects, draw_predictions
from gfl_ops.ops.head.dynamic_k_reference import grid_points

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["mixed", "negative", "empty"])
def test_losses(case: str, generator: torch.Generator) -> None:
    """loss/gfocal_loss.py: QFL of (label, score), label C for background, summed over classes; DFL of two bins."""
    n, classes = (0 if case == "empty" else 19), 4
    pred = torch.randn(n, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, classes + 1, (n,), generator=generator)
    label = torch.full_like(label, classes) if case == "negative" else label
    score = torch.rand(n, generator=generator, dtype=torch.float64)
    target = F.one_hot(label, classes + 1)[:, :classes] * score[:, None]
    elements = (target - pred.sigmoid()) ** 2 * F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    ours = compat.QualityFocalLoss(beta=2.0, loss_weight=1.5)(pred, (label, score), avg_factor=3.0)
    want = 1.5 * elements.sum() / (3.0 + torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)
    got, wanted = (torch.autograd.grad(x, pred)[0] for x in (ours, want))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)

    logits = torch.randn(n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.rand(n, generator=generator, dtype=torch.float64) * 6.9
    low = y.long()
    log_p = logits.log_softmax(1)
    rows = torch.arange(n)
    want = -((low + 1 - y) * log_p[rows, low] + (y - low) * log_p[rows, low + 1]).sum() / (4 + 1.1920929e-07)
    ours = compat.DistributionFocalLoss(loss_weight=1.0)(logits, y, avg_factor=4.0)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)
    got, wanted = (torch.autograd.grad(x, logits)[0] for x in (ours, want))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_integral(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> None:
    """head/gfl_head.py: softmax of R + 1 bins times 0 … R; head/nanodet_plus_head.py wants the shape kept."""
    module = compat.Integral(7)
    assert module.state_dict().keys() == {"project"} and module.project.tolist() == list(range(8))
    x = torch.randn(*shape, 32, generator=generator).to(dtype)
    want = (x.double().unflatten(-1, (4, 8)).softmax(-1) * torch.arange(8.0)).sum(-1)
    ours = module(x)
    assert ours.shape == (*shape, 4) and ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), want, rtol=1e-6, atol=1e-6)


def by_the_loop(
    boxes: Tensor, scores: Tensor, score_thr: float, iou_threshold: float, factors: Tensor | None, agnostic: bool
) -> list[tuple[int, int]]:
    """module/nms.py: threshold, then the factor, then greedy suppression within a class; (row, class) by score."""
    found = []
    for row in range(len(scores)):
        for c in range(scores.shape[1] - 1):
            if scores[row, c] > score_thr:
                score = float(scores[row, c] * (1.0 if factors is None else factors[row]))
                found.append((-score, row, c))
    kept: list[tuple[int, int]] = []
    for _, row, c in sorted(found):
        box = boxes[row].reshape(-1, 4)[c if boxes.shape[1] > 4 else 0].double()
        clear = True
        for other, d in kept:
            rival = boxes[other].reshape(-1, 4)[d if boxes.shape[1] > 4 else 0].double()
            side = (torch.minimum(box[2:], rival[2:]) - torch.maximum(box[:2], rival[:2])).clamp(min=0)
            inter = side.prod()
            union = (box[2:] - box[:2]).prod() + (rival[2:] - rival[:2]).prod() - inter
            clear &= not ((agnostic or c == d) and inter / union > iou_threshold)
        if clear:
            kept.append((row, c))
    return kept


@pytest.mark.parametrize("form", ["shared", "per-class"])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("agnostic", [False, True])
def test_multiclass_nms(form: str, factored: bool, agnostic: bool, generator: torch.Generator) -> None:
    n, classes = 25, 3
    count = n if form == "shared" else n * classes
    boxes = draw_boxes(count, CPU, torch.float32, generator, extent=60.0).reshape(n, -1)
    scores = torch.rand(n, classes + 1, generator=generator)
    factors = torch.rand(n, generator=generator) if factored else None
    config = {"type": "nms", "iou_threshold": 0.5, "class_agnostic": agnostic}
    kept = by_the_loop(boxes, scores, 0.4, 0.5, factors, agnostic)
    for limit in (-1, 7):
        dets, labels = compat.multiclass_nms(boxes, scores, 0.4, config, limit, factors)
        want = kept[:limit] if limit > 0 else kept
        assert labels.tolist() == [c for _, c in want] and dets.shape == (len(want), 5)
        for det, (row, c) in zip(dets, want):
            assert torch.equal(det[:4], boxes[row].reshape(-1, 4)[c if form == "per-class" else 0])
            assert float(det[4]) == float(scores[row, c] * (1 if factors is None else factors[row]))


def test_nothing_found_and_unknown_settings() -> None:
    boxes, scores = torch.rand(3, 4), torch.zeros(3, 3)
    dets, labels = compat.multiclass_nms(boxes, scores, 0.1, {"type": "nms", "iou_threshold": 0.6}, 100)
    assert dets.shape == (0, 5) and labels.shape == (0,)
    for config in ({"iou_threshold": 0.5, "sigma": 1}, {"type": "soft_nms", "iou_threshold": 0.5}, {"type": "nms"}):
        with pytest.raises(ValueError, match="`nms_cfg` must have `iou_threshold`"):
            compat.multiclass_nms(boxes, scores, 0.1, config)


def assigned(scores: Tensor, priors: Tensor, boxes: Tensor, gt: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which box, from 1, each prior learns by NanoDet-Plus' rule with matrices of priors and boxes, and its overlap."""
    margin = torch.cat([priors[:, None, :2] - gt[:, :2], gt[:, 2:] - priors[:, None, :2]], -1).amin(-1)
    valid = (margin > 0).any(1)
    corner = torch.maximum(boxes[:, None, :2], gt[:, :2]), torch.minimum(boxes[:, None, 2:], gt[:, 2:])
    common = (corner[1] - corner[0]).clamp(min=0).prod(-1)
    iou = common / ((boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None] + (gt[:, 2:] - gt[:, :2]).prod(1) - common)
    soft = F.one_hot(labels, scores.shape[1]) * iou[..., None]
    spread = scores[:, None].expand_as(soft)
    bce = F.binary_cross_entropy(spread, soft, reduction="none")
    cost = (bce * (soft - spread) ** 2).sum(-1) - 3 * (iou + 1e-7).log()
    cost[~valid] = torch.inf
    many = iou[valid].topk(min(13, int(valid.sum())), 0).values.sum(0).int().clamp(min=1)
    chosen = torch.zeros_like(cost, dtype=torch.bool)
    for g, k in enumerate(many.tolist()):
        chosen[cost[:, g].topk(k, largest=False).indices, g] = True
    several = chosen.sum(1) > 1
    chosen[several] = F.one_hot(cost[several].argmin(1), len(gt)).bool()
    positive = chosen.any(1)
    slot = chosen.int().argmax(1)
    reached = iou.gather(1, slot[:, None])[:, 0]
    return torch.where(positive, slot + 1, 0), torch.where(positive, reached, -1e8)


def test_assigner(generator: torch.Generator) -> None:
    priors = grid_points([12, 12, 6, 6], [8.0, 16.0], [0.0, 0.0], CPU)
    gt, labels = draw_objects(1, 9, 4, 96.0, CPU, generator)
    gt, labels = gt[0], labels[0].clamp(min=0)
    scores, boxes = draw_predictions(gt[None], priors[:, :2], 4, torch.float32, generator)
    found = compat.DynamicSoftLabelAssigner(topk=13, iou_factor=3.0).assign(scores[0], priors, boxes[0], gt, labels)
    slot, overlap = assigned(scores[0], priors, boxes[0], gt, labels)
    assert found.num_gts == 9 and torch.equal(found.gt_inds, slot) and (slot > 0).sum() > 8
    assert torch.equal(found.labels, torch.where(slot > 0, labels[(slot - 1).clamp(min=0)], -1))
    torch.testing.assert_close(found.max_overlaps, overlap)
    none = compat.DynamicSoftLabelAssigner().assign(scores[0], priors, boxes[0], gt[:0], labels[:0])
    assert none.num_gts == 0 and not none.gt_inds.any() and not none.max_overlaps.any() and (none.labels == -1).all()
