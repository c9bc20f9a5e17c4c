# SPDX-License-Identifier: Apache-2.0
"""The head's loss against a composition of the single losses, and what is special to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops import Assignment
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes

pytestmark = pytest.mark.usefixtures("everywhere")

BACKENDS = ["reference"] + (["native"] if backends.unavailable("native", "gfl_loss", "cpu") is None else [])
STRIDES = [8.0, 16.0, 32.0]
SIZES = [(9, 13), (5, 7), (1, 3)]
SLOTS, REG_MAX = 4, 16


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    with gfl_ops.set_backend(request.param):
        yield request.param


def drawn(generator: torch.Generator, classes: int = 20, dtype: torch.dtype = torch.float64, images: int = 2):
    """Maps, an assignment and its boxes; every sixth location a positive, every tenth left out."""

    def maps(channels: int) -> list[Tensor]:
        return [
            torch.randn((images, channels, h, w), generator=generator, dtype=torch.float64).to(dtype) for h, w in SIZES
        ]

    cells = sum(h * w for h, w in SIZES)
    kind = torch.rand((images, cells), generator=generator)
    labels = torch.randint(0, classes, (images, cells), generator=generator)
    labels = torch.where(kind < 1 / 6, labels, torch.where(kind > 0.9, -2, -1))
    matched = torch.where(labels < 0, -1, torch.randint(0, SLOTS, (images, cells), generator=generator))
    gt = draw_boxes(images * SLOTS, torch.device("cpu"), torch.float64, generator, extent=100.0).view(images, SLOTS, 4)
    return (
        maps(classes),
        maps(4 * (REG_MAX + 1)),
        Assignment(labels, matched, torch.zeros(images, cells)),
        gt.to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


def composed(scores, distributions, assignment, gt, legacy=False, offset=0.0):
    """The same from the single losses, positives picked out by index. Returns the sums of the three, and both norms."""
    cls = box = dfl = weight = torch.zeros((), dtype=torch.float64)
    start = 0
    for score_map, distribution, stride in zip(scores, distributions, STRIDES):
        _images, classes, height, width = score_map.shape
        here = slice(start, start + height * width)
        start = here.stop
        labels, matched = assignment.labels[:, here].reshape(-1), assignment.matched[:, here].reshape(-1)
        logits = score_map.permute(0, 2, 3, 1).reshape(-1, classes)
        bins = distribution.permute(0, 2, 3, 1).reshape(-1, 4, REG_MAX + 1)
        at = (labels >= 0).nonzero().squeeze(1)
        image, cell = at // (height * width), at % (height * width)
        centre = (
            torch.stack([cell % width, cell // width], 1).double()
            + offset
            + ((stride - 1) / 2 / stride if legacy else 0)
        )
        target = gt[image, matched[at]] / stride
        grown = torch.tensor([0, 0, 1, 1]).double() * legacy
        decoded = gfl_ops.distance_to_box(centre, gfl_ops.integral(bins[at].reshape(-1, 68), REG_MAX))
        iou = 1 - gfl_ops.box_iou_loss(decoded.detach() + grown, target + grown, kind="iou", eps=1e-6, reduction="none")
        quality = torch.zeros(len(labels), dtype=iou.dtype).index_put((at,), iou)
        w = logits[at].detach().amax(1).sigmoid()
        cls = cls + gfl_ops.quality_focal_loss(logits, (labels, quality), weight=labels != -2, reduction="sum")
        box = box + gfl_ops.box_iou_loss(decoded + grown, target + grown, w, kind="giou", eps=1e-6, reduction="sum")
        distance = gfl_ops.box_to_distance(centre, target, REG_MAX, 0.1)
        each = gfl_ops.distribution_focal_loss(
            bins[at].reshape(-1, REG_MAX + 1), distance.reshape(-1), reduction="none"
        )
        dfl = dfl + (each.view(-1, 4).mean(1) * w).sum()
        weight = weight + w.sum()
    count = (assignment.labels >= 0).sum(1).clamp(min=1).sum()
    return [cls / count, 2 * box / weight.clamp(min=1), 0.25 * dfl / weight.clamp(min=1)]


@pytest.mark.skipif(not hasattr(gfl_ops, "distance_to_box"), reason="needs distance_to_box")
@pytest.mark.parametrize("legacy", [False, True], ids=["mmdet", "legacy"])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_it_is_the_sum_of_its_parts(backend: str, legacy: bool, offset: float, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator)
    leaves = [m.requires_grad_() for m in (*scores, *distributions)]
    want = composed(scores, distributions, assignment, gt, legacy, offset)
    got = gfl_ops.gfl_loss(scores, distributions, STRIDES, assignment, gt, center_offset=offset, legacy=legacy)
    torch.testing.assert_close(list(got[:3]), want, rtol=1e-10, atol=0)
    factors = [1.0, -0.5, 3.0]
    want_grads = torch.autograd.grad(sum(f * w for f, w in zip(factors, want)), leaves)
    grads = torch.autograd.grad(sum(f * g for f, g in zip(factors, got)), leaves)
    torch.testing.assert_close(grads, want_grads, rtol=1e-8, atol=1e-12)


def run(scores, distributions, assignment, gt, **options):
    leaves = [m.detach().requires_grad_() for m in (*scores, *distributions)]
    half = len(scores)
    losses = gfl_ops.gfl_loss(leaves[:half], leaves[half:], STRIDES, assignment, gt, **options)
    return losses, torch.autograd.grad(losses.cls + losses.box + losses.dfl, leaves)


@pytest.mark.parametrize("classes", [1, 20, 150])
def test_gradients_have_the_layout_of_the_maps(backend: str, classes: int, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, classes, torch.float32)
    want, want_grads = run(scores, distributions, assignment, gt)
    for layout in ("channels-last", "row-slices"):
        if layout == "channels-last":
            other = [
                [m.contiguous(memory_format=torch.channels_last) for m in maps] for maps in (scores, distributions)
            ]
        else:
            other = [[torch.cat([m, m], 3)[..., : m.shape[3]] for m in maps] for maps in (scores, distributions)]
        losses, grads = run(*other, assignment, gt)
        exact = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-5, "atol": 1e-6}
        for a, b in zip((*losses, *grads), (*want, *want_grads)):
            torch.testing.assert_close(a, b, **exact)
        if layout == "channels-last":
            for g, m in zip(grads, (*other[0], *other[1])):
                assert g.stride() == m.stride()


def test_maps_of_different_dtypes(backend: str, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)
    half = [m.bfloat16() for m in scores]
    want, _ = run([m.float() for m in half], distributions, assignment, gt)
    got, grads = run(half, distributions, assignment, gt)
    torch.testing.assert_close(list(got), list(want), rtol=1e-5, atol=0)
    assert got.cls.dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32] * 3
    mixed, grads = run([m.double() for m in half], distributions, assignment, gt)
    assert mixed.cls.dtype == torch.float64 and grads[-1].dtype == torch.float32
    torch.testing.assert_close(list(mixed), [v.double() for v in want], rtol=1e-5, atol=0)


def test_what_does_not_count_may_be_anything(backend: str, generator: torch.Generator) -> None:
    """NaN logits where the label is −2, and NaN distributions where there is no positive, reach nothing."""
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)
    want, want_grads = run(scores, distributions, assignment, gt)
    start = 0
    for score, distribution in zip(scores, distributions):
        cells = score[0, 0].numel()
        labels = assignment.labels[:, start : start + cells].view(-1, 1, *score.shape[2:])
        start += cells
        score.masked_fill_(labels == -2, float("nan"))
        distribution.masked_fill_(labels < 0, float("nan"))
    got, grads = run(scores, distributions, assignment, gt)
    torch.testing.assert_close(list(got), list(want), rtol=1e-6, atol=0)
    for g, w in zip(grads, want_grads):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_labels_and_slots_out_of_range_are_background(backend: str, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)
    background = Assignment(torch.where(assignment.labels == -2, -2, -1), assignment.matched, assignment.iou)
    want, _ = run(scores, distributions, background, gt)
    for labels, matched in (
        (torch.where(assignment.labels >= 0, 20, assignment.labels), assignment.matched),
        (torch.where(assignment.labels >= 0, 2**40, assignment.labels), assignment.matched),
        (assignment.labels, torch.where(assignment.labels >= 0, SLOTS, -1)),
        (assignment.labels, torch.where(assignment.labels >= 0, -1, -1)),
    ):
        got, _ = run(scores, distributions, Assignment(labels, matched, assignment.iou), gt)
        torch.testing.assert_close(list(got), list(want), rtol=0, atol=0)
        assert got.num_pos == 0 and got.box == 0 and got.dfl == 0


def test_without_boxes_it_stays_attached(backend: str, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)
    none = Assignment(torch.full_like(assignment.labels, -1), torch.full_like(assignment.matched, -1), assignment.iou)
    losses, grads = run(scores, distributions, none, gt[:, :0])
    assert losses.box.requires_grad and losses.dfl.requires_grad and losses.box == 0
    assert all(not g.any() for g in grads[3:]) and grads[0].any()
    assert not losses.num_pos.requires_grad and not losses.box_weight.requires_grad


def test_norms(backend: str, generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)
    losses, grads = run(scores, distributions, assignment, gt)
    norms = gfl_ops.head_loss_norms(scores, assignment)
    assert norms.shape == (2,) and norms.dtype == torch.float32 and not norms.requires_grad
    per_image = (assignment.labels >= 0).sum(1).clamp(min=1)
    assert norms[0] == per_image.sum() and losses.num_pos == (assignment.labels >= 0).sum()
    torch.testing.assert_close(norms[1], losses.box_weight, rtol=1e-6, atol=0)
    for cls_norm, box_norm in ((3.0, 0.5), (torch.tensor([3]), torch.tensor(0.5, dtype=torch.float64))):
        scaled, scaled_grads = run(scores, distributions, assignment, gt, cls_norm=cls_norm, box_norm=box_norm)
        torch.testing.assert_close(scaled.cls, losses.cls * norms[0] / 3, rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled.box, losses.box * norms[1].clamp(min=1) / 0.5, rtol=1e-5, atol=0)
        torch.testing.assert_close(scaled_grads[0], grads[0] * norms[0] / 3, rtol=1e-5, atol=1e-7)
    twice, _ = run(scores, distributions, assignment, gt, loss_weights=[2.0, 4.0, 0.5])
    torch.testing.assert_close(list(twice[:3]), [2 * v for v in losses[:3]], rtol=1e-6, atol=0)


PROTECTED = """
import ctypes, mmap, torch, gfl_ops
page, side, channels = mmap.PAGESIZE, 6, mmap.PAGESIZE // 4
memory = mmap.mmap(-1, page * side * side)
# A location's logits are a page of memory.
scores = torch.frombuffer(memory, dtype=torch.float32).view(1, side, side, channels).permute(0, 3, 1, 2)
labels = torch.full((1, side * side), -1)
labels[0, [3, 17, 30]] = torch.tensor([5, 0, channels - 1])
labels[0, 9] = -2
libc = ctypes.CDLL(None, use_errno=True)
for location in (labels[0] < 0).nonzero().flatten().tolist():
    assert libc.mprotect(ctypes.c_void_p(scores.data_ptr() + page * location), page, 0) == 0
assignment = gfl_ops.Assignment(labels, (labels >= 0).long() - 1, torch.zeros(1, side * side))
with gfl_ops.set_backend("native"):
    print(gfl_ops.head_loss_norms([scores], assignment).tolist())
"""


@pytest.mark.skipif(backends.unavailable("native", "head_loss_norms", "cpu") is not None, reason="no native kernel")
@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
def test_norms_read_logits_of_positives_alone(tmp_path: Path) -> None:
    """Reading any other location ends the process."""
    command = [sys.executable, "-c", PROTECTED]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0 and ran.stdout.strip() == "[3.0, 1.5]", ran.stderr


def test_the_whole_step_compiles_into_one_graph(generator: torch.Generator) -> None:
    scores, distributions, assignment, gt = drawn(generator, dtype=torch.float32)

    def step(scores, distributions, labels, matched, gt):
        losses = gfl_ops.gfl_loss(scores, distributions, STRIDES, (labels, matched), gt)
        return losses.cls + losses.box + losses.dfl

    def gradients(function):
        leaves = [m.detach().requires_grad_() for m in (*scores, *distributions)]
        loss = function(leaves[:3], leaves[3:], assignment.labels, assignment.matched, gt)
        return loss, *torch.autograd.grad(loss, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for g, w in zip(gradients(compiled), gradients(step)):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-8)
        assert g.stride() == w.stride()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cls_scores": torch.zeros(2, 3, 4, 4)}, TypeError, "`cls_scores` must be a list of tensors"),
        ({"cls_scores": []}, ValueError, "`cls_scores` must hold at least one level"),
        ({"cls_scores": [torch.zeros(2, 3, 4)]}, ValueError, r"`cls_scores` must have shape \[B, channels, H, W\]"),
        ({"cls_scores": [torch.zeros(2, 3, 4, 4).int()]}, TypeError, "`cls_scores` must have one of the dtypes"),
        (
            {"reg_preds": [torch.zeros(2, 67, 4, 4)]},
            ValueError,
            r"`reg_preds` must have shape \[B, 4\(R\+1\), H, W\] = \[2, 68,",
        ),
        ({"reg_preds": []}, ValueError, "`reg_preds` must hold at least one level"),
        ({"strides": [8, 16]}, ValueError, "`strides` must hold one number per level, 1, got 2"),
        ({"strides": 8}, TypeError, "`strides` must be a list or tuple of numbers"),
        ({"gt_boxes": torch.zeros(3, 2, 4)}, ValueError, r"`gt_boxes` must have shape \[B, G, 4\]"),
        ({"assignment": torch.zeros(2, 16).long()}, TypeError, "`assignment` must be what atss_assign returns"),
        ({"assignment": (torch.zeros(2, 15).long(),) * 2}, ValueError, r"`assignment.labels` must have shape \[B, A\]"),
        ({"assignment": (torch.zeros(2, 16),) * 2}, TypeError, "`assignment.labels` must have one of the dtypes"),
        ({"reg_max": 0}, ValueError, "`reg_max` must be >= 1"),
        ({"reg_max": 129}, ValueError, "`reg_max` must be <= 128"),
        ({"loss_weights": (1.0, 2.0)}, ValueError, "`loss_weights` must hold three numbers"),
        ({"beta": -1.0}, ValueError, "`beta` must be >= 0"),
        ({"cls_norm": torch.ones(2)}, ValueError, "`cls_norm` must hold one number"),
        ({"center_offset": [0.0, 0.5]}, ValueError, "`center_offset` must hold one number per level, 1"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    arguments = {
        "cls_scores": [torch.zeros(2, 3, 4, 4)],
        "reg_preds": [torch.zeros(2, 68, 4, 4)],
        "strides": [8],
        "assignment": (torch.zeros(2, 16).long(), torch.zeros(2, 16).long()),
        "gt_boxes": torch.zeros(2, 2, 4),
    }
    with pytest.raises(error, match="gfl_ops.gfl_loss: " + text):
        gfl_ops.gfl_loss(**(arguments | change))
