# SPDX-License-Identifier: Apache-2.0
"""Hold what YOLO and RTMDet heads train with to its goals: the assigners and the
whole loss against ultralytics' and mmdet's own, in one interleaved run.

  goal                 inputs
  task-aligned N       ultralytics' assigner: 16 images at 640, 80 classes, N
                       objects in each
  xView                128 images at 640, 60 classes, up to 4 967 small objects in
                       each; nobody else can do it at once
  RTMDet's             mmdet's assigner: 16 images at 640, 100 objects in each
  v8 loss              16 images, YOLOv8-n's head, 20 objects in each, forward and
                       backward, patched and not; `compiled` is what torch.compile
                       makes of it, which breaks the graph where the assigner
                       picks positives, `assigner compiled` and `arithmetic
                       compiled` what it makes of a part alone
  YOLOv8-n             a training step and the loss in it, without the optimizer,
                       patched and not
  curve                our task-aligned assigner as objects grow: 10 to 1 000, and
                       the nanoseconds per candidate, a location inside a box

Times are those of one thread; of the step, and of xView, of as many as --threads
has. Memory is what the resident set grows by at its peak, results included. Every
provider is checked before it is timed: assignments against the reference in two
images, losses and gradients against the reference in fp64. Exits with 1 where one of this package's
providers is wrong or fails; a missed goal is reported and is no error.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import gfl_ops
import goals
import report
from cases.head import moved
from clock import Budget, Machine, peak_resident
from gfl_ops.ops.head.assign import draw_predictions
from gfl_ops.ops.head.dynamic_k_reference import grid_points
from goals import Reached
from harness import Bench, Case, Result

from . import peers

SIZE, STRIDES, CLASSES = 640, [8, 16, 32], 80
SIZES = [(SIZE // s, SIZE // s) for s in STRIDES]
FLAT = [n for size in SIZES for n in size]
# What the issue of dense matrices reports of xView's images and of its fullest one.
XVIEW_IMAGES, XVIEW_CLASSES, XVIEW_MOST = 128, 60, 4967
CHECKED = 2  # images that an assignment is compared in
IMAGES = 16
# objects per image -> how many times as fast as ultralytics
ASSIGNERS = {20: 40.0, 100: 80.0, 300: 120.0}
MEMORY_SHARE = 2.0  # per cent
STEP_IMAGES = 4


def configure(parser: argparse.ArgumentParser) -> None:
    goals.configure(parser)
    parser.set_defaults(device="cpu", threads=2, seconds=6.0, limit=900.0)


def ultralytics() -> bool:
    """Whether it is installed; it accesses the network at import and prints otherwise."""
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    return importlib.util.find_spec("ultralytics") is not None


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- assigners -----------------------------------------------------------------------------------------------------


def points() -> Tensor:
    """x, y and twice the stride of every location."""
    return grid_points(FLAT, [float(s) for s in STRIDES], [0.5] * 3, torch.device("cpu"))


def predicted(gt_boxes: Tensor, gt_labels: Tensor, classes: int, seed: int) -> dict[str, Tensor]:
    """Scores as a head in training has them, most of them small, and boxes near those that contain the location."""
    generator = torch.Generator().manual_seed(seed + 1)
    scores, boxes = draw_predictions(gt_boxes, points()[:, :2], classes, torch.float32, generator)
    return {"scores": scores**3, "boxes": boxes, "gt_boxes": gt_boxes, "gt_labels": gt_labels}


def small_objects(seed: int) -> tuple[Tensor, Tensor]:
    """With xView's statistics: a few hundred objects in most images, thousands in some, half of them below 8 pixels."""
    g = torch.Generator().manual_seed(seed)
    counts = (torch.randn(XVIEW_IMAGES, generator=g) * 1.4 + 5.5).exp().clamp(1, XVIEW_MOST).long()
    counts[0] = XVIEW_MOST
    centre = torch.rand(XVIEW_IMAGES, XVIEW_MOST, 2, generator=g) * SIZE
    side = (torch.randn(XVIEW_IMAGES, XVIEW_MOST, 2, generator=g) * 0.6 + math.log(8)).exp()
    labels = torch.randint(0, XVIEW_CLASSES, (XVIEW_IMAGES, XVIEW_MOST), generator=g)
    labels[torch.arange(XVIEW_MOST) >= counts[:, None]] = -1
    return torch.cat([centre - side / 2, centre + side / 2], -1).clamp(0, SIZE), labels


def assignment(name: str, inputs: dict[str, Tensor], ours: Callable[..., Any], peer: dict[str, Any]) -> Case:
    """`ours` takes predictions, grids and objects; it is checked against the reference in a few images."""
    grids = SIZES, STRIDES
    count = int((inputs["gt_labels"] >= 0).sum())

    def call(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return ours(scores, boxes, *grids, gt_boxes, gt_labels)

    def oracle(**given: Tensor) -> Any:
        return call(**{name: value[-CHECKED:] for name, value in given.items()})

    def agree(got: Any, want: Any) -> float:
        return moved([part[-CHECKED:] for part in compact(got)], want)

    what = f"{len(inputs['scores'])} images, {count} objects"
    stem = "task_aligned" if ours is gfl_ops.task_aligned_assign else "dynamic_k"
    return Case(stem, name, what, inputs, call, peer, agree=agree, oracle=oracle)


def compact(found: Any) -> list[Tensor]:
    """Labels, slots and scores of what an assigner gives: ours, ultralytics' five tensors or mmdet's image by image."""
    if isinstance(found, list):
        matched = torch.stack([image.gt_inds - 1 for image in found])
        overlap = torch.stack([image.max_overlaps for image in found])
        return [matched, matched, torch.where(matched >= 0, overlap, 0.0)]
    if len(found) == 3:
        return list(found)
    labels, _boxes, scores, positive, matched = found
    return [torch.where(positive, labels, -1), torch.where(positive, matched, -1), scores.amax(-1)]


def their_task_aligned() -> Callable[..., Any] | None:
    if not ultralytics():
        return None
    from ultralytics.utils.tal import TaskAlignedAssigner

    module = TaskAlignedAssigner(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0, stride=STRIDES)
    at = points()[:, :2].contiguous()

    def call(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        mask = (gt_labels >= 0)[..., None].float()
        return module(scores, boxes, at, gt_labels[..., None].float().clamp(min=0), gt_boxes, mask)

    return call


def their_soft_labels() -> Callable[..., Any] | None:
    if importlib.util.find_spec("mmdet") is None:
        return None
    from peer_detectors import import_mmdet

    import_mmdet()
    from mmdet.models.task_modules.assigners import DynamicSoftLabelAssigner
    from mmengine.structures import InstanceData

    module, priors = DynamicSoftLabelAssigner(topk=13), points()

    def call(scores: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return [
            module.assign(InstanceData(priors=priors, bboxes=b, scores=s), InstanceData(bboxes=gt, labels=labels))
            for s, b, gt, labels in zip(scores, boxes, gt_boxes, gt_labels)
        ]

    return call


def task_aligned(objects: int, seed: int, theirs: Callable[..., Any] | None) -> Case:
    inputs = predicted(*goals.crowd(IMAGES, objects, (SIZE, SIZE), seed), CLASSES, seed)
    return assignment(f"task-aligned {objects}", inputs, gfl_ops.task_aligned_assign, {"ultralytics": theirs})


def soft_labels(seed: int) -> Case:
    inputs = predicted(*goals.crowd(IMAGES, 100, (SIZE, SIZE), seed), CLASSES, seed)
    inputs["scores"] = inputs["scores"] * 8 - 6
    return assignment("RTMDet's 100", inputs, gfl_ops.dynamic_soft_label_assign, {"mmdet": their_soft_labels()})


def timed(bench: Bench, case: Case, only: tuple[str, ...]) -> list[Result]:
    """Check, time and print; the memory is that of the whole process."""
    found = bench.run(case, "fp32", len(case.inputs["scores"]), (*only, "native"))
    for result in found:
        if result.total is not None:
            call = case.ours if result.provider == "native" else case.peers[result.provider]
            assert call is not None
            result.memory = peak_resident(partial(call, **case.inputs))
    print("\n" + report.block(found), flush=True)
    return found


def judged(case: Case, found: list[Result], provider: str, want: float) -> Iterator[Reached]:
    """How many times as fast as `provider`, and the share of its memory."""
    by = {r.provider: r for r in found}
    ours, theirs = by["native"], by[provider]
    time, other = goals.milliseconds(ours)[0], goals.milliseconds(theirs)[0]
    yield Reached(case.name, provider, want, other / time if time and other else None, time, other, theirs.reason)
    memory = None if not theirs.memory or ours.memory is None else 100 * ours.memory / theirs.memory
    yield Reached(f"{case.name}, memory", "", MEMORY_SHARE, memory, why=theirs.reason, unit="%")


def assigners(given: argparse.Namespace, bench: Bench) -> tuple[list[Result], list[Reached]]:
    results: list[Result] = []
    lines: list[Reached] = []
    theirs = their_task_aligned()
    for objects, want in ASSIGNERS.items():
        if goals.wanted(given, f"task-aligned {objects}"):
            case = task_aligned(objects, given.seed, theirs)
            with threads(1):
                found = timed(bench, case, ("ultralytics",))
            results += found
            lines += judged(case, found, "ultralytics", want)
    if goals.wanted(given, "RTMDet's"):
        case = soft_labels(given.seed)
        with threads(1):
            found = timed(bench, case, ("mmdet",))
        results += found
        lines += list(judged(case, found, "mmdet", 20.0))[:1]
    if goals.wanted(given, "xView"):
        inputs = predicted(*small_objects(given.seed), XVIEW_CLASSES, given.seed)
        case = assignment("xView", inputs, gfl_ops.task_aligned_assign, {})
        found = timed(bench, case, ())
        results += found
        time, memory = goals.milliseconds(found[-1])[0], found[-1].memory
        lines.append(Reached("xView", "", 1000.0, time, time, unit="ms"))
        lines.append(Reached("xView, memory", "", 60.0, None if memory is None else memory / 1e6, unit="MB"))
    return results, lines


def curve(given: argparse.Namespace, bench: Bench) -> list[Result]:
    """Ours at more and more objects, with the candidates that there are."""
    results = []
    for objects in (10, 30, 100, 300, 1000):
        case = replace(task_aligned(objects, given.seed, None), name=f"curve {objects}")
        gt, at = case.inputs["gt_boxes"], points()[:, :2]
        inside = sum(int(((at > g[:, None, :2]) & (at < g[:, None, 2:])).all(-1).sum()) for g in gt)
        with threads(1):
            found = bench.run(case, "fp32", IMAGES, ("native",))
        results += found
        if (time := found[-1].total) is not None:
            each = 1e6 * time.median / inside
            print(f"{objects:>12} objects {inside:>9} candidates{report.ms(time.median):>9} ms{each:>7.1f} ns each")
    return results


# --- the whole loss ------------------------------------------------------------------------------------------------


def v8_loss(seed: int) -> tuple[Case, list[str]]:
    """ultralytics' loss of YOLOv8-n's head, and the names of its compiled forms."""
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import loss as their_loss

    from gfl_ops.compat import ultralytics as compat

    head = SimpleNamespace(stride=torch.tensor([float(s) for s in STRIDES]), nc=CLASSES, reg_max=16)

    def criterion() -> Any:
        weights = [torch.zeros(1)]
        return their_loss.v8DetectionLoss(
            SimpleNamespace(args=get_cfg(), model=[head], parameters=lambda: iter(weights), class_weights=None)
        )

    boxes, labels = goals.crowd(IMAGES, 20, (SIZE, SIZE), seed)
    flat = boxes.flatten(0, 1) / SIZE
    batch = {
        "batch_idx": torch.arange(IMAGES).repeat_interleave(boxes.shape[1]).float(),
        "cls": labels.flatten()[:, None].float(),
        "bboxes": torch.cat([(flat[:, :2] + flat[:, 2:]) / 2, flat[:, 2:] - flat[:, :2]], 1),
    }
    feats = [torch.zeros(IMAGES, 1, *size) for size in SIZES]
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in SIZES)
    inputs = {
        "scores": torch.randn(IMAGES, CLASSES, cells, generator=generator) * 1.25 - 6,
        "sides": torch.randn(IMAGES, 64, cells, generator=generator),
    }

    def call(method: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda scores, sides: method({"boxes": sides, "scores": scores, "feats": feats}, batch)[0].sum()

    eager, whole, assigner, arithmetic = (criterion() for _ in range(4))
    assigner.assigner.forward = torch.compile(assigner.assigner.forward, dynamic=False)
    arithmetic.bbox_loss.forward = torch.compile(arithmetic.bbox_loss.forward)
    arithmetic.bce.forward = torch.compile(arithmetic.bce.forward, dynamic=False)
    arithmetic.bbox_decode = torch.compile(arithmetic.bbox_decode, dynamic=False)
    forms = {
        "eager": call(eager.loss),
        "compiled": call(torch.compile(whole.loss, dynamic=False)),
        "assigner compiled": call(assigner.loss),
        "arithmetic compiled": call(arithmetic.loss),
    }
    with compat.patch():
        patched = their_loss.v8DetectionLoss.loss
    mine = criterion()
    case = Case(
        "yolo_loss", "v8 loss", f"{IMAGES} images, {len(labels.flatten())} objects", inputs,
        call(partial(patched, mine)), forms, None, ("scores", "sides"),
    )  # fmt: skip
    return case, [name for name in forms if name != "eager"]


def loss(given: argparse.Namespace, bench: Bench) -> tuple[list[Result], list[Reached]]:
    if not ultralytics():
        return [], [Reached("v8 loss", "eager", 5.0, None, why="ultralytics is not installed")]
    case, compiled = v8_loss(given.seed)
    with threads(1):
        found = bench.run(case, "fp32", IMAGES, ("eager", *([] if given.no_compile else compiled), "native"))
    print("\n" + report.block(found), flush=True)
    goal = goals.Goal("v8 loss", lambda: case, {"eager": 5.0})
    lines = list(goals.judge(goal, found, bench.machine))
    timed = [r for r in found if r.provider in compiled and r.total is not None]
    if best := min(timed, key=lambda r: r.total.median if r.total else math.inf, default=None):
        lines += goals.judge(replace(goal, ratios={best.provider: 2.0}), found, bench.machine)
    return found, lines


def step(given: argparse.Namespace, bench: Bench) -> list[Result]:
    """YOLOv8-n's training step and the loss in it."""
    detector = peers.PEERS["yolov8"].build(peers.Batch.draw(STEP_IMAGES, (SIZE, SIZE), given.seed, "cpu"))
    found = peers.measure(bench, peers.PEERS["yolov8"], detector, STEP_IMAGES, list(peers.parts(detector))[:2])
    print(f"\n{peers.HEADER}\n{peers.table(found)}", flush=True)
    return found


def run(given: argparse.Namespace) -> int:
    machine, budget = Machine("cpu", given.clock == "cpu"), Budget(given.limit)
    print(report.head(machine, [f"{torch.get_num_threads()} threads"]), flush=True)
    bench = Bench(machine, budget, given.rounds, given.seconds, slow=60.0, counts=False)
    results, lines = assigners(given, bench)
    if goals.wanted(given, "v8 loss"):
        found, more = loss(given, bench)
        results += found
        lines += more
    if goals.wanted(given, "curve"):
        results += curve(given, bench)
    if goals.wanted(given, "YOLOv8-n") and ultralytics():
        results += step(given, bench)
    return goals.finish(given, results, lines, machine, plot=results)
