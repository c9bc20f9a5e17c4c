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
from harness import Bench, Case, Result

FP32 = torch.float32


@dataclass(frozen=True)
class Goal:
    """How fast a case should be.

    Attributes:
        name: of the goal.
        make: the case.
        ratios: provider -> how many times as fast the native kernel should be.
        batch, dtype: of the case, for the table.
        times: a limit on the device's time, as a multiple of the time that a copy of as many bytes takes as have to
            move,
        extra: plus this many microseconds.
    """

    name: str
    make: Callable[[], Case]
    ratios: dict[str, float] = field(default_factory=dict)
    batch: int = 2
    dtype: str = "fp32"
    times: float = 0.0
    extra: float = 0.0


@dataclass
class Reached:
    """One line of the goals' table: `want` times as fast as `provider`, or without one at most `want` of `unit`."""

    goal: str
    provider: str
    want: float
    got: float | None
    ours_ms: float | None = None
    theirs_ms: float | None = None
    why: str = ""
    unit: str = "µs"

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


def measure(given: argparse.Namespace, goals: Iterable[Goal], bench: Bench) -> tuple[list[Result], list[Reached]]:
    """Time the wanted goals and compare."""
    results: list[Result] = []
    lines: list[Reached] = []
    for goal in goals:
        if not wanted(given, goal.name):
            continue
        case = cases.on(replace(goal.make(), name=goal.name), given.device)
        got = bench.run(case, goal.dtype, goal.batch, (*goal.ratios, "native"), not given.no_compile)
        print(f"\n{report.section(goal.dtype, goal.batch, bench.machine)}\n{report.block(got)}", flush=True)
        results += got
        lines += judge(goal, got, bench.machine)
    return results, lines


def judge(goal: Goal, results: list[Result], machine: Machine) -> Iterator[Reached]:
    """Limits and ratios, by the device's own time where there is one."""
    found = {r.provider: r for r in results}
    native = found.get("native")
    ours, why = milliseconds(native)
    if goal.times or goal.extra:
        moved = 0 if native is None else native.bytes.get("both", native.bytes.get("forward", 0))
        floor = 1e6 * moved / machine.bandwidth
        got = None if ours is None else 1e3 * ours
        yield Reached(goal.name, "", goal.times * floor + goal.extra, got, ours, why=why)
    for provider, want in goal.ratios.items():
        other, reason = milliseconds(found.get(provider))
        reasons = "; ".join(filter(None, (why, reason)))
        yield Reached(goal.name, provider, want, other / ours if ours and other else None, ours, other, reasons)


def milliseconds(result: Result | None) -> tuple[float | None, str]:
    """The device's own time of a result, or else the median; and a note."""
    if result is None or result.total is None:
        return None, "" if result is None else result.reason
    if result.device_ms is not None:
        return result.device_ms, ""
    note = f"{result.provider} outside a graph: {result.not_in_graph}" if result.not_in_graph else ""
    return result.total.median, note


def table(lines: list[Reached]) -> str:
    head = f"{'goal':<34}{'ours':>9}{'theirs':>9}  {'against':<12}{'got':>7}{'goal':>6}"
    rows = [head, "=" * report.WIDTH]
    for r in lines:
        got = "-" if r.got is None else f"{r.got:.1f}"
        row = f"{r.goal:<34}{report.ms(r.ours_ms):>9}{report.ms(r.theirs_ms):>9}  {r.provider or 'the limit':<12}"
        rows.append(row + f"{got:>7}{r.want:>5.{0 if r.want == int(r.want) else 1}f}{'×' if r.provider else r.unit}")
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


def head_with_assignment(
    scene: inputs.Scene, objects: int, seed: int, dtype: torch.dtype = FP32, channels_last: bool = False
) -> Case:
    """From maps and boxes to the three losses, with their gradients on the maps."""
    case = cases.make("gfl_loss", scene, dtype, "cpu")[0]
    boxes, labels = crowd(scene.batch, objects, scene.size, seed)
    sizes, strides = inputs.level_sizes(scene.size), [float(s) for s in inputs.STRIDES]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = {n: [m.contiguous(memory_format=layout) for m in case.inputs[n]] for n in ("cls_scores", "reg_preds")}

    def ours(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assigned = gfl_ops.atss_assign(sizes, strides, gt_boxes.float(), gt_labels)
        return tuple(gfl_ops.gfl_loss(cls_scores, reg_preds, strides, assigned, gt_boxes))[:3]

    def eager(cls_scores: list[Tensor], reg_preds: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        assigned, matched, _ = formulas.head.atss(sizes, strides, gt_boxes, gt_labels)
        return formulas.head.gfl_loss(cls_scores, reg_preds, strides, assigned, matched, gt_boxes, inputs.REG_MAX)

    given = maps | {"gt_boxes": boxes, "gt_labels": labels}
    # Of the distributions only the positives' have to be read, of which there are few.
    reads = nbytes([maps["cls_scores"], boxes, labels])
    return replace(
        case, name="head loss", what=f"assignment and loss, {scene.batch}×{objects} objects", inputs=given, ours=ours,
        peers={"eager": eager}, dense=None, reads=reads,
    )  # fmt: skip


def assignment(scene: inputs.Scene, objects: int, seed: int) -> Case:
    case = cases.make("atss", scene, FP32, "cpu")[0]
    boxes, labels = crowd(scene.batch, objects, scene.size, seed)
    given = {"gt_boxes": boxes, "gt_labels": labels}
    return replace(case, name=f"atss {objects}", what=f"{scene.batch}×{objects} objects", inputs=given)


def postprocess(scene: inputs.Scene) -> Case:
    return cases.make("postprocess", scene, FP32, "cpu")[0]
