# SPDX-License-Identifier: Apache-2.0
"""Hold the CPU operators to their goals: each against what people use today,
side by side in one run, and the time that one small call costs.

  goal                 inputs
  qfl                  44 800 x 80 logits of a batch of two 800x1344 images
  dfl+integral         80 000 x 17 logits, one softmax for loss and distance
  head loss            assignment and whole loss, 2 images of 20 objects
  atss                 2 images of 60 objects, and of 400
  batched_nms          1 000, 5 000 and 20 000 boxes of 80 classes, spread
                       evenly over the image or in clusters
  post-process         all maps of 4 images, a trained head's where they are
  one call             Python to Python on 8 rows, without gradients

Losses run forward and backward, in fp32. Every provider is checked against the
fp64 oracle before it is timed, and all take turns; a plain log1p is timed beside
them and says how even the machine was. Ratios are of medians in this run.
Exits with 1 where one of this package's providers is wrong or fails; a goal that
is missed is said and is no error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# libkineto, by which memory is counted, would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from torch import Tensor

import cases
import formulas_head
import gfl_ops
import inputs
import report
from harness import Bench, Case, Clock, Machine, Result

CALL_ROWS, CALL_GOAL = 8, 15.0  # microseconds
NMS_COUNTS = (1000, 5000, 20000)
DFL_ROWS = 80_000
FP32 = torch.float32


@dataclass(frozen=True)
class Goal:
    """How many times as fast as which providers a case shall be."""

    name: str
    ratios: dict[str, float]
    make: Callable[[], Case]
    batch: int = 2


@dataclass
class Reached:
    """One line of the goals' table: `want` times as fast as `provider`, or at most `want` microseconds."""

    goal: str
    provider: str
    want: float
    got: float | None
    ours_ms: float | None = None
    theirs_ms: float | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        good = self.got <= self.want if self.provider == "" else self.got >= self.want
        return "reached" if good else "MISSED"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--goals", nargs="+", metavar="G", help="only goals whose name begins so, as in the list above")
    add("--threads", type=int, default=2, help="CPU threads (default %(default)s)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    add("--rounds", type=int, default=30, help="turns a provider at most (default %(default)s)")
    add("--seconds", type=float, default=4.0, help="aimed at a case (default %(default)s)")
    add("--limit", type=float, default=270.0, metavar="S", help="seconds for everything (default %(default)s)")
    add("--size", type=inputs_size, default=(800, 1344), metavar="HxW", help="of an image (default 800x1344)")
    add("--data", type=Path, default=inputs.DATA, help="folder of real data (default: GFL_TEST_DATA or %(default)s)")
    add("--out", type=Path, default=Path("out/bench_cpu"), help="folder for JSON and plot (default %(default)s)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes half a minute")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    return parser.parse_args(words)


def inputs_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def crowd(images: int, objects: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """So many objects in every image: boxes ``[B, G, 4]`` and labels ``[B, G]``, with the sizes of COCO's."""
    photos = inputs.drawn_boxes(images * objects, size, torch.Generator().manual_seed(seed))
    boxes = torch.cat([b for b, _ in photos])[: images * objects]
    labels = torch.cat([y for _, y in photos])[: images * objects]
    return boxes.reshape(images, objects, 4), labels.reshape(images, objects)


def many_rows(scene: inputs.Scene, rows: int) -> Case:
    """The positives' sides over and over, until there are so many."""
    case = cases.make("dfl_integral", scene, FP32, "cpu")[0]
    times = rows // len(case.inputs["target"]) + 1

    def repeated(value: Any) -> Any:
        return value.repeat(times, *[1] * (value.dim() - 1))[:rows] if value.dim() else value

    given = {name: repeated(value) for name, value in case.inputs.items()}
    given["factor"] = given["weight"].sum()
    return replace(case, inputs=given, what=f"{rows}×{given['pred'].shape[1]} logits")


def head_with_assignment(scene: inputs.Scene, objects: int, seed: int) -> Case:
    """From maps and boxes to the three losses, with their gradients on the maps."""
    case = cases.make("gfl_loss", scene, FP32, "cpu")[0]
    boxes, labels = crowd(scene.batch, objects, scene.size, seed)
    sizes, strides = inputs.level_sizes(scene.size), [float(s) for s in inputs.STRIDES]
    maps = {name: case.inputs[name] for name in ("cls_scores", "reg_preds")}

    def ours(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assignment = gfl_ops.atss_assign(sizes, strides, gt_boxes.float(), gt_labels)
        return tuple(gfl_ops.gfl_loss(cls_scores, reg_preds, strides, assignment, gt_boxes))[:3]

    def eager(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assigned, matched, _ = formulas_head.atss(sizes, strides, gt_boxes, gt_labels)
        return formulas_head.gfl_loss(cls_scores, reg_preds, strides, assigned, matched, gt_boxes, inputs.REG_MAX)

    given = maps | {"gt_boxes": boxes, "gt_labels": labels}
    return replace(
        case, name="head loss", what=f"assignment and loss, {scene.batch}×{objects} objects", inputs=given, ours=ours,
        peers={"eager": eager}, dense=None, reads=None,
    )  # fmt: skip


def assignment(scene: inputs.Scene, objects: int, seed: int) -> Case:
    case = cases.make("atss", scene, FP32, "cpu")[0]
    boxes, labels = crowd(scene.batch, objects, scene.size, seed)
    given = {"gt_boxes": boxes, "gt_labels": labels}
    return replace(case, name=f"atss {objects}", what=f"{scene.batch}×{objects} objects", inputs=given)


def goals(given: argparse.Namespace) -> Iterator[Goal]:
    two = inputs.make_scene(2, given.size, given.data, given.seed)
    losses = {"compiled": 4.0, "eager": 10.0}
    yield Goal("qfl", losses, lambda: cases.make("qfl", two, FP32, "cpu")[0])
    yield Goal("dfl+integral", {"compiled": 4.0, "eager": 7.0}, lambda: many_rows(two, DFL_ROWS))
    yield Goal("head loss", {"eager": 10.0}, lambda: head_with_assignment(two, 20, given.seed))
    for objects in (60, 400):
        yield Goal(f"atss {objects}", {"eager": 50.0}, partial(assignment, two, objects, given.seed))
    for count in NMS_COUNTS:
        for clustered in (False, True):
            name = f"batched_nms {count} {'clustered' if clustered else 'uniform'}"
            yield Goal(
                name, {"torchvision": 5.0}, partial(cases.suppression, count, clustered, given.size, given.seed), 1
            )
    four = inputs.make_scene(4, given.size, given.data, given.seed)
    yield Goal("post-process", {"eager": 15.0}, lambda: cases.make("postprocess", four, FP32, "cpu")[0], 4)


def judge(goal: Goal, results: list[Result]) -> Iterator[Reached]:
    found = {r.provider: r for r in results}
    ours = found["native"]
    for provider, want in goal.ratios.items():
        theirs = found.get(provider)
        mine, other = (r.total.median if r is not None and r.total is not None else None for r in (ours, theirs))
        why = "; ".join(r.reason for r in (ours, theirs) if r is not None and r.reason)
        yield Reached(goal.name, provider, want, other / mine if mine and other else None, mine, other, why)


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


def one_call(scene: inputs.Scene, clock: Clock, cpu_time: bool) -> Iterator[Reached]:
    """Microseconds of a call: the median over batches of calls, the functions taking turns."""
    made, now = calls(scene), time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.no_grad():
        for turn in range(12):
            if turn > 2 and clock.used > 0.98:
                break
            for name, call in made.items():
                begin = now()
                for _ in range(100):
                    call()
                if turn > 0:
                    times[name].append((now() - begin) * 1e4)
    for name, values in times.items():
        yield Reached(f"one call: {name}", "", CALL_GOAL, statistics.median(values))


def table(lines: list[Reached]) -> str:
    said = [f"{'goal':<34}{'ours':>9}{'theirs':>9}  {'against':<12}{'got':>7}{'goal':>6}", "=" * report.WIDTH]
    for r in lines:
        got = "-" if r.got is None else f"{r.got:.1f}"
        unit = "µs" if r.provider == "" else "×"
        row = f"{r.goal:<34}{report.ms(r.ours_ms):>9}{report.ms(r.theirs_ms):>9}  {r.provider:<12}{got:>7}"
        said.append(row + f"{r.want:>5.0f}{unit}")
        if r.verdict != "reached":
            said.append(f"    {r.verdict}{': ' if r.why else ''}{r.why}"[: report.WIDTH])
    reached = sum(r.verdict == "reached" for r in lines)
    return "\n".join([*said, "", f"{reached} of {len(lines)} reached"])


def run(given: argparse.Namespace) -> tuple[list[Result], list[Reached], Machine]:
    clock = Clock(given.limit)
    machine = Machine("cpu", given.clock == "cpu")
    bench = Bench(machine, clock, given.rounds, given.seconds)
    results: list[Result] = []
    lines: list[Reached] = []
    wanted = tuple(given.goals or ("",))
    print(report.head(machine, [f"{torch.get_num_threads()} threads"]), flush=True)
    print("\n" + report.section("fp32", 2, machine), flush=True)
    for goal in goals(given):
        if not goal.name.startswith(wanted):
            continue
        case = replace(goal.make(), name=goal.name)
        got = bench.run(case, "fp32", goal.batch, (*goal.ratios, "native"), not given.no_compile)
        results += got
        lines += judge(goal, got)
        print("\n" + report.block(got), flush=True)
    if any("one call".startswith(w) or w.startswith("one call") for w in wanted):
        with gfl_ops.set_backend("auto"):
            lines += one_call(inputs.make_scene(2, given.size, given.data, given.seed), clock, given.clock == "cpu")
    return results, lines, machine


def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    results, lines, machine = run(given)
    print("\n" + table(lines))
    print("\n" + "\n".join(textwrap.wrap(report.quiet(machine), report.WIDTH)))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "bench_cpu.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    report.write_json(path, results, machine, settings)
    record = json.loads(path.read_text())
    record["goals"] = [dataclasses.asdict(r) | {"verdict": r.verdict} for r in lines]
    path.write_text(json.dumps(record, indent=1) + "\n")
    trouble = report.plot(given.out / "bench_cpu.png", results, machine)
    print(f"\nwritten: {path}; {trouble}" if trouble else f"\nwritten: {path}, {given.out / 'bench_cpu.png'}")
    return 1 if any(report.is_ours(r.provider) and r.status in ("wrong", "failed") for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
