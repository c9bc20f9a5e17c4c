# SPDX-License-Identifier: Apache-2.0
"""Time every operator against what people use today, on real inputs, after
checking that all compute the same.

Inputs: a batch of 800×1344 images with COCO's boxes (or boxes drawn with COCO's
statistics), assigned by ATSS over five levels, 22 400 locations an image; logits
drawn like a trained head's. Decoding, NMS and post-processing run on a trained
head's outputs where they are there. Providers:
  eager        mmdet's formulas in plain PyTorch
  compiled     torch.compile of the best dense formula
  torchvision  where it is installed
  native       this package's compiled kernels
  triton       this package's Triton kernels (on a GPU)
  reference    this package's plain PyTorch
A provider that disagrees with the fp64 oracle is named and not timed. What the
columns mean is printed above the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# libkineto, by which memory and launches are counted, would print a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import torch

import cases
import inputs
import report
from gfl_ops.core.registry import SPECS
from harness import DTYPES, Bench, Clock, Machine, Result

PROVIDERS = tuple(report.COLOURS)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ops", nargs="+", choices=sorted(SPECS), metavar="OP", help=f"only these: {', '.join(cases.order())}")
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="T", help="default: fp32 bf16 fp16; --full adds fp64")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="P", help="only these of the above")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where torch can use a GPU, else cpu")
    add("--batch", nargs="+", type=int, metavar="N", help="images; default: 2 on a CPU, 2 and 16 on a GPU")
    add("--size", type=size, default=(800, 1344), metavar="HxW", help="of an image (default 800x1344)")
    add("--data", type=Path, default=inputs.DATA, help="folder of real data (default: GFL_TEST_DATA or %(default)s)")
    add("--out", type=Path, default=Path("out/bench_losses"), help="folder for JSON and plot (default %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of all threads")
    add("--rounds", type=int, default=30, help="turns a provider at most (default %(default)s)")
    add("--seconds", type=float, default=1.0, help="aimed at a case (default %(default)s)")
    add("--limit", type=float, default=240.0, metavar="S", help="seconds for everything; then it stops (default 240)")
    add("--full", action="store_true", help="torch.compile for every dtype and size, and fp64; takes far longer")
    add("--seed", type=int, default=0, help="of what is drawn (default 0)")
    given = parser.parse_args(words)
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given.dtypes = given.dtypes or [*list(DTYPES)[:3], *(["fp64"] if given.full else [])]
    given.batch = given.batch or ([2] if given.device == "cpu" else [2, 16])
    return given


def size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


def run(given: argparse.Namespace) -> tuple[list[Result], Machine]:
    """All cases, the widest dtype and the largest batch first, since time may run out."""
    clock = Clock(given.limit)
    machine = Machine(given.device, given.clock == "cpu")
    scenes = {b: inputs.make_scene(b, given.size, given.data, given.seed) for b in sorted(given.batch, reverse=True)}
    scene = next(iter(scenes.values()))
    said = [
        f"{given.size[0]}×{given.size[1]}, {scene.labels.shape[1]} locations an image, {scene.boxes_from}; "
        f"decode and NMS: {scene.trained.source}"
    ]
    print(report.head(machine, said), flush=True)
    bench = Bench(machine, clock, given.rounds, given.seconds)
    results: list[Result] = []
    for batch, scene in scenes.items():
        for dtype in given.dtypes:
            # On a CPU a compilation takes ten seconds or more.
            compiled = given.full or (batch == max(scenes) and (machine.cuda or dtype == "fp32"))
            print("\n" + report.section(dtype, batch, machine), flush=True)
            for stem, spec in ((s, SPECS[s]) for s in cases.order()):
                if (given.ops and stem not in given.ops) or DTYPES[dtype] not in spec.dtypes:
                    continue
                if clock.used > 0.95:
                    results.append(out_of_time(stem, batch, dtype))
                    continue
                for case in cases.make(stem, scene, DTYPES[dtype], given.device):
                    got = bench.run(case, dtype, batch, given.providers or (), compiled)
                    results += got
                    if got:
                        print("\n" + report.block(got), flush=True)
    return results, machine


def out_of_time(stem: str, batch: int, dtype: str) -> Result:
    return Result(stem, stem, "", batch, dtype, "all", "skipped", "no time left (--limit)")


def main() -> int:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    results, machine = run(given)
    print("\n" + report.summary(results, machine))
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    settings["threads"] = torch.get_num_threads()
    report.write_json(given.out / "bench_losses.json", results, machine, settings)
    trouble = report.plot(given.out / "bench_losses.png", results, machine)
    written = f"\nwritten: {given.out / 'bench_losses.json'}"
    print(f"{written}; {trouble}" if trouble else f"{written}, {given.out / 'bench_losses.png'}")
    ours = [r for r in results if report.is_ours(r.provider) and r.status in ("wrong", "failed")]
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
