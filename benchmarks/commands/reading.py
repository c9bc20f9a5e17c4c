# SPDX-License-Identifier: Apache-2.0
"""Time reading a training image, JPEG file to resized and mirrored pixels, on one
core by processor time, beside OpenCV's decode, resize and flip of the same files.

  gfl         gfl.data.transforms, with simplejpeg where that is installed
  pillow      the same without simplejpeg
  opencv      cv2.imread, cv2.resize, cv2.flip

Resized pixels are first compared with OpenCV's of the same decoded image: they may
differ by one level of 255. The files are those of `bench.py files`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import report
from clock import Budget, Machine
from gfl.data import transforms
from harness import Bench, Result

from .detectors import Step
from .files import COUNT, photos, table

SIDES = (800, 1333)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=COUNT, metavar="N", help="files at most [%(default)s]")
    parser.set_defaults(seconds=5.0, limit=300.0, threads=1, clock="cpu")


def read(path: Path) -> torch.Tensor:
    image = transforms.read_image(path)
    return transforms.resize(image, *transforms.keep_ratio_size(*image.shape[1:], *SIDES)).flip(2)


def by_pillow(path: Path) -> torch.Tensor:
    decoder, transforms.simplejpeg = transforms.simplejpeg, None
    try:
        return read(path)
    finally:
        transforms.simplejpeg = decoder


def providers() -> dict[str, Callable[[Path], Any]]:
    found: dict[str, Callable[[Path], Any]] = {"gfl": read} if transforms.simplejpeg is not None else {}
    found["pillow"] = by_pillow
    try:
        import cv2
    except ImportError:
        return found
    cv2.setNumThreads(1)

    def by_opencv(path: Path) -> Any:
        image = cv2.imread(str(path))
        height, width = transforms.keep_ratio_size(*image.shape[:2], *SIDES)
        return cv2.flip(cv2.resize(image, (width, height)), 1)

    return found | {"opencv": by_opencv}


def levels(paths: Sequence[Path]) -> int:
    """By how many levels resized images differ from OpenCV's; 0 where that is not installed."""
    try:
        import cv2
    except ImportError:
        return 0
    worst = 0
    for path in paths:
        image = transforms.read_image(path)
        height, width = transforms.keep_ratio_size(*image.shape[1:], *SIDES)
        theirs = torch.from_numpy(cv2.resize(image.permute(1, 2, 0).numpy(), (width, height))).permute(2, 0, 1)
        worst = max(worst, int((transforms.resize(image, height, width).int() - theirs.int()).abs().max()))
    return worst


def measure(bench: Bench, files: Sequence[Path]) -> list[Result]:
    def whole(call: Callable[[Path], Any]) -> Callable[[], None]:
        def run() -> None:
            for path in files:
                call(path)

        return run

    what = f"resized to {SIDES[0]}, mirrored"
    runs = {
        name: (Step(whole(call)), Result("reading", what, "", 1, "uint8", name)) for name, call in providers().items()
    }
    for _, result in runs.values():
        result.check(float(levels(files[:8])), 1.0, "OpenCV")
    bench.time(runs)
    return [result for _, result in runs.values()]


def run(given: argparse.Namespace) -> int:
    machine = Machine(given.device, given.clock == "cpu")
    bench = Bench(machine, Budget(given.limit), given.rounds, given.seconds, slow=60.0, host_ahead=False)
    with tempfile.TemporaryDirectory(prefix="gfl-reading-") as folder:
        files, source = photos(given.data, Path(folder), given.images, given.seed)
        print(report.stamped(f"{given.device}, {torch.get_num_threads()} threads; {source}"))
        results = measure(bench, files)
    print(f"\n{table(results, len(files))}\n\n{report.steadiness(machine)}")
    return report.finish(given, results, machine, extra={"files": len(files)})
