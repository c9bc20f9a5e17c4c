# SPDX-License-Identifier: Apache-2.0
"""Hold the CUDA operators to their goals: the device's own time, by replaying
forward and backward from a CUDA graph, against what memory allows and against
what people use today.

  goal                 inputs
  qfl                  16 images, 358 400 x 80 logits, fp32 and bf16
  qfl recomputed       the same, its loss doubled, which nobody can foretell
  dfl+integral         1.6 million rows of 17 logits, and 80 000
  head loss            assignment and whole loss, 16 images of 60 objects
  atss                 16 images of 60 objects
  post-process         all maps of 16 images, and of one
  batched_nms          1 000, 5 000 and 100 000 boxes of 80 classes, spread
                       evenly over the image or in clusters
  decode               all locations of 16 images, bf16
  one call             the host's time for quality focal loss on 8 rows

A limit is a multiple of the time that the bytes which have to move would take at
the rate of a large copy, plus some microseconds of launches. Peers are timed
outside a graph with the host ahead of the device, as far as they let it be.
Every provider is checked against the oracle first. Off a GPU (--device cpu) all
runs as well, to be tested; its figures mean nothing there. Exits with 1 where one
of this package's providers is wrong or fails; a goal that is missed is said and
is no error.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# libkineto, by which memory is counted, would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import cases
import gfl_ops
import inputs
import report
from bench_cpu import assignment, head_with_assignment, inputs_size, many_rows
from harness import DTYPES, Bench, Case, Clock, Machine, Result, Run, nbytes

BATCH, OBJECTS, CALL_ROWS = 16, 60, 8
DFL_ROWS = (1_600_000, 80_000)
NMS_COUNTS = (1000, 5000, 100_000)


@dataclass(frozen=True)
class Goal:
    """What a case shall take at most, and how many times as fast as whom it shall be.

    Attributes:
        moved: bytes that have to move, of the case's inputs.
        times: of the time that they take at the rate of a copy.
        extra: microseconds on top.
    """

    name: str
    make: Callable[[], Case]
    dtype: str
    batch: int
    moved: Callable[[Case], int] | None
    times: float
    extra: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class Reached:
    """One line of the goals' table, in microseconds: at most `limit`, or `want` times as fast as `provider`."""

    goal: str
    provider: str
    want: float
    got: float | None
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.got is None:
            return "not measured"
        good = self.got >= self.want if self.provider else self.got <= self.want
        return "reached" if good else "MISSED"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--goals", nargs="+", metavar="G", help="only goals whose name begins so, as in the list above")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use a GPU, else cpu")
    add("--rounds", type=int, default=30, help="turns a provider at most (default %(default)s)")
    add("--seconds", type=float, default=0.5, help="aimed at a case (default %(default)s)")
    add("--limit", type=float, default=90.0, metavar="S", help="seconds for everything (default %(default)s)")
    add("--size", type=inputs_size, default=(800, 1344), metavar="HxW", help="of an image (default 800x1344)")
    add("--scale", type=float, default=1.0, help="of the numbers of images, rows and boxes (default 1)")
    add("--data", type=Path, default=inputs.DATA, help="folder of real data (default: GFL_TEST_DATA or %(default)s)")
    add("--out", type=Path, default=Path("out/bench_gpu"), help="folder for JSON and plot (default %(default)s)")
    add("--no-compile", action="store_true", help="leave out torch.compile")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    given = parser.parse_args(words)
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return given


def both_ways(case: Case) -> int:
    """Inputs that want a gradient read once and their gradients written once; the rest read once."""
    return nbytes(case.inputs) + nbytes([case.inputs[name] for name in case.gradients])


def maps_of(case: Case) -> int:
    """The class maps both ways, and the gradient of the distributions, nearly all of it zeros."""
    return 2 * nbytes(case.inputs["cls_scores"]) + nbytes(case.inputs["reg_preds"])


def on(case: Case, device: str) -> Case:
    return replace(case, inputs=tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, case.inputs))


def quality(scene: inputs.Scene, dtype: str, device: str, factor: float = 1.0) -> Case:
    case = cases.make("qfl", scene, DTYPES[dtype], device)[0]
    if factor == 1.0:
        return case

    def times(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **given: factor * call(**given)

    peers = {name: times(call) for name, call in case.peers.items() if call}
    return replace(case, ours=times(case.ours), peers=peers, dense=None)


def everywhere(scene: inputs.Scene, device: str) -> Case:
    """Boxes of all locations, for those who select afterwards."""
    case = next(c for c in cases.make("decode", scene, torch.bfloat16, device) if c.name == "decode of all")
    return replace(case, peers={}, dense=None)


def goals(given: argparse.Namespace) -> Iterator[Goal]:
    batch = max(1, round(BATCH * given.scale))
    many = inputs.make_scene(batch, given.size, given.data, given.seed)
    device, seed = given.device, given.seed
    for dtype in ("fp32", "bf16"):
        ratios = {"compiled": 2.0, "eager": 12.0}
        yield Goal(f"qfl {dtype}", partial(quality, many, dtype, device), dtype, batch, both_ways, 1.15, 0.0, ratios)
    for dtype in ("fp32", "bf16"):
        make = partial(quality, many, dtype, device, 2.0)
        yield Goal(f"qfl recomputed {dtype}", make, dtype, batch, both_ways, 2.3)
    for rows, times, extra in zip(DFL_ROWS, (1.3, 1.0), (0.0, 6.0)):
        count = max(4, round(rows * given.scale))

        def sides(count: int = count) -> Case:
            return on(many_rows(many, count), device)

        yield Goal(f"dfl+integral {count}", sides, "fp32", batch, both_ways, times, extra, {"eager": 6.0})
    head = partial(head_with_assignment, many, OBJECTS, seed)
    yield Goal("head loss", lambda: on(head(), device), "fp32", batch, maps_of, 1.25, 25.0, {"eager": 50.0})
    crowded = partial(assignment, many, OBJECTS, seed)
    yield Goal("atss", lambda: on(crowded(), device), "fp32", batch, None, 0.0, 15.0, {"eager": 200.0})
    one = inputs.make_scene(1, given.size, given.data, seed)
    for scene, moved, times, extra, ratio in ((many, scores_of, 1.5, 25.0, 100.0), (one, None, 0.0, 45.0, 50.0)):
        make = partial(postprocess, scene, device)
        name = f"post-process {scene.batch}"
        yield Goal(name, make, "fp32", scene.batch, moved, times, extra, {"eager": ratio})
    for count in NMS_COUNTS:
        boxes = max(1, round(count * given.scale))
        for clustered in (False, True):

            def make(boxes: int = boxes, clustered: bool = clustered) -> Case:
                return on(cases.suppression(boxes, clustered, given.size, seed), device)

            name = f"batched_nms {boxes} {'clustered' if clustered else 'uniform'}"
            peers = ("torchvision", "tv shifted", "tv by class")
            yield Goal(name, make, "fp32", 1, None, 0.0, 0.0, dict.fromkeys(peers, 3.0))
    yield Goal("decode", partial(everywhere, many, device), "bf16", batch, boxes_of, 1.2)


def postprocess(scene: inputs.Scene, device: str) -> Case:
    return cases.make("postprocess", scene, torch.float32, device)[0]


def scores_of(case: Case) -> int:
    return nbytes(case.inputs["cls_scores"])


def boxes_of(case: Case) -> int:
    return nbytes(case.inputs) + 16 * len(case.inputs["pred"])


def replayed(run: Run, machine: Machine, clock: Clock, rounds: int) -> tuple[float | None, str]:
    """Microseconds of one forward and backward as the device sees them, or why there is no figure."""
    if not machine.cuda:
        run.prepare()
        return 1e6 * statistics.median([sum(machine.time(run.steps())) for _ in range(3)]), ""

    def step() -> None:
        run.prepare()
        for part in run.steps():
            part()

    try:
        with torch.set_grad_enabled(bool(run.case.gradients)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, f"it can't be captured: {str(error).splitlines()[0][:120]}"
    # Replays follow one another without a gap, ten between two events: what surrounds a single one would count too.
    times = []
    for _ in range(max(rounds, 3)):
        if clock.used > 0.97 and len(times) >= 3:
            break
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        machine.flush()
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 100.0)
    return statistics.median(times), ""


def judge(
    goal: Goal, case: Case, results: list[Result], machine: Machine, clock: Clock, rounds: int
) -> Iterator[Reached]:
    found = {r.provider: r for r in results}
    native = found.get("native")
    why = "" if native is None or native.status == "timed" else native.reason
    got = None
    if native is not None and native.status == "timed":
        run = Run(case, case.ours, "native", case.inputs)
        with gfl_ops.set_backend("native"):
            got, why = replayed(run, machine, clock, rounds)
        if got is None and native.total is not None:
            got, why = 1e3 * native.total.median, f"{why}; timed outside a graph"
    floor = 0.0 if goal.moved is None else 1e6 * goal.moved(case) / machine.bandwidth
    if goal.moved is not None or goal.extra:
        yield Reached(goal.name, "", goal.times * floor + goal.extra, got, why)
    for provider, want in goal.ratios.items():
        theirs = found.get(provider)
        other = theirs.total.median if theirs is not None and theirs.total is not None else None
        said = "; ".join(filter(None, (why, theirs.reason if theirs is not None else "")))
        yield Reached(goal.name, provider, want, 1e3 * other / got if other and got else None, said)


def host_time(device: str, seed: int) -> Iterator[Reached]:
    """Microseconds of the host for a small call, without a graph: the median over batches of calls."""
    draw = torch.Generator().manual_seed(seed)
    pred = torch.randn((CALL_ROWS, 80), generator=draw).to(device).requires_grad_()
    label = torch.randint(0, 81, (CALL_ROWS,), generator=draw).to(device)
    score = torch.rand(CALL_ROWS, generator=draw).to(device)

    def forward() -> Tensor:
        return gfl_ops.quality_focal_loss(pred, (label, score), avg_factor=3.0)

    def alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward(), pred)

    for name, call, want in (("forward", alone, 15.0), ("forward+backward", both, 60.0)):
        times = []
        for turn in range(12):
            begin = time.perf_counter()
            for _ in range(100):
                call()
            if turn > 1:
                times.append((time.perf_counter() - begin) * 1e4)
            if device == "cuda":
                torch.cuda.synchronize()
        yield Reached(f"one call: {name}", "", want, statistics.median(times))


def table(lines: list[Reached]) -> str:
    said = [f"{'goal':<38}{'against':<14}{'got':>11}{'goal':>11}", "=" * report.WIDTH]
    for r in lines:
        unit, sign = ("×", "≥") if r.provider else ("µs", "≤")
        got = "-" if r.got is None else f"{r.got:.1f} {unit}"
        said.append(f"{r.goal:<38}{r.provider or 'the limit':<14}{got:>11}{f'{sign} {r.want:.1f} {unit}':>14}")
        if r.verdict != "reached" or r.why:
            said.append(f"    {r.verdict}{': ' if r.why else ''}{r.why}"[: report.WIDTH])
    reached = sum(r.verdict == "reached" for r in lines)
    return "\n".join([*said, "", f"{reached} of {len(lines)} reached"])


def run(given: argparse.Namespace) -> tuple[list[Result], list[Reached], Machine]:
    clock = Clock(given.limit)
    machine = Machine(given.device)
    bench = Bench(machine, clock, given.rounds, given.seconds)
    results: list[Result] = []
    lines: list[Reached] = []
    wanted = tuple(given.goals or ("",))
    print(report.head(machine, ["The goals' table below counts the device's time in a graph."]), flush=True)
    if any("one call".startswith(w) or w.startswith("one call") for w in wanted):
        with gfl_ops.set_backend("auto"):
            lines += host_time(given.device, given.seed)
    for goal in goals(given):
        if not goal.name.startswith(wanted):
            continue
        case = replace(goal.make(), name=goal.name)
        print("\n" + report.section(goal.dtype, goal.batch, machine), flush=True)
        got = bench.run(case, goal.dtype, goal.batch, (*goal.ratios, "native"), not given.no_compile)
        results += got
        lines += judge(goal, case, got, machine, clock, given.rounds)
        print(report.block(got), flush=True)
    return results, lines, machine


def main() -> int:
    given = arguments()
    results, lines, machine = run(given)
    print("\n" + "\n".join(textwrap.wrap(report.quiet(machine), report.WIDTH)))
    # The table comes last: the suite keeps the end of what is printed.
    print("\nours against the goals\n" + table(lines))
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "bench_gpu.json"
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    report.write_json(path, results, machine, settings)
    record = json.loads(path.read_text())
    record["goals"] = [dataclasses.asdict(r) | {"verdict": r.verdict} for r in lines]
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 1 if any(report.is_ours(r.provider) and r.status in ("wrong", "failed") for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
