# SPDX-License-Identifier: Apache-2.0
"""What the assigners that read predictions share: input that is none, dtypes and layouts, many objects, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl_ops.core import backends
from gfl_ops.ops.head.assign import draw_objects, draw_predictions
from gfl_ops.ops.head.dynamic_k_reference import grid_points

CPU = torch.device("cpu")
NATIVE = backends.unavailable("native", "task_aligned", "cpu") is None
BACKENDS = ["reference"] + (["native"] if NATIVE else [])
needs_native = pytest.mark.skipif(not NATIVE, reason="the extension is not built")
SIZES, STRIDES, CLASSES = [(8, 12), (4, 6), (2, 3)], [8, 16, 32], 4
POINTS = grid_points([n for size in SIZES for n in size], STRIDES, [0.5] * 3, CPU)
Call = Callable[..., tuple[Tensor, ...]]


def soft(variant: str) -> Call:
    def call(scores: Tensor, *others: Any, **options: Any) -> tuple[Tensor, ...]:
        given = scores if variant == "nanodet" else scores * 9 - 6
        return gfl_ops.dynamic_soft_label_assign(given, *others, variant=variant, **options)

    return call


# Of probabilities, predicted boxes, grids and objects: labels, slots and a value of each location.
ASSIGNERS: dict[str, Call] = {
    "task_aligned": gfl_ops.task_aligned_assign,
    "task_aligned-yolov6": lambda *given, **options: gfl_ops.task_aligned_assign(*given, variant="yolov6", **options),
    "task_aligned-mmdet": lambda *given, **options: gfl_ops.task_aligned_assign(*given, variant="mmdet", **options),
    **{f"soft_labels-{variant}": soft(variant) for variant in ("mmdet", "mmyolo", "nanodet")},
    "simota": gfl_ops.simota_assign,
}
every_assigner = pytest.mark.parametrize("name", ASSIGNERS)


def scene(generator: torch.Generator, images: int, slots: int) -> dict[str, Tensor]:
    gt_boxes, gt_labels = draw_objects(images, slots, CLASSES, 96.0, CPU, generator)
    scores, boxes = draw_predictions(gt_boxes, POINTS[:, :2], CLASSES, torch.float32, generator)
    return {"scores": scores, "boxes": boxes, "gt_boxes": gt_boxes, "gt_labels": gt_labels}


def assign(name: str, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    objects = given["gt_boxes"], given["gt_labels"]
    return ASSIGNERS[name](given["scores"], given["boxes"], SIZES, STRIDES, *objects)


@pytest.mark.parametrize("backend", BACKENDS)
@every_assigner
def test_what_counts_as_no_box(name: str, backend: str, generator: torch.Generator) -> None:
    """Padding, unknown classes, NaN and infinity; wherever they stand, the others are assigned as without them."""
    given = scene(generator, 1, 9)
    given["gt_labels"] = torch.tensor([[-1, 0, 1, CLASSES, 2, 3, 0, 1, -9]])
    given["gt_boxes"][0, 5, 1], given["gt_boxes"][0, 7, 2] = float("nan"), float("inf")
    given["gt_boxes"][0, 1] = torch.tensor([10.0, 10, 70, 60])
    kept = torch.tensor([1, 2, 4, 6])
    less = {**given, "gt_boxes": given["gt_boxes"][:, kept], "gt_labels": given["gt_labels"][:, kept]}
    with gfl_ops.set_backend(backend):
        got, want = assign(name, given), assign(name, less)
    assert torch.equal(got[0], want[0]) and torch.equal(got[2], want[2])
    assert torch.equal(got[1], torch.where(want[1] >= 0, kept[want[1].clamp(min=0)], -1))
    assert (want[0] >= 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["no-slot", "padded", "beyond", "nan", "no-location", "no-image"])
@every_assigner
def test_nothing_to_assign(name: str, what: str, backend: str, generator: torch.Generator) -> None:
    given = scene(generator, 2, 9)
    sizes = SIZES
    if what in ("no-slot", "no-image"):
        parts = ("gt_boxes", "gt_labels") if what == "no-slot" else given
        given |= {part: given[part][:, :0] if what == "no-slot" else given[part][:0] for part in parts}
    elif what == "no-location":
        given |= {part: given[part][:, :0] for part in ("scores", "boxes")}
        sizes = [(0, 12), (4, 0), (0, 0)]
    elif what == "nan":
        given["gt_boxes"] = given["gt_boxes"] * float("nan")
    else:
        given["gt_labels"] = torch.full((2, 9), {"padded": -1, "beyond": CLASSES}[what])
    objects = given["gt_boxes"], given["gt_labels"]
    with gfl_ops.set_backend(backend):
        found = ASSIGNERS[name](given["scores"], given["boxes"], sizes, STRIDES, *objects)
    assert all(part.shape == given["scores"].shape[:2] for part in found)
    assert (found[0] == -1).all() and (found[1] == -1).all() and (found[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@every_assigner
def test_degenerate_boxes_and_predictions(name: str, backend: str, generator: torch.Generator) -> None:
    """Boxes without an extent or turned around, and predictions that are no numbers, disturb no other image."""
    given = scene(generator, 2, 6)
    given["gt_labels"] = given["gt_labels"].clamp(min=0)
    given["gt_boxes"][0, 0, 2:] = given["gt_boxes"][0, 0, :2]
    given["gt_boxes"][0, 1] = given["gt_boxes"][0, 1].flip(0)
    given["gt_boxes"][0, 2] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    given["scores"][0, ::7], given["boxes"][0, ::5, 1] = float("nan"), float("nan")
    given["boxes"][0, ::11, 2] = float("inf")
    alone = {part: value[1:] for part, value in given.items()}
    with gfl_ops.set_backend(backend):
        got, want = assign(name, given), assign(name, alone)
    for part, other in zip(got, want):
        assert torch.equal(part[1:], other)
    assert torch.isfinite(got[2]).all() and ((got[0] >= 0) == (got[1] >= 0)).all() and int(got[1].max()) < 6


@pytest.mark.parametrize("backend", BACKENDS)
@every_assigner
def test_every_dtype_and_layout(name: str, backend: str, generator: torch.Generator) -> None:
    given = scene(generator, 2, 9)
    given["scores"] = given["scores"].half().float()  # exact in every dtype but bf16
    exact = "nanodet" in name or not name.startswith("soft")  # the others' logits are rounded in fp16
    with gfl_ops.set_backend(backend):
        want = assign(name, given)
        for dtype in (torch.float16, torch.float64) if exact else (torch.float32,):
            planes = given["scores"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
            wide = given["boxes"].double() if dtype == torch.float64 else given["boxes"]
            got = assign(name, {**given, "scores": planes, "boxes": wide, "gt_labels": given["gt_labels"].int()})
            assert all(torch.equal(g, w) for g, w in zip(got, want))
        strided = torch.empty(2, len(POINTS), 2 * CLASSES)[..., ::2].copy_(given["scores"])
        assert all(torch.equal(g, w) for g, w in zip(assign(name, {**given, "scores": strided}), want))
        assert not assign(name, {**given, "scores": given["scores"].requires_grad_()})[2].requires_grad


@needs_native
@pytest.mark.parametrize("name", ["task_aligned", "soft_labels-mmdet", "simota"])
def test_many_objects(name: str, generator: torch.Generator) -> None:
    """65 536 in an image; a matrix with the locations would have 8 million entries."""
    given = scene(generator, 1, 65536)
    got = assign(name, given)
    with gfl_ops.set_backend("reference"):
        want = assign(name, given)
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


MEMORY = """
import resource, sys, torch, gfl_ops
sizes, strides, slots, images = [(80, 80), (40, 40), (20, 20)], [8, 16, 32], 4096, 4
generator = torch.Generator().manual_seed(0)
centre = torch.rand(images, slots, 2, generator=generator) * 640
gt = torch.cat([centre - 12, centre + 12], -1)
labels = torch.zeros(images, slots, dtype=torch.long)
scores = torch.rand(images, 8400, 3, generator=generator)
boxes = torch.rand(images, 8400, 4, generator=generator) * 24
call = lambda g: getattr(gfl_ops, sys.argv[1])(scores, boxes, sizes, strides, gt[:, :g], labels[:, :g])
call(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = call(slots)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@needs_native
@pytest.mark.parametrize("function", ["task_aligned_assign", "dynamic_soft_label_assign", "simota_assign"])
def test_memory_does_not_grow_with_pairs(function: str, tmp_path: Path) -> None:
    """4096 boxes times 8400 locations would be 131 MB an image, in fp32."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, function], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert int(done.stdout) < 20_000, f"{done.stdout} KB more"


BAD = [
    ({"scores": torch.zeros(2, 3)}, ValueError, r"`{scores}` must have shape \[B, A, C\]"),
    ({"scores": torch.zeros(1, 126, 4).long()}, TypeError, "`{scores}` must have one of the dtypes"),
    ({"boxes": torch.zeros(1, 125, 4)}, ValueError, r"`boxes` must have shape \[B, A, 4\] = \[1, 126, 4\]"),
    ({"level_sizes": [(8, 12)]}, ValueError, "`strides` must hold one number per level, 1"),
    ({"level_sizes": [(8, 12), (4, 6), (2, 4)]}, ValueError, "`level_sizes` must have the A = 126 cells of `{scores}`"),
    ({"level_sizes": None}, TypeError, "`level_sizes` must be a list"),
    ({"gt_boxes": torch.zeros(2, 2, 4)}, ValueError, r"`gt_boxes` must have shape \[B, G, 4\]"),
    ({"gt_labels": torch.zeros(1, 3).long()}, ValueError, r"`gt_labels` must have shape \[B, G\] = \[1, 2\]"),
    ({"gt_labels": torch.zeros(1, 2)}, TypeError, "`gt_labels` must have one of the dtypes int64"),
    ({"points": torch.zeros(125, 2)}, ValueError, r"`points` must have shape \[A, [24]\] = \[126, [24]\]"),
]
TASK_ALIGNED = [
    ({"topk": 0}, ValueError, "`topk` must be >= 1"),
    ({"topk2": 0}, ValueError, "`topk2` must be >= 1"),
    ({"alpha": -1}, ValueError, "`alpha` must be >= 0"),
    ({"beta": 0}, ValueError, "`beta` must be > 0"),
    ({"min_side": -1.0}, ValueError, "`min_side` must be >= 0"),
    ({"variant": "tood"}, ValueError, "`variant` must be one of 'ultralytics', 'yolov6', 'mmdet'"),
    ({"overlap": "giou"}, ValueError, "`overlap` must be one of 'ciou', 'iou'"),
]
SOFT = [
    ({"topk": 0}, ValueError, "`topk` must be >= 1"),
    ({"iou_weight": -1}, ValueError, "`iou_weight` must be >= 0"),
    ({"soft_center_radius": -1.0}, ValueError, "`soft_center_radius` must be >= 0"),
    ({"variant": "yolox"}, ValueError, "`variant` must be one of 'mmdet', 'mmyolo', 'nanodet'"),
]
SIMOTA = [
    ({"candidate_topk": -1}, ValueError, "`candidate_topk` must be >= 1"),
    *(({n: -1}, ValueError, f"`{n}` must be >= 0") for n in ("center_radius", "iou_weight", "cls_weight")),
]
EVERY_BAD = [
    (function, *case)
    for function, own in (
        ("task_aligned_assign", TASK_ALIGNED),
        ("dynamic_soft_label_assign", SOFT),
        ("simota_assign", SIMOTA),
    )
    for case in [*BAD, *own]
]


@pytest.mark.parametrize(
    ("function", "change", "error", "text"), EVERY_BAD, ids=lambda v: "-".join(v) if isinstance(v, dict) else None
)
def test_bad_input(function: str, change: dict[str, Any], error: type[Exception], text: str) -> None:
    scores = "logits" if function == "dynamic_soft_label_assign" else "scores"
    arguments = {
        "scores": torch.zeros(1, 126, 4),
        "boxes": torch.zeros(1, 126, 4),
        "level_sizes": SIZES,
        "strides": STRIDES,
        "gt_boxes": torch.zeros(1, 2, 4),
        "gt_labels": torch.zeros(1, 2).long(),
        **change,
    }
    arguments[scores] = arguments.pop("scores")
    with pytest.raises(error, match=f"gfl_ops.{function}: " + text.replace("{scores}", scores)):
        getattr(gfl_ops, function)(**arguments)


@every_assigner
def test_a_label_that_is_no_class_is_refused_where_checks_may_wait(
    name: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr("gfl_ops.core.checks.SYNCHRONISING", True)
    given = {**scene(generator, 1, 2), "gt_labels": torch.tensor([[-1, 5]])}
    with pytest.raises(ValueError, match="`gt_labels` must be below C = 4, got 5"):
        assign(name, given)
