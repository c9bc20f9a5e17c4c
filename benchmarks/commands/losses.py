# SPDX-License-Identifier: Apache-2.0
"""Time every operator against what people use today, on real inputs, after
checking that all compute the same.

Inputs: a batch of 800×1344 images with COCO's boxes (or random boxes with COCO's
statistics), assigned by ATSS over five levels, 22 400 locations per image; random
logits with the statistics of a trained head's. Decoding, NMS and post-processing run on a trained
head's outputs where they are available. Providers:
  eager        mmdet's formulas in plain PyTorch; where there are none, this
               package's reference
  compiled     torch.compile of the best dense formula
  torchvision  where it is installed
  native       this package's compiled kernels
  triton       this package's Triton kernels (on a GPU)
  reference    this package's plain PyTorch
A provider that disagrees with the fp64 oracle is named and not timed. The columns
are explained above the table. Without --ops or --full those operators are timed
that users ask about first, in about five minutes on a CPU.
"""

from __future__ import annotations

import argparse

import cases
import inputs
import report
from clock import Budget, Machine
from gfl_ops.core.registry import SPECS
from harness import DTYPES, Bench, Result

PROVIDERS = tuple(report.COLOURS)
FIRST = ("qfl", "dfl_integral", "decode", "nms", "postprocess", "gfl_loss")  # what users ask about first


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = f"any of {', '.join(cases.order())}; default: {' '.join(FIRST)}"
    add("--ops", nargs="+", choices=sorted(SPECS), metavar="OP", help=known)
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="T", help="default: fp32 bf16 fp16; --full adds fp64")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="P", help="only these of the above")
    add("--batch", nargs="+", type=int, metavar="N", help="images; default: 2 on a CPU, 2 and 16 on a GPU")
    add("--full", action="store_true", help="every operator, fp64, torch.compile for every size; takes far longer")
    parser.set_defaults(limit=290.0)


def measure(given: argparse.Namespace) -> tuple[list[Result], Machine]:
    """All cases, the widest dtype and the largest batch first, since time may run out."""
    ops = given.ops or (cases.order() if given.full else FIRST)
    dtypes = given.dtypes or [*list(DTYPES)[:3], *(["fp64"] if given.full else [])]
    batches = given.batch or ([2] if given.device == "cpu" else [2, 16])
    budget, machine = Budget(given.limit), Machine(given.device, given.clock == "cpu")
    scenes = {b: inputs.make_scene(b, given.size, given.data, given.seed) for b in sorted(batches, reverse=True)}
    scene = next(iter(scenes.values()))
    line = (
        f"{given.size[0]}×{given.size[1]}, {scene.labels.shape[1]} locations per image, {scene.boxes_from}; "
        f"decode and NMS: {scene.trained.source}"
    )
    others = [] if given.ops or given.full else ["Other operators: --ops or --full."]
    print(report.head(machine, [line, *others]), flush=True)
    bench = Bench(machine, budget, given.rounds, given.seconds)
    results: list[Result] = []
    for batch, scene in scenes.items():
        for dtype in dtypes:
            compiled = given.full or batch == max(scenes)  # on a CPU a compilation takes ten seconds or more
            print("\n" + report.section(dtype, batch, machine), flush=True)
            for stem in cases.order():
                if stem not in ops or DTYPES[dtype] not in SPECS[stem].dtypes:
                    continue
                if budget.used > 0.95:
                    why = "no time left (--limit)"
                    results.append(Result(stem, stem, "", batch, dtype, "all", "skipped", why))
                    continue
                for case in cases.make(stem, scene, DTYPES[dtype], given.device):
                    got = bench.run(case, dtype, batch, given.providers or (), compiled)
                    results += got
                    if got:
                        print("\n" + report.block(got), flush=True)
    return results, machine


def run(given: argparse.Namespace) -> int:
    results, machine = measure(given)
    print("\n" + report.summary(results, machine))
    return report.finish(given, results, machine, plot=results)
