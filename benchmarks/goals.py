# SPDX-License-Identifier: Apache-2.0
"""Goals of single operators, and the cases that several commands hold to them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import cases
import formulas.head
import gfl_ops
import inputs
import report
from clock import Machine, nbytes
from harness import Bench, Case, Result, Run

FP32 = torch.float32


@dataclass(frozen=True)
class Goal:
    """How fast a case should be.

    Attributes:
        name: of the goal.
        make: the case.
        ratios: provider -> how many times as fast the native kernel should be.
        batch, dtype: of the case, for the table.
        moved: counts the bytes of a case that have to move, for a limit on the device's time.
        times: that limit, as a multiple of the time that a copy of as many bytes takes,
        extra: plus this many microseconds.
    """

    name: str
    make: Callable[[], Case]
    ratios: dict[str, float] = field(default_factory=dict)
    batch: int = 2
    dtype: str = "fp32"
    moved: Callable[[Case], int] | None = None
    times: float = 0.0
    extra: float = 0.0


@dataclass
class Reached:
    """One line of the goals' table: `want` times as fast as `provider`, or without one at most `want` microseconds."""

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
        good = self.got >= self.want if self.provider else self.got <= self.want
        return "reached" if good else "MISSED"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--goals", nargs="+", metavar="G", help="only goals whose name begins so, as in the list above")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes half a minute")


def wanted(given: argparse.Namespace, name: str) -> bool:
    return any(name.startswith(prefix) for prefix in given.goals or ("",))


def median(result: Result | None) -> float | None:
    return result.total.median if result is not None and result.total is not None else None


def measure(given: argparse.Namespace, goals: Iterable[Goal], bench: Bench) -> tuple[list[Result], list[Reached]]:
    """Time the wanted goals and compare; on a GPU the native kernels by the device's own time."""
    results: list[Result] = []
    lines: list[Reached] = []
    for goal in goals:
        if not wanted(given, goal.name):
            continue
        case = cases.on(replace(goal.make(), name=goal.name), given.device)
        got = bench.run(case, goal.dtype, goal.batch, (*goal.ratios, "native"), not given.no_compile)
        print(f"\n{report.section(goal.dtype, goal.batch, bench.machine)}\n{report.block(got)}", flush=True)
        results += got
        lines += judge(goal, case, got, bench)
    return results, lines


def judge(goal: Goal, case: Case, results: list[Result], bench: Bench) -> Iterator[Reached]:
    found = {r.provider: r for r in results}
    ours, why = median(found.get("native")), found["native"].reason if "native" in found else ""
    limited = goal.moved is not None or goal.extra > 0
    if ours is not None and (bench.machine.cuda or limited):
        ours, why = device_time(case, ours, bench)
    if limited:
        floor = 0.0 if goal.moved is None else 1e6 * goal.moved(case) / bench.machine.bandwidth
        got = None if ours is None else 1e3 * ours
        yield Reached(goal.name, "", goal.times * floor + goal.extra, got, ours, why=why)
    for provider, want in goal.ratios.items():
        theirs = found.get(provider)
        other = median(theirs)
        reasons = "; ".join(filter(None, (why, theirs.reason if theirs is not None else "")))
        yield Reached(goal.name, provider, want, other / ours if ours and other else None, ours, other, reasons)


def device_time(case: Case, ours: float, bench: Bench) -> tuple[float, str]:
    """Milliseconds of a forward and backward on the device alone, and a note where it can't be captured."""
    run = Run(case, case.ours, "native", case.inputs)

    def step() -> None:
        run.prepare()
        for part in run.steps():
            part()

    try:
        with gfl_ops.set_backend("native"), torch.set_grad_enabled(bool(case.gradients)):
            return bench.machine.device_time(step, bench.budget, bench.rounds) / 1e3, ""
    except RuntimeError as error:
        bench.machine.synchronize()
        return ours, f"it can't be captured: {str(error).splitlines()[0][:120]}; timed outside a graph"


def table(lines: list[Reached]) -> str:
    head = f"{'goal':<34}{'ours':>9}{'theirs':>9}  {'against':<12}{'got':>7}{'goal':>6}"
    rows = [head, "=" * report.WIDTH]
    for r in lines:
        got = "-" if r.got is None else f"{r.got:.1f}"
        row = f"{r.goal:<34}{report.ms(r.ours_ms):>9}{report.ms(r.theirs_ms):>9}  {r.provider or 'the limit':<12}"
        rows.append(row + f"{got:>7}{r.want:>5.{0 if r.want == int(r.want) else 1}f}{'×' if r.provider else 'µs'}")
        if r.verdict != "reached" or r.why:
            rows.append(f"    {r.verdict}{': ' if r.why else ''}{r.why}"[: report.WIDTH])
    reached = sum(r.verdict == "reached" for r in lines)
    return "\n".join([*rows, "", f"{reached} of {len(lines)} reached"])


def finish(
    given: argparse.Namespace, results: list[Result], lines: list[Reached], machine: Machine, plot: Sequence[Result]
) -> int:
    """Print the table last, where a reader looks first, and write everything."""
    print(f"\n{report.steadiness(machine)}\n\nours against the goals\n{table(lines)}")
    goals = [dataclasses.asdict(r) | {"verdict": r.verdict} for r in lines]
    return report.finish(given, results, machine, plot=plot, extra={"goals": goals})


# --- cases -----------------------------------------------------------------------------------------------


def crowd(images: int, objects: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """As many objects in every image: boxes ``[B, G, 4]`` and labels ``[B, G]``, with the sizes of COCO's."""
    images_boxes = inputs.random_boxes(images * objects, size, torch.Generator().manual_seed(seed))
    boxes = torch.cat([b for b, _ in images_boxes])[: images * objects]
    labels = torch.cat([y for _, y in images_boxes])[: images * objects]
    return boxes.reshape(images, objects, 4), labels.reshape(images, objects)


def many_rows(scene: inputs.Scene, rows: int) -> Case:
    """The positives' sides repeated until there are so many."""
    case = cases.make("dfl_integral", scene, FP32, "cpu")[0]
    times = rows // len(case.inputs["target"]) + 1

    def repeated(value: Any) -> Any:
        return value.repeat(times, *[1] * (value.dim() - 1))[:rows] if value.dim() else value

    given = {name: repeated(value) for name, value in case.inputs.items()}
    given["avg_factor"] = given["weight"].sum()
    return replace(case, inputs=given, what=f"{rows}×{given['pred'].shape[1]} logits")


def head_with_assignment(scene: inputs.Scene, objects: int, seed: int) -> Case:
    """From maps and boxes to the three losses, with their gradients on the maps."""
    case = cases.make("gfl_loss", scene, FP32, "cpu")[0]
    boxes, labels = crowd(scene.batch, objects, scene.size, seed)
    sizes, strides = inputs.level_sizes(scene.size), [float(s) for s in inputs.STRIDES]
    maps = {name: case.inputs[name] for name in ("cls_scores", "reg_preds")}

    def ours(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assigned = gfl_ops.atss_assign(sizes, strides, gt_boxes.float(), gt_labels)
        return tuple(gfl_ops.gfl_loss(cls_scores, reg_preds, strides, assigned, gt_boxes))[:3]

    def eager(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assigned, matched, _ = formulas.head.atss(sizes, strides, gt_boxes, gt_labels)
        return formulas.head.gfl_loss(cls_scores, reg_preds, strides, assigned, matched, gt_boxes, inputs.REG_MAX)

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


def postprocess(scene: inputs.Scene) -> Case:
    return cases.make("postprocess", scene, FP32, "cpu")[0]


def both_ways(case: Case) -> int:
    """Bytes: inputs read once, and gradients written once for those that need one."""
    return nbytes(case.inputs) + nbytes([case.inputs[name] for name in case.gradients])


def maps_of(case: Case) -> int:
    """Bytes: the class maps both ways, and the gradient of the distributions, nearly all of it zeros."""
    return 2 * nbytes(case.inputs["cls_scores"]) + nbytes(case.inputs["reg_preds"])


def scores_of(case: Case) -> int:
    return nbytes(case.inputs["cls_scores"])


def boxes_of(case: Case) -> int:
    return nbytes(case.inputs) + 16 * len(case.inputs["pred"])
