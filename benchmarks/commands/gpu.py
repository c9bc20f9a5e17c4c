# SPDX-License-Identifier: Apache-2.0
"""Hold the CUDA operators to their goals: the device's own time, by replaying
forward and backward from a CUDA graph, against what memory allows and against
what people use today.

  goal                 inputs
  qfl                  16 images, 358 400 x 80 logits, fp32 and bf16
  qfl recomputed       the same, its loss doubled, so that the gradient stored in
                       forward does not fit and is computed again
  dfl+integral         1.6 million rows of 17 logits, and 80 000
  head loss            assignment and whole loss, 16 images of 60 objects; fp32,
                       and bf16 in channels last
  atss                 16 images of 60 objects
  post-process         all maps of 16 images, and of one
  batched_nms          1 000, 5 000 and 100 000 boxes of 80 classes, spread
                       evenly over the image or in clusters
  decode               all locations of 16 images, bf16
  one call             the host's time for quality focal loss on 8 rows

A limit is a multiple of the time that the bytes which have to move would take at
the rate of a large copy, plus some microseconds of launches. A graph holds copies
of the step on memory of their own, more than twice the last-level cache together,
so that inputs come from memory. Peers are timed in a graph too; one that makes the
host wait is timed outside, with the host ahead as far as the peer lets it be.
Every provider is checked against the oracle first. --device cpu runs everything
too, for tests; its figures mean nothing there. Exits with 1 where one of this
package's providers is wrong or fails; a missed goal is reported and is no error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cases
import cases.select
import gfl_ops
import goals
import inputs
import report
from clock import Budget, Machine
from goals import Goal, Reached
from harness import DTYPES, Bench, Case, Run

BATCH, OBJECTS, CALL_ROWS = 16, 60, 8
DFL_ROWS = (1_600_000, 80_000)
NMS_COUNTS = (1000, 5000, 100_000)
NMS_PEERS = ("torchvision", "tv shifted", "tv by class")


def configure(parser: argparse.ArgumentParser) -> None:
    goals.configure(parser)
    text = "run each case once, where only a profiler looks: ncu --profile-from-start off"
    parser.add_argument("--profile", action="store_true", help=text)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of images, rows and boxes (default 1)")
    parser.set_defaults(seconds=0.5, limit=90.0)


def quality(scene: inputs.Scene, dtype: str, factor: float = 1.0) -> Case:
    case = cases.make("qfl", scene, DTYPES[dtype], "cpu")[0]
    if factor == 1.0:
        return case

    def times(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: factor * call(**given)

    peers = {name: times(call) for name, call in case.peers.items() if call}
    return replace(case, ours=times(case.ours), peers=peers, dense=None)


def everywhere(scene: inputs.Scene) -> Case:
    """Boxes of all locations, for those who select afterwards."""
    return next(c for c in cases.make("decode", scene, torch.bfloat16, "cpu") if c.name == "decode of all")


def all_goals(given: argparse.Namespace) -> Iterator[Goal]:
    batch, seed = max(1, round(BATCH * given.scale)), given.seed
    many = inputs.make_scene(batch, given.size, given.data, seed)
    one = inputs.make_scene(1, given.size, given.data, seed)
    common = {"batch": batch}
    for dtype in ("fp32", "bf16"):
        make = partial(quality, many, dtype)
        yield Goal(f"qfl {dtype}", make, {"compiled": 2.0, "eager": 12.0}, dtype=dtype, times=1.15, **common)
    for dtype in ("fp32", "bf16"):
        make = partial(quality, many, dtype, 2.0)
        yield Goal(f"qfl recomputed {dtype}", make, dtype=dtype, times=2.3, **common)
    for rows, times, extra in zip(DFL_ROWS, (1.3, 1.0), (0.0, 6.0)):
        count = max(4, round(rows * given.scale))
        make = partial(goals.many_rows, many, count)
        yield Goal(f"dfl+integral {count}", make, {"eager": 6.0}, times=times, extra=extra, **common)
    for dtype, name in (("fp32", "head loss"), ("bf16", "head loss bf16 nhwc")):
        make = partial(goals.head_with_assignment, many, OBJECTS, seed, DTYPES[dtype], dtype != "fp32")
        yield Goal(name, make, {"eager": 50.0}, batch, dtype, times=1.25, extra=25.0)
    yield Goal("atss", partial(goals.assignment, many, OBJECTS, seed), {"eager": 200.0}, batch, extra=15.0)
    make = partial(goals.postprocess, many)
    yield Goal(f"post-process {batch}", make, {"eager": 100.0}, batch, times=1.5, extra=25.0)
    if batch > 1:
        yield Goal("post-process 1", partial(goals.postprocess, one), {"eager": 50.0}, 1, extra=45.0)
    for count in NMS_COUNTS:
        boxes = max(1, round(count * given.scale))
        for clustered in (False, True):
            make = partial(cases.select.suppression, boxes, clustered, given.size, seed)
            name = f"batched_nms {boxes} {'clustered' if clustered else 'uniform'}"
            yield Goal(name, make, dict.fromkeys(NMS_PEERS, 3.0), 1)
    make = partial(everywhere, many)
    yield Goal("decode", make, batch=batch, dtype="bf16", times=1.2)


def host_time(machine: Machine, budget: Budget, seed: int) -> Iterator[Reached]:
    """Microseconds of the host per small call, without a graph."""
    draw, device = torch.Generator().manual_seed(seed), machine.device
    pred = torch.randn((CALL_ROWS, 80), generator=draw).to(device).requires_grad_()
    label = torch.randint(0, 81, (CALL_ROWS,), generator=draw).to(device)
    score = torch.rand(CALL_ROWS, generator=draw).to(device)

    def forward() -> Tensor:
        return gfl_ops.quality_focal_loss(pred, (label, score), avg_factor=3.0)

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), pred)

    found = machine.host_time({"forward": without_gradient, "forward+backward": both}, budget)
    for name, want in (("forward", 15.0), ("forward+backward", 60.0)):
        yield Reached(f"one call: {name}", "", want, found[name])


def profile(given: argparse.Namespace) -> int:
    """Run each wanted case natively, once warm."""
    listening = torch.cuda.profiler.profile if given.device == "cuda" else nullcontext
    with gfl_ops.set_backend("native"):
        for goal in all_goals(given):
            if not goals.wanted(given, goal.name):
                continue
            case = cases.on(goal.make(), given.device)
            run = Run(case, case.ours, "native", case.inputs)
            run.all_steps()
            with listening():
                run.all_steps()
            print(goal.name, flush=True)
    return 0


def run(given: argparse.Namespace) -> int:
    if given.profile:
        return profile(given)
    machine, budget = Machine(given.device, given.clock == "cpu"), Budget(given.limit)
    print(report.head(machine, ["The goals' table below counts the device's time in a graph."]), flush=True)
    lines: list[Reached] = []
    if goals.wanted(given, "one call"):
        with gfl_ops.set_backend("auto"):
            lines += host_time(machine, budget, given.seed)
    bench = Bench(machine, budget, given.rounds, given.seconds, graphs=True)
    results, found = goals.measure(given, all_goals(given), bench)
    return goals.finish(given, results, lines + found, machine, plot=())
