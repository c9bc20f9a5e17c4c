# SPDX-License-Identifier: Apache-2.0
"""D-FINE's FGL and DDF against their formulas.

github.com/Peterande/D-FINE, src/zoo/dfine/{dfine_utils,dfine_criterion}.py; arXiv 2410.13842, section 4.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peers.compare import assert_as_exact, evaluate
from torch import Tensor

import gfl_ops
from gfl_ops.compat import dfine as compat
from gfl_ops.core.random_inputs import boxes as draw_boxes

CPU = torch.device("cpu")
UP, SCALE = torch.tensor([0.5], dtype=torch.float64), 4.0


def offsets(reg_max: int, up: float, scale: float) -> list[float]:
    """W(0) … W(R): −2ac, then −(γⁱ − 1) down to i = 1, 0, and the same upwards; γ = (ac + 1)^(2/(R − 2))."""
    bound, half = abs(up) * abs(scale), reg_max // 2
    step = (bound + 1) ** (2 / (reg_max - 2))
    right = [step**i - 1 for i in range(1, half)]
    return [-2 * bound, *(-x for x in reversed(right)), 0.0, *right, 2 * bound]


@pytest.mark.parametrize("reg_max", [32, 16, 4])
def test_weighting_function(reg_max: int) -> None:
    ours = compat.weighting_function(reg_max, UP, SCALE)
    want = torch.tensor(offsets(reg_max, 0.5, SCALE), dtype=torch.float64)
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-14)
    assert len(ours) == reg_max + 1 and bool((ours.diff() > 0).all())
    for wrong in (7, 2):
        with pytest.raises(ValueError, match="`reg_max` must be even and at least 4"):
            compat.weighting_function(wrong, UP, SCALE)


def bins_of(value: float, reg_max: int) -> tuple[float, float, float]:
    """The greatest bin whose offset is not above, and how far on to the next; the ends take what is beyond them."""
    table = offsets(reg_max, 0.5, SCALE)
    left = sum(x <= value for x in table) - 1
    if left < 0:
        return 0.0, 0.0, 1.0
    if left >= reg_max:
        return reg_max - 0.1, 1.0, 0.0
    right = (value - table[left]) / (table[left + 1] - table[left])
    return float(left), right, 1 - right


def test_translate_gt(generator: torch.Generator) -> None:
    table = torch.tensor(offsets(32, 0.5, SCALE), dtype=torch.float64)
    values = torch.cat([torch.randn(200, generator=generator, dtype=torch.float64) * 3, table, torch.zeros(1)])
    ours = compat.translate_gt(values, 32, SCALE, UP)
    want = torch.tensor([bins_of(v, 32) for v in values.tolist()], dtype=torch.float64).unbind(1)
    # A bin's own offset may fall to the one before it with its whole weight on the right, by rounding.
    for a, b in zip(ours[1:], want[1:]):
        same = (ours[0] - want[0]).abs() < 1e-12
        torch.testing.assert_close(a[same], b[same], rtol=1e-9, atol=1e-9)
    place = [o.clamp(max=31.9).floor() + r for o, r in ((ours[0], ours[1]), (want[0], want[1]))]
    torch.testing.assert_close(*place, rtol=1e-9, atol=1e-9)


def references(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Reference boxes x, y, w, h and boxes xyxy, in image sizes."""
    boxes = draw_boxes(n, CPU, torch.float64, g, extent=1.0) * 0.9
    near = boxes + torch.randn(n, 4, generator=g, dtype=torch.float64) * 0.02
    size = (near[:, 2:] - near[:, :2]).abs() + 0.02
    return torch.cat([(near[:, :2] + near[:, 2:]) / 2, size], 1), boxes


def test_boxes_to_offsets_and_back(generator: torch.Generator) -> None:
    points, boxes = references(50, generator)
    left, right_weight, left_weight = compat.bbox2distance(points, boxes, 32, SCALE, UP)
    assert left.shape == right_weight.shape == left_weight.shape == (200,)
    expected = []
    for (x, y, w, h), (x0, y0, x1, y1) in zip(points.tolist(), boxes.tolist()):
        for side in ((x - x0) / w, (y - y0) / h, (x1 - x) / w, (y1 - y) / h):
            # A side at half the reference's size is at offset 0.
            expected.append(bins_of(side * SCALE - 0.5 * SCALE, 32))
    want = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(left, want[:, 0].clamp(max=31.9), rtol=0, atol=1e-9)
    torch.testing.assert_close(right_weight, want[:, 1], rtol=0, atol=1e-9)

    table = compat.weighting_function(32, UP, SCALE)
    inner = left.long()
    offset = (left_weight * table[inner] + right_weight * table[inner + 1]).reshape(-1, 4)
    back = compat.distance2bbox(points, offset, SCALE)
    want_back = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    reached = (offset.abs() < 2 * 0.5 * SCALE - 1e-9).all(1)
    assert int(reached.sum()) > 10
    torch.testing.assert_close(back[reached], want_back[reached], rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [0, 37])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "factor"])
def test_fine_grained_localization_loss(m: int, weighted: bool, reduction: str, generator: torch.Generator) -> None:
    logits = torch.randn(m, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(m, generator=generator, dtype=torch.float64) * 2
    left, right_weight, left_weight = compat.translate_gt(values, 32, SCALE, UP)
    weight = torch.rand(m, generator=generator, dtype=torch.float64) if weighted else None
    log_p, rows, low = logits.log_softmax(1), torch.arange(m), left.long()
    want = -(left_weight * log_p[rows, low] + right_weight * log_p[rows, low + 1])
    want = want if weight is None else want * weight
    call = {"avg_factor": 5.0} if reduction == "factor" else {"reduction": reduction}
    want = want.sum() / 5 if reduction == "factor" else want if reduction == "none" else getattr(want, reduction)()
    ours = compat.unimodal_distribution_focal_loss(logits, left, right_weight, left_weight, weight, **call)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12, equal_nan=m == 0)
    scale = torch.ones_like(want)
    got, wanted = (torch.autograd.grad(x, logits, scale)[0] for x in (ours, want))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def distilled(pred: Tensor, teacher: Tensor, weight: Tensor, matched: Tensor, t: float) -> Tensor:
    """√N-weighted means of w T² Σ q log(q/p) over the matched and the unmatched rows."""
    p, q = (pred / t).softmax(1), (teacher / t).softmax(1)
    rows = weight * t**2 * (q * (q.log() - p.log())).sum(1)
    parts = [rows[chosen] for chosen in (matched, ~matched)]
    means = [part.mean() if len(part) else rows.sum() * 0 for part in parts]
    roots = [len(part) ** 0.5 for part in parts]
    return (means[0] * roots[0] + means[1] * roots[1]) / sum(roots)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_decoupled_distillation_loss(share: float, generator: torch.Generator) -> None:
    pred = torch.randn(60, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(60, 33, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(60, generator=generator, dtype=torch.float64)
    matched = torch.rand(60, generator=generator) < share
    ours = compat.decoupled_distillation_loss(pred, teacher, weight, matched)
    want = distilled(pred, teacher.detach(), weight, matched, 5.0)
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)
    got, wanted = (torch.autograd.grad(x, pred)[0] for x in (ours, want))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)
    counts = (torch.tensor(4), torch.tensor(16))
    other = compat.decoupled_distillation_loss(pred, teacher, weight, matched, counts=counts)
    parts = [distilled(pred[c], teacher[c], weight[c], matched[c], 5.0) for c in (matched, ~matched) if c.any()]
    if len(parts) == 2:
        torch.testing.assert_close(other, (parts[0] * 2 + parts[1] * 4) / 6, rtol=1e-10, atol=0)
    assert torch.autograd.grad(other, teacher, allow_unused=True, retain_graph=True)[0] is None


def test_distillation_of_nothing_and_in_half_precision(generator: torch.Generator) -> None:
    empty = torch.zeros(0, 33, requires_grad=True)
    loss = compat.decoupled_distillation_loss(empty, empty, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and empty.grad is not None
    pred, teacher = torch.randn(2, 40, 33, generator=generator).bfloat16()
    weight, matched = torch.rand(40, generator=generator), torch.arange(40) < 9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = compat.decoupled_distillation_loss(pred, teacher, weight, matched)
    want = distilled(pred.double(), teacher.double(), weight.double(), matched, 5.0)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=0)
    assert torch.equal(compat.decoupled_distillation_loss(pred, pred, weight, matched), torch.zeros(()))
    with pytest.raises(ValueError, match="`temperature` must be > 0"):
        compat.decoupled_distillation_loss(pred, teacher, weight, matched, temperature=0)
    with pytest.raises(TypeError, match="`matched` must have one of the dtypes bool"):
        compat.decoupled_distillation_loss(pred, teacher, weight, matched.long())


@pytest.mark.peers
@pytest.mark.parametrize("matched", [7, 0], ids=["boxes", "no-boxes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_losses_of_transformers(dtype: torch.dtype, matched: int, generator: torch.Generator) -> None:
    """FGL and DDF as the package `transformers` has them, of one decoder layer: values and gradients.

    Boxes are fp32 there whatever the logits are: its `translate_gt` takes nothing else.
    """
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed (tests/support/peers/requirements.txt)")
    from transformers import DFineConfig
    from transformers.loss.loss_d_fine import DFineLoss

    theirs = DFineLoss(DFineConfig())
    bins, queries = theirs.max_num_bins, 30
    pairs = [references(queries, generator) for _ in range(2)]
    points = torch.stack([p for p, _ in pairs]).float()
    corners, teacher = torch.randn(2, 2, queries, 4 * (bins + 1), generator=generator).to(dtype)
    logits = torch.randn(2, queries, 5, generator=generator)
    # The same queries of both images, each with the box that was drawn beside it.
    chosen = [torch.randperm(queries, generator=generator)[:matched] for _ in pairs]
    boxes = torch.stack([torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1) for _, b in pairs]).float()

    def of_theirs(x: Tensor) -> list[Tensor]:
        outputs = {"pred_corners": x, "ref_points": points, "pred_boxes": points}
        outputs |= {"teacher_corners": teacher.to(x.dtype), "teacher_logits": logits}
        targets = [{"boxes": b[i]} for b, i in zip(boxes, chosen)]
        found = theirs.loss_local(outputs, targets, [(i, torch.arange(matched)) for i in chosen], 9.0)
        return [found["loss_fgl"], found["loss_ddf"]]

    def of_ours(x: Tensor) -> list[Tensor]:
        image = torch.arange(2).repeat_interleave(matched)
        at = (image, torch.cat(chosen))
        truth = torch.stack([b for _, b in pairs])[at].float()
        target = compat.bbox2distance(points[at], truth, bins, theirs.reg_scale, theirs.up)
        own = points[at]
        own = torch.cat([own[:, :2] - own[:, 2:] / 2, own[:, :2] + own[:, 2:] / 2], 1)
        iou = 1 - gfl_ops.box_iou_loss(own, truth, kind="iou", reduction="none")
        rows = x[at].reshape(-1, bins + 1)
        fgl = compat.unimodal_distribution_focal_loss(rows, *target, iou.repeat_interleave(4), avg_factor=9.0)
        weight, mask = logits.sigmoid().amax(-1), torch.zeros(2, queries, dtype=torch.bool)
        weight[at], mask[at] = iou, True
        flat = [t.reshape(-1, bins + 1) for t in (x, teacher.to(x.dtype))]
        sides = [t.reshape(-1).repeat_interleave(4) for t in (weight, mask)]
        return [fgl, compat.decoupled_distillation_loss(*flat, *sides)]

    truth = evaluate(of_theirs, [corners.double()])
    # Sums over hundreds of rows in another order, and bins' edges whose last bits differ.
    assert_as_exact(evaluate(of_ours, [corners]), evaluate(of_theirs, [corners]), truth, share=100.0)
