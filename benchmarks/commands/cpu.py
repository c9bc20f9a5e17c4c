# SPDX-License-Identifier: Apache-2.0
"""Hold the CPU operators to their goals: each against what people use today, in
one interleaved run, and the time per small call.

  goal                 inputs
  qfl                  44 800 x 80 logits of a batch of two 800x1344 images
  dfl+integral         80 000 x 17 logits, one softmax for loss and distance
  head loss            assignment and whole loss, 2 images of 20 objects
  atss                 2 images of 60 objects, and of 400
  batched_nms          1 000, 5 000 and 20 000 boxes of 80 classes, spread
                       evenly over the image or in clusters
  post-process         all maps of 4 images, a trained head's where available
  one call             Python to Python on 8 rows, without gradients

Losses run forward and backward, in fp32. Every provider is checked against the
fp64 oracle before it is timed, and all take turns; a plain log1p is timed between
them and shows how steady the machine was. Ratios are of medians in this run.
Exits with 1 where one of this package's providers is wrong or fails; a missed
goal is reported and is no error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import cases
import cases.select
import gfl_ops
import goals
import inputs
import report
from clock import Budget, Machine
from goals import FP32, Goal, Reached
from harness import Bench

CALL_ROWS, CALL_GOAL = 8, 15.0  # microseconds
NMS_COUNTS = (1000, 5000, 20000)
DFL_ROWS = 80_000


def configure(parser: argparse.ArgumentParser) -> None:
    goals.configure(parser)
    parser.set_defaults(device="cpu", threads=2, seconds=4.0, limit=270.0)


def all_goals(given: argparse.Namespace) -> Iterator[Goal]:
    two = inputs.make_scene(2, given.size, given.data, given.seed)
    yield Goal("qfl", lambda: cases.make("qfl", two, FP32, "cpu")[0], {"compiled": 4.0, "eager": 10.0})
    yield Goal("dfl+integral", lambda: goals.many_rows(two, DFL_ROWS), {"compiled": 4.0, "eager": 7.0})
    yield Goal("head loss", lambda: goals.head_with_assignment(two, 20, given.seed), {"eager": 10.0})
    for objects in (60, 400):
        yield Goal(f"atss {objects}", partial(goals.assignment, two, objects, given.seed), {"eager": 50.0})
    for count in NMS_COUNTS:
        for clustered in (False, True):
            make = partial(cases.select.suppression, count, clustered, given.size, given.seed)
            yield Goal(f"batched_nms {count} {'clustered' if clustered else 'uniform'}", make, {"torchvision": 5.0}, 1)
    four = inputs.make_scene(4, given.size, given.data, given.seed)
    yield Goal("post-process", lambda: goals.postprocess(four), {"eager": 15.0}, 4)


def calls(scene: inputs.Scene) -> dict[str, Callable[[], Any]]:
    """The public functions of the detector's hot path, on 8 rows."""
    n, bins = CALL_ROWS, inputs.REG_MAX + 1
    pred, label, score = scene.pred[:n].contiguous(), scene.label[:n].contiguous(), scene.score[:n].contiguous()
    rows, target = scene.rows[:n].contiguous(), scene.target[:n].contiguous()
    sides = scene.rows[: 4 * n].reshape(n, 4 * bins).contiguous()
    boxes, true = scene.true_boxes[:n].contiguous(), scene.pred_boxes[:n].contiguous()
    points, idxs = scene.points[:n].contiguous(), torch.arange(n) % 3
    return {
        "quality_focal_loss": lambda: gfl_ops.quality_focal_loss(pred, (label, score)),
        "distribution_focal_loss": lambda: gfl_ops.distribution_focal_loss(rows, target),
        "dfl_integral": lambda: gfl_ops.dfl_integral(rows, target),
        "integral": lambda: gfl_ops.integral(sides, inputs.REG_MAX),
        "decode": lambda: gfl_ops.decode(sides, points, 8.0, inputs.REG_MAX),
        "box_iou_loss": lambda: gfl_ops.box_iou_loss(boxes, true),
        "distance_to_box": lambda: gfl_ops.distance_to_box(points, boxes),
        "nms": lambda: gfl_ops.nms(boxes, score, 0.6),
        "batched_nms": lambda: gfl_ops.batched_nms(boxes, score, idxs, 0.6),
    }


def run(given: argparse.Namespace) -> int:
    machine, budget = Machine("cpu", given.clock == "cpu"), Budget(given.limit)
    print(report.head(machine, [f"{torch.get_num_threads()} threads"]), flush=True)
    results, lines = goals.measure(given, all_goals(given), Bench(machine, budget, given.rounds, given.seconds))
    if goals.wanted(given, "one call"):
        scene = inputs.make_scene(2, given.size, given.data, given.seed)
        with gfl_ops.set_backend("auto"), torch.no_grad():
            found = machine.host_time(calls(scene), budget)
        lines += [Reached(f"one call: {name}", "", CALL_GOAL, value) for name, value in found.items()]
    return goals.finish(given, results, lines, machine, plot=results)
