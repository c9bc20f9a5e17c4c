# SPDX-License-Identifier: Apache-2.0
"""Time whole detectors from images to boxes, and their parts, beside the same
networks in plain eager PyTorch, after checking that the maps of both agree.

All ways take uint8 images from memory and bring boxes back; they take turns, with
random weights that give as many candidates as a trained network.
  plain      the network as it is written, NCHW, autocast for half precision;
             mmdet's steps around torchvision's NMS (ours, which is quicker, where
             torchvision is not installed)
  optimized  what gfl.Detector(..., optimize=True) runs: norms folded, few calls;
             on a GPU one CUDA graph
  compiled   the same by torch.compile, with --compile
`floor` is the time that the operations of the direct convolutions take at the rate
of large matrix products, measured here, as a share of the run's; above 100 % where
fewer operations were done. Then come the shares of input (normalising), backbone,
neck, head and boxes, each timed by itself; on a GPU as a graph. MB is the peak of
what a run allocates.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import report
from clock import Budget, Machine
from detectors import PARTS, Optimized, Plain, Way, count_flops, differences, prepare
from gfl.config import PRESETS
from gfl.engine.graphs import Graph
from harness import DTYPES, Bench, Case, Result, Run

PLAIN, OURS, COMPILED = "plain", "optimized", "compiled"
WHOLE = "images to boxes"
NETWORK = ("backbone", "neck", "head")
ALL = "all"
# Models, size and batches per device where none are given.
DEFAULTS = {
    "cpu": (["gfl_r18_1x"], (320, 320), [1], ["fp32"]),
    "cuda": (["gfl_r50_1x"], (800, 1344), [1, 16], ["bf16"]),
}
# Greatest difference of the maps from the plain network's, as a share of their greatest value. fp32: Winograd, TF32 on
# a GPU; half precision: both round, each elsewhere.
TOLERANCE = {"fp32": 1e-2, "fp16": 5e-2, "bf16": 2e-1}


class Step(Run):
    """One call without gradients, as the harness runs it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(Case("", "", "", {}, call), call, "auto", {})


def configure(parser: argparse.ArgumentParser) -> None:
    names, dtypes = (*PRESETS, ALL), ("fp32", "bf16", "fp16", ALL)
    add = parser.add_argument
    add("--models", nargs="+", choices=names, metavar="NAME", help=f"presets of gfl, or {ALL} [gfl_r18_1x; GPU: r50]")
    add("--batch", nargs="+", type=int, metavar="N", help="images at a time [1; on a GPU 1 16]")
    add("--dtypes", nargs="+", choices=dtypes, metavar="T", help=f"fp32, bf16, fp16 or {ALL} [fp32; on a GPU bf16]")
    add("--compile", action="store_true", help="time torch.compile too: minutes per case")
    parser.set_defaults(size=None, seconds=3.0, limit=3600.0)


def peak_rate(machine: Machine, dtype: torch.dtype) -> float:
    """Operations per second in products of large matrices."""
    n = 8192 if machine.cuda else 768
    a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))
    times = [machine.time([lambda: torch.mm(a, b)], flush=False)[0] for _ in range(9)]
    return 2 * n**3 / statistics.median(times[2:])


def measure(
    bench: Bench, name: str, size: tuple[int, int], batch: int, dtype: str, rate: float, compile: bool, seed: int
) -> list[Result]:
    """Check, then time all ways to run a detector; `rate` is in operations per second.

    Raises:
        RuntimeError: maps differ by more than `TOLERANCE`; a preset's needs are not installed.
    """
    device, kind = bench.machine.device, DTYPES[dtype]
    model, image = prepare(name, size, device, seed)
    images = [image.roll(n, 2) for n in range(batch)]
    ways: dict[str, Way] = {PLAIN: Plain(model, device, size, kind)}
    ways[OURS] = Optimized(model, device, size, kind, batch)
    if compile:
        ways[COMPILED] = Optimized(model, device, size, kind, batch, compile=True)
    stacked = torch.stack(images)
    errors = differences(list(ways.values()), stacked)
    if max(errors) > TOLERANCE[dtype]:
        raise RuntimeError(f"{name}: maps differ by {max(errors):.1e}, {TOLERANCE[dtype]:.0e} is allowed")

    def result(part: str, way: str) -> Result:
        return Result(name, part, f"{size[0]}x{size[1]}", batch, dtype, way)

    runs = {key: (Step(lambda way=way: way.detect(images)), result(WHOLE, key)) for key, way in ways.items()}
    bench.time(runs)
    floor = batch * count_flops(name, *size) * 1e9 / rate
    results = [of_way for _, of_way in runs.values()]
    for of_way, error in zip(results, errors):
        of_way.error = error
        of_way.floor_share = 1e3 * floor / of_way.total.median if of_way.total else None
    parts_bench = Bench(bench.machine, bench.budget, bench.rounds, bench.seconds / 4, bench.slow)
    with torch.no_grad():
        for steps in zip(*(way.parts(stacked) for way in ways.values())):
            part_runs = {}
            for key, (part, step) in zip(ways, steps):
                graphed = bench.machine.cuda and key != PLAIN
                part_runs[key] = (Step(Graph(step, device=device) if graphed else step), result(part, key))
            parts_bench.time(part_runs)
            results += [of_part for _, of_part in part_runs.values()]
    return results


def table(results: Sequence[Result], gflop: float, rate: float) -> str:
    """One case in lines of 80 columns at most."""
    whole = [r for r in results if r.name == WHOLE]
    first = whole[0]
    floor = 1e3 * first.batch * gflop * 1e9 / rate
    widths = {part: max(6, len(part) + 1) for part in PARTS}
    lines = [
        f"{first.stem}, {first.what}, {first.dtype}, batch {first.batch}",
        f"{gflop:.1f} GFLOP per image; {report.ms(floor)} ms per batch at {rate / 1e9:.3g} GFLOP/s, as matrix products",
        f"{'':<10}{'img/s':>7}{'ms':>7}{'p20–p80':>11}{'floor':>6}{'MB':>6}"
        + "".join(f"{part:>{width}}" for part, width in widths.items()),
    ]
    medians = {(r.name, r.provider): r.total.median for r in results if r.total}
    for r in whole:
        assert r.total is not None
        total = sum(medians[part, r.provider] for part in PARTS)
        line = f"{r.provider:<10}{1e3 * r.batch / r.total.median:>7.4g}{report.ms(r.total.median):>7}"
        line += f"{report.ms(r.total.p20) + '–' + report.ms(r.total.p80):>11}{report.share(r.floor_share):>6}"
        line += f"{'-' if r.memory is None else f'{r.memory / 1e6:.0f}':>6}"
        lines.append(line + "".join(f"{report.share(medians[p, r.provider] / total):>{w}}" for p, w in widths.items()))
    for r in whole[1:]:
        networks = [sum(medians[part, way] for part in NETWORK) for way in (PLAIN, r.provider)]
        lines.append(
            f"{r.provider}: {medians[WHOLE, PLAIN] / medians[WHOLE, r.provider]:.2f} x plain end to end, "
            f"{networks[0] / networks[1]:.2f} x its network; maps within {r.error:.0e}"
        )
    return "\n".join(lines)


def run(given: argparse.Namespace) -> int:
    machine = Machine(given.device, given.clock == "cpu")
    # From call to result: launches count, as they do for a user.
    bench = Bench(machine, Budget(given.limit), given.rounds, given.seconds, slow=60.0, host_ahead=False)
    models, size, batches, dtypes = DEFAULTS[given.device]
    size, batches = given.size or size, given.batch or batches
    models = list(PRESETS) if ALL in (given.models or ()) else given.models or models
    dtypes = list(TOLERANCE) if ALL in (given.dtypes or ()) else given.dtypes or dtypes
    print(report.stamped(f"{given.device}, {torch.get_num_threads()} threads"))
    rates = {dtype: peak_rate(machine, DTYPES[dtype]) for dtype in dtypes}
    results: list[Result] = []
    for dtype, name, batch in itertools.product(dtypes, models, batches):
        try:
            got = measure(bench, name, size, batch, dtype, rates[dtype], given.compile, given.seed)
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
            results.append(Result(name, WHOLE, f"{size[0]}x{size[1]}", batch, dtype, OURS, "failed", why))
            print(f"\n{name}, {size[0]}x{size[1]}, {dtype}, batch {batch}: {why}")
            continue
        print("\n" + table(got, count_flops(name, *size), rates[dtype]), flush=True)
        results += got
    print("\n" + report.steadiness(machine))
    return report.finish(given, results, machine, plot=[replace(r, name=r.stem) for r in results if r.name == WHOLE])
