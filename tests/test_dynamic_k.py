# SPDX-License-Identifier: Apache-2.0
"""Assignment with a dynamic k against plain loops, and its backends against each other bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.registry import SPECS
from gfl_ops.ops.head.assign import draw_objects, draw_predictions
from gfl_ops.ops.head.dynamic_k_reference import grid_points, lane_sum
from gfl_ops.ops.head.elementary import exponential, logarithm, power_of_ten
from gfl_ops.ops.head.elementary import sigmoid as reference_sigmoid

CPU = torch.device("cpu")
NATIVE = backends.unavailable("native", "dynamic_k", "cpu") is None
BACKENDS = ["reference"] + (["native"] if NATIVE else [])
needs_native = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
SIZES, STRIDES, CLASSES = [(8, 12), (4, 6), (2, 3)], [8, 16, 32], 4
POINTS = grid_points([n for size in SIZES for n in size], STRIDES, [0.5] * 3, CPU)
VARIANTS = ["mmdet", "mmyolo", "nanodet", "simota"]


def scene(generator: torch.Generator, images: int, slots: int) -> dict[str, Any]:
    gt_boxes, gt_labels = draw_objects(images, slots, CLASSES, 96.0, CPU, generator)
    scores, boxes = draw_predictions(gt_boxes, POINTS[:, :2], CLASSES, torch.float32, generator)
    return {"scores": scores, "boxes": boxes, "gt_boxes": gt_boxes, "gt_labels": gt_labels}


def assign(given: dict[str, Any], variant: str = "mmdet", **options: Any) -> gfl_ops.Assignment:
    where = (
        {"level_sizes": SIZES, "strides": STRIDES}
        if "points" not in options
        else dict.fromkeys(("level_sizes", "strides"))
    )
    arguments = {"boxes": given["boxes"], "gt_boxes": given["gt_boxes"], "gt_labels": given["gt_labels"], **where}
    if variant == "simota":
        return gfl_ops.simota_assign(given["scores"], **arguments, **options)
    scores = given["scores"] if variant == "nanodet" else given["scores"] * 9 - 6
    return gfl_ops.dynamic_soft_label_assign(scores, **arguments, variant=variant, **options)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common, 1e-6)


def class_cost(variant: str, scores: list[float], label: int, overlap: float) -> float:
    total = 0.0
    for c, score in enumerate(scores):
        target = (1.0 if variant == "simota" else overlap) if c == label else 0.0
        if variant == "mmyolo" and c != label:
            continue
        logit = score * 9 - 6
        p = score if variant in ("nanodet", "simota") else sigmoid(logit)
        bce = -target * math.log(p) - (1 - target) * math.log(1 - p)
        total += bce if variant == "simota" else bce * (target - p) ** 2
    return total


def loops(given: dict[str, Any], image: int, variant: str, topk: int) -> tuple[list[int], list[float]]:
    """The frameworks' rules for one image, in Python's numbers: the slot of each location and its overlap."""
    slots = [g for g, label in enumerate(given["gt_labels"][image].tolist()) if label >= 0]
    points, radius = POINTS.tolist(), 2.5 if variant == "simota" else 3.0
    cost: dict[int, list[float]] = {}
    overlap: dict[int, list[float]] = {}
    candidate = [False] * len(points)
    for g in slots:
        x1, y1, x2, y2 = given["gt_boxes"][image, g].tolist()
        cost[g], overlap[g] = [], []
        for i, (x, y, stride, _) in enumerate(points):
            inside = x1 < x < x2 and y1 < y < y2
            dx, dy = abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)
            near = max(dx, dy) < radius * stride
            candidate[i] |= inside or (variant == "simota" and near)
            overlap[g].append(iou([x1, y1, x2, y2], given["boxes"][image, i].tolist()))
            scores = given["scores"][image, i].tolist()
            value = class_cost(variant, scores, int(given["gt_labels"][image, g]), overlap[g][i])
            value -= 3 * math.log(overlap[g][i] + 1e-7)
            if variant == "simota":
                value += 0 if inside and near else 1e5
            elif variant != "nanodet":
                value += 10 ** (math.hypot(dx, dy) / stride - 3)
            cost[g].append(value)
    places = [i for i, there in enumerate(candidate) if there or variant == "mmyolo"]
    for g in slots:
        cost[g] = [c if there else 1e8 for c, there in zip(cost[g], candidate)]
    wanting: dict[int, list[int]] = {}
    for g in slots:
        largest = sorted((overlap[g][i] for i in places), reverse=True)[:topk]
        for i in sorted(places, key=lambda i, g=g: (cost[g][i], i))[: max(int(sum(largest)), 1)]:  # type: ignore[misc]
            wanting.setdefault(i, []).append(g)
    matched, reached = [-1] * len(points), [0.0] * len(points)
    for i, found in wanting.items():
        matched[i] = found[0] if len(found) == 1 else min(slots, key=lambda g, i=i: (cost[g][i], g))  # type: ignore[misc]
        reached[i] = overlap[matched[i]][i]
    return matched, reached


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("topk", [13, 2])
def test_it_is_the_definition(backend: str, variant: str, topk: int, generator: torch.Generator) -> None:
    given = scene(generator, 2, 14)
    option = {"candidate_topk" if variant == "simota" else "topk": topk}
    with gfl_ops.set_backend(backend):
        got = assign(given, variant, **option)
    for image in range(2):
        matched, reached = loops(given, image, variant, topk)
        labels = [int(given["gt_labels"][image, g]) if g >= 0 else -1 for g in matched]
        assert got.matched[image].tolist() == matched and got.labels[image].tolist() == labels
        torch.testing.assert_close(got.iou[image], torch.tensor(reached), rtol=1e-5, atol=1e-6)
    assert (got.labels >= 0).sum() > 3


@needs_native
def test_native_is_the_reference_bit_for_bit(seed: int) -> None:
    """Over the registry's samples of every dtype."""
    spec = SPECS["dynamic_k"]
    for dtype in spec.dtypes:
        for sample in spec.samples(CPU, dtype, torch.Generator().manual_seed(seed)):
            got, want = torch.ops.gfl.dynamic_k(*sample.args), spec.reference(*sample.args)
            for g, w, part in zip(got, want, ("labels", "matched", "iou")):
                assert torch.equal(g, w), f"{sample.id}: {part} differ at {int((g != w).sum())} locations"


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_points_of_a_grid_are_the_grid(variant: str, generator: torch.Generator) -> None:
    given = scene(generator, 2, 30)
    want = assign(given, variant)
    order = torch.randperm(len(POINTS), generator=generator)
    mixed = {**given, "scores": given["scores"][:, order], "boxes": given["boxes"][:, order]}
    got, other = assign(given, variant, points=POINTS), assign(mixed, variant, points=POINTS[order])
    for w, g, o in zip(want, got, other):
        assert torch.equal(g, w)
        if variant != "simota":  # whose costs are rounded to 1/128 where a box lacks candidates, and tie
            assert torch.equal(o, w[:, order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_box_without_locations(backend: str, variant: str, generator: torch.Generator) -> None:
    """It selects among those in other boxes; alone it gets none, or mmyolo's lowest."""
    given = scene(generator, 1, 2)
    given["gt_boxes"] = torch.tensor([[[9.0, 9, 11, 11], [20, 20, 60, 60]]])
    given["gt_labels"] = torch.tensor([[1, 2]])
    # A location of the second box predicts the first.
    inside = ((POINTS[:, :2] > 20) & (POINTS[:, :2] < 60)).all(-1).nonzero()[0, 0]
    given["boxes"][0, inside], given["scores"][0, inside] = given["gt_boxes"][0, 0], torch.tensor([0.1, 0.9, 0.1, 0.1])
    alone = {**given, "gt_labels": torch.tensor([[1, -1]])}
    with gfl_ops.set_backend(backend):
        got, none = assign(given, variant), assign(alone, variant)
    if variant != "simota":  # for which locations near the centre of the first one are candidates
        assert got.matched[0, inside] == 0 and got.iou[0, inside] == 1
        assert (none.matched >= 0).nonzero().tolist() == ([[0, 0]] if variant == "mmyolo" else [])
    assert (got.matched == 0).any() and (got.matched == 1).any()


def test_functions() -> None:
    ulp = torch.finfo(torch.float32).eps
    x = torch.linspace(-86, 0, 20001)
    torch.testing.assert_close(exponential(x).double(), x.double().exp(), rtol=2 * ulp, atol=0)
    x = torch.cat([torch.linspace(-86, 86, 20001), torch.tensor([-1e4, 1e4, -math.inf, math.inf, math.nan])])
    want = x.double().sigmoid().where(x != -1e4, 0.0)
    torch.testing.assert_close(reference_sigmoid(x).double(), want, rtol=3 * ulp, atol=0, equal_nan=True)
    x = torch.linspace(-36.9, 37.9, 20001)
    torch.testing.assert_close(power_of_ten(x).double(), 10 ** x.double(), rtol=4 * ulp, atol=0)
    x = torch.logspace(-37, 1, 20001)
    torch.testing.assert_close(logarithm(x).double(), x.double().log(), rtol=2 * ulp, atol=0)
    x = torch.rand(7, 37, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lane_sum(x), x.sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_labels_go_into_the_loss(backend: str, generator: torch.Generator) -> None:
    """`labels` and `iou` are what `quality_focal_loss` takes."""
    given = scene(generator, 2, 9)
    logits = (given["scores"] * 9 - 6).requires_grad_()
    with gfl_ops.set_backend(backend):
        found = assign(given)
        target = found.labels.flatten(), found.iou.flatten()
        loss = gfl_ops.quality_focal_loss(logits.flatten(0, 1), target, reduction="sum")
        loss.backward()
    dense = torch.zeros_like(logits)
    positive = found.labels >= 0
    dense[positive, found.labels[positive]] = found.iou[positive]
    p = logits.detach().sigmoid()
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits.detach(), dense, reduction="none")
    torch.testing.assert_close(loss.detach(), (want * (dense - p) ** 2).sum())
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
