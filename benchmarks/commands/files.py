# SPDX-License-Identifier: Apache-2.0
"""Time gfl.Detector from JPEG files to boxes, in images per second, after checking
that batches of files give what the files give one by one.

  reading    the files decoded one after another, in one thread: what the detector
             can't exceed unless it reads several at once
  optimized  gfl.Detector(..., optimize=True) over the list of files

The files are the photos of the real data, or drawn ones of the same sizes where
there are none; weights are random, with as many candidates as a trained network
has. A run goes over all files, some seconds long on a CPU.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from PIL import Image

import gfl
import report
from clock import Budget, Machine
from detectors import prepare
from gfl.config import PRESETS
from gfl.data import transforms
from harness import DTYPES, Bench, Result

from .detectors import DEFAULTS, Step

COUNT = 47
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (500, 375))  # COCO's most frequent
# Boxes that stay in one of the two: scores next to a threshold round differently in other batches.
DIFFERENT = 0.02


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", choices=PRESETS, metavar="NAME", help="a preset of gfl [gfl_r18_1x; on a GPU gfl_r50_1x]")
    add("--batch", type=int, metavar="N", help="images at a time [1; on a GPU 16]")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="precision [fp32; on a GPU bf16]")
    add("--images", type=int, default=COUNT, metavar="N", help="files at most [%(default)s]")
    parser.set_defaults(size=None, seconds=5.0, limit=600.0)


def photos(data: Path, folder: Path, count: int, seed: int) -> tuple[list[Path], str]:
    """At most `count` JPEG files of the real data, or as many drawn into `folder`; and what they are."""
    found = sorted((data / "coco_val2017_47" / "images").glob("*.jpg"))[:count]
    if found:
        return found, f"{len(found)} photos of COCO val2017"
    draw = torch.Generator().manual_seed(seed)
    for n in range(count):
        height, width = SIZES[n % len(SIZES)]
        # Detail at every scale, as a photo has it, so that decoding takes about as long.
        image = torch.full((1, 3, height, width), 128.0)
        for scale in (64, 16, 4, 1):
            coarse = torch.randn((1, 3, -(-height // scale), -(-width // scale)), generator=draw) * 4 * scale**0.5
            image += torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        pixels = image[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{n:03}.jpg", quality=90)
    return sorted(folder.glob("*.jpg")), f"{count} drawn images"


def differing(got: Sequence[gfl.detector.Result], want: Sequence[gfl.detector.Result]) -> float:
    """Share of the boxes by which the images' counts differ."""
    pairs = zip_longest(map(len, got), map(len, want), fillvalue=0)
    return sum(abs(a - b) for a, b in pairs) / max(sum(map(len, want)), 1)


def measure(bench: Bench, given: argparse.Namespace, files: Sequence[Path]) -> list[Result]:
    device = bench.machine.device
    models, size, batches, dtypes = DEFAULTS[device.type]
    name, size, batch = given.model or models[0], given.size or size, given.batch or batches[-1]
    dtype = given.dtype or dtypes[0]
    model, _ = prepare(name, size, device, given.seed)
    detector = gfl.Detector(model, device, DTYPES[dtype], batch_size=batch, optimize=True)

    def read() -> None:
        for path in files:
            transforms.read_image(path)

    def detect() -> None:
        list(detector.stream(files))

    runs = {
        provider: (Step(call), Result(name, "files to boxes", f"{size[0]}x{size[1]}", batch, dtype, provider))
        for provider, call in (("reading", read), ("optimized", detect))
    }
    few = files[: 2 * batch]
    error = differing(list(detector.stream(few)), [detector(path) for path in few])
    if runs["optimized"][1].check(error, DIFFERENT, "single files"):
        detect()  # a second time, when every batch shape has been met
        bench.time(runs)
    return [result for _, result in runs.values()]


def table(results: Sequence[Result], count: int) -> str:
    first = results[0]
    lines = [f"{first.stem}, {first.what}, {first.dtype}, batch {first.batch}: {count} files"]
    lines.append(f"{'':<11}{'img/s':>8}{'ms per image':>14}{'p20–p80':>16}")
    for r in results:
        if r.total is None:
            lines.append(f"{r.provider:<11} {r.status}: {r.reason}")
            continue
        median, p20, p80 = (value / count for value in (r.total.median, r.total.p20, r.total.p80))
        span = f"{report.ms(p20)}–{report.ms(p80)}"
        lines.append(f"{r.provider:<11}{1e3 / median:>8.4g}{report.ms(median):>14}{span:>16}")
    return "\n".join(lines)


def run(given: argparse.Namespace) -> int:
    machine = Machine(given.device, given.clock == "cpu")
    bench = Bench(machine, Budget(given.limit), given.rounds, given.seconds, slow=60.0, host_ahead=False)
    with tempfile.TemporaryDirectory(prefix="gfl-files-") as folder:
        files, source = photos(given.data, Path(folder), given.images, given.seed)
        print(report.stamped(f"{given.device}, {torch.get_num_threads()} threads; {source}"))
        results = measure(bench, given, files)
    print(f"\n{table(results, len(files))}\n\n{report.steadiness(machine)}")
    return report.finish(given, results, machine, extra={"files": len(files)})
