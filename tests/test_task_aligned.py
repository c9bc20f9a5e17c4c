# SPDX-License-Identifier: Apache-2.0
"""Task-aligned assignment against plain loops, and its backends against each other bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.core.random_inputs import boxes as draw_boxes
from gfl_ops.core.registry import SPECS
from gfl_ops.ops.head.task_aligned_reference import arc_tangent, locations, power

CPU = torch.device("cpu")
NATIVE = backends.unavailable("native", "task_aligned", "cpu") is None
BACKENDS = ["reference"] + (["native"] if NATIVE else [])
SIZES, STRIDES, CLASSES = [(8, 12), (4, 6), (2, 3)], [8, 16, 32], 4
FLAT = [n for size in SIZES for n in size]
POINTS = locations(FLAT, STRIDES, [0.5] * 3, CPU)


def scene(generator: torch.Generator, images: int, slots: int) -> dict[str, Any]:
    """Boxes, and predictions near them where they contain the location."""
    gt = draw_boxes(images * slots, CPU, torch.float32, generator, extent=96.0).reshape(images, slots, 4)
    chosen = torch.randint(0, slots, (images, len(POINTS)), generator=generator)
    near = gt.gather(1, chosen[..., None].expand(-1, -1, 4))
    inside = ((near[..., :2] < POINTS) & (near[..., 2:] > POINTS)).all(-1, keepdim=True)
    wild = POINTS.repeat(1, 2) + torch.tensor([-12.0, -12, 12, 12])
    noise = torch.randn(images, len(POINTS), 4, generator=generator) * 3
    return {
        "scores": torch.rand(images, len(POINTS), CLASSES, generator=generator),
        "boxes": torch.where(inside, near, wild) + noise,
        "gt_boxes": gt,
        "gt_labels": torch.randint(-1, CLASSES, (images, slots), generator=generator),
    }


def assign(given: dict[str, Any], **options: Any) -> gfl_ops.TaskAlignedAssignment:
    return gfl_ops.task_aligned_assign(
        given["scores"], given["boxes"], SIZES, STRIDES, given["gt_boxes"], given["gt_labels"], **options
    )


def complete_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    iou = common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
    outer = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    apart = (a[0] + a[2] - b[0] - b[2]) ** 2 / 4 + (a[1] + a[3] - b[1] - b[3]) ** 2 / 4
    turn = math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))
    v = 4 / math.pi**2 * turn**2
    return max(iou - apart / outer - (v * v / (1 - iou + v) if v else 0), 0.0)


def loops(given: dict[str, Any], image: int, topk: int, topk2: int, min_side: float) -> tuple[Tensor, Tensor, Tensor]:
    """ultralytics' rules for one image, in Python's numbers."""
    points, count = POINTS.tolist(), len(POINTS)
    slots = [g for g, label in enumerate(given["gt_labels"][image].tolist()) if label >= 0]
    overlap = {g: [0.0] * count for g in slots}
    metric = {g: [0.0] * count for g in slots}
    chosen: dict[int, list[int]] = {}
    for g in slots:
        box, label = given["gt_boxes"][image, g].tolist(), int(given["gt_labels"][image, g])
        middle = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        half = [max(box[2] - box[0], min_side) / 2, max(box[3] - box[1], min_side) / 2]
        inside = [all(abs(p[i] - middle[i]) < half[i] for i in (0, 1)) for p in points]
        for i in range(count):
            if inside[i]:
                overlap[g][i] = complete_iou(box, given["boxes"][image, i].tolist())
                metric[g][i] = given["scores"][image, i, label].item() ** 0.5 * overlap[g][i] ** 6
        order = sorted(range(count), key=lambda i, g=g: (-metric[g][i], i))  # type: ignore[misc]
        chosen[g] = [i for i in order[:topk] if inside[i]]
    owner: dict[int, int] = {}
    for i in range(count):
        wanting = [g for g in slots if i in chosen[g]]
        if wanting:
            owner[i] = wanting[0] if len(wanting) == 1 else max(slots, key=lambda g, i=i: (overlap[g][i], -g))  # type: ignore[misc]
    if topk2 != topk:
        for g in slots:
            own = {i: metric[g][i] for i, o in owner.items() if o == g}
            order = sorted(range(count), key=lambda i, own=own: (-own.get(i, 0.0), i))  # type: ignore[misc]
            for i in own.keys() - set(order[:topk2]):
                del owner[i]
    labels, matched, scores = torch.full((count,), -1), torch.full((count,), -1), torch.zeros(count)
    for i, g in owner.items():
        mine = [j for j, o in owner.items() if o == g]
        best = max(metric[g][j] for j in mine) + 1e-9
        labels[i], matched[i] = given["gt_labels"][image, g], g
        scores[i] = metric[g][i] * max(overlap[g][j] for j in mine) / best
    return labels, matched, scores


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("topk", "topk2"), [(10, 10), (7, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("min_side", [0.0, 16.0])
def test_it_is_the_definition(backend: str, topk: int, topk2: int, min_side: float, generator: torch.Generator) -> None:
    given = scene(generator, 2, 14)
    with gfl_ops.set_backend(backend):
        got = assign(given, topk=topk, topk2=topk2, min_side=min_side)
    for image in range(2):
        labels, matched, scores = loops(given, image, topk, topk2, min_side)
        assert torch.equal(got.labels[image], labels) and torch.equal(got.matched[image], matched)
        # Rounding of a sixth power.
        torch.testing.assert_close(got.scores[image], scores, rtol=2e-5, atol=1e-7)
    assert (got.labels >= 0).sum() > 3


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
def test_native_is_the_reference_bit_for_bit(seed: int) -> None:
    """Over the registry's samples of every dtype; where an exponent has no exact power, up to an ulp."""
    spec = SPECS["task_aligned"]
    for dtype in spec.dtypes:
        for sample in spec.samples(CPU, dtype, torch.Generator().manual_seed(seed)):
            got, want = torch.ops.gfl.task_aligned(*sample.args), spec.reference(*sample.args)
            for g, w, part in zip(got, want, ("labels", "matched", "alignment")):
                if sample.id == "powers" and part == "alignment":
                    torch.testing.assert_close(g, w, rtol=1e-6, atol=0)
                else:
                    assert torch.equal(g, w), f"{sample.id}: {part} differ at {int((g != w).sum())} locations"


@pytest.mark.skipif(not NATIVE, reason="the extension is not built")
def test_points_of_a_grid_are_the_grid(generator: torch.Generator) -> None:
    given = scene(generator, 2, 30)
    want = assign(given)
    order = torch.randperm(len(POINTS), generator=generator)
    common = (given["gt_boxes"], given["gt_labels"])
    got = gfl_ops.task_aligned_assign(given["scores"], given["boxes"], None, STRIDES, *common, points=POINTS)
    mixed = gfl_ops.task_aligned_assign(
        given["scores"][:, order], given["boxes"][:, order], None, STRIDES, *common, points=POINTS[order]
    )
    for w, g, m in zip(want, got, mixed):
        assert torch.equal(g, w)
        # The lowest locations, which fill up what lacks a metric, are others.
        counts = want.scores[:, order] > 0
        assert torch.equal(m[counts], w[:, order][counts])


def test_arc_tangent_and_power() -> None:
    x = torch.cat([torch.logspace(-12, 12, 20001), torch.tensor([0.0, float("inf")])])
    want = x.double().atan()
    ulp = torch.nextafter(want.float(), torch.tensor(float("inf"))).double() - want.float().double()
    for sign in (1, -1):
        assert ((arc_tangent(sign * x).double() - sign * want).abs() <= 2.8 * ulp).all()
    x = torch.linspace(0, 1, 101)
    for exponent in (0.0, 0.5, 1.0, 1.5, 6.0, 2.3):
        torch.testing.assert_close(power(x, exponent).double(), x.double() ** exponent, rtol=1e-6, atol=0)
