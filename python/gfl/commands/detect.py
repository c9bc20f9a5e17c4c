# SPDX-License-Identifier: Apache-2.0
"""``gfl detect``: detections of a trained model, as pictures and as a COCO-format file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..files import say
from . import DTYPES, add_config, check_kernels, given_config

if TYPE_CHECKING:
    from ..config import InferenceConfig
    from ..detector import Detector
    from ..engine.distributed import Process
    from ..result import Result
    from ..sources import Source, Sources

HELP = "detect objects in images and videos: pictures and JSON"
EPILOG = """\
SOURCE is an image, a folder, a quoted glob pattern, a URL, a video file, the
number of a camera, a stream (rtsp://…), or - for an image or names of images
on standard input; videos need OpenCV or PyAV (pip install 'gfl-ops[video]').

  gfl detect gfl_r50_1x photo.jpg
  gfl detect runs/mine/best.pt 'mine/images/*.jpg' --out found --crops
  torchrun --nproc-per-node 8 -m gfl.cli detect gfl_r101_2x folder --no-pictures

Each image becomes a line of detections.jsonl as soon as it is done, so a run
that is stopped leaves what it found; detections.json, in COCO's format, is
written at the end."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl detect MODEL SOURCE [SOURCE …] [option …]"
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("checkpoint", metavar="MODEL", help="published model (`gfl models`), or a checkpoint: ours, mmdet's, GFocal's")
    add("images", nargs="+", metavar="SOURCE", help="images, folders, patterns, URLs, videos, cameras, streams, -")
    add_config(parser)
    add("--out", default="detections", metavar="DIR", help="folder to write to [%(default)s]")
    add("--score", type=float, default=0.3, metavar="X", help="min score of a detection [%(default)s]")
    add("--size", metavar="N|NxM", help="short side, or short and max long side, that images are resized to, pixels")
    add("--iou", type=float, metavar="X", help="max overlap (IoU) of two boxes of a class")
    add("--max-detections", type=int, metavar="N", help="max detections per image")
    add("--classes", metavar="NAME,…", help="look for these classes alone, by name or number")
    add("--no-pictures", action="store_true", help="write no pictures")
    add("--edges", action="store_true", help="also draw the best box's four distributions")
    add("--save-txt", action="store_true", help="also write labels/NAME.txt: class, x, y, width, height, score")
    add("--crops", action="store_true", help="also write each object as crops/CLASS/NAME-N.jpg")
    add("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    add("--dtype", choices=DTYPES, default="fp32", help="precision of the network [%(default)s]")
    add("--batch-size", type=int, metavar="N", help="images per batch [1 on the CPU and for cameras, 8 on a GPU]")
    add("--optimize", action="store_true", help="fold batch norms into convolutions: faster")


def run(options: argparse.Namespace) -> int:
    """Images that can't be read are reported and left out; the exit status is 1 only if none could be read."""
    from ..engine.distributed import processes
    from ..sources import Sources

    sources = Sources(options.images)
    out = Path(options.out)
    for file in sources.paths:
        if file.resolve().parent == out.resolve():
            raise ValueError(f"--out {out} is the folder of {file}: pictures would be written among the images")
    check_kernels(options.device)
    with processes(options.device) as process:
        if process.world > 1 and (sources.live or "-" in options.images):
            raise ValueError("a camera, a stream and standard input can't be shared out: use one process")
        with ExitStack() as held:
            return _detect(options, sources, out, process, held)


def _detect(options: argparse.Namespace, sources: Sources, out: Path, process: Process, held: ExitStack) -> int:
    import torch

    from ..detector import Detector
    from ..engine import detections
    from ..threads import MOST, cores, map_ahead

    detector = Detector(
        options.checkpoint,
        str(process.device),
        getattr(torch, DTYPES[options.dtype]),
        score_threshold=options.score,
        batch_size=1 if sources.live and options.batch_size is None else options.batch_size,
        optimize=options.optimize,
        config=given_config(options),
    )
    detector.model.test = _settings(detector.model.test, options)
    if process.main:  # Not before the model is read, which may fail.
        held.enter_context(files.locked(out))
    names = detections.Names(out)
    process.wait()  # All have listed the folder before one writes to it.
    out.mkdir(parents=True, exist_ok=True)
    unreadable: list[str] = []
    pending: deque[tuple[int, Source, str]] = deque()  # what the detector has taken: number, source, name

    def own(all_of_them: Iterable[Source]) -> Iterator[Source]:
        for index, source in enumerate(all_of_them):
            name = names(detections.stem(source))
            if index % process.world == process.rank:
                pending.append((index, source, name))
                yield source

    def report(source: object, why: str) -> None:
        pending.remove(next(one for one in pending if one[1] is source))
        unreadable.append(why)
        say(why, sys.stderr)

    def kept(results: Iterator[Result], add: Any) -> Iterator[tuple[str, Result]]:
        for result in results:
            index, _, name = pending.popleft()
            add(detections.line(index, result, name))
            yield name, result

    extras = {"picture": not options.no_pictures, "edges": options.edges and not options.no_pictures}
    extras |= {"text": options.save_txt, "crops": options.crops}

    def write(named: tuple[str, Result]) -> tuple[str, Result, list[str]]:
        name, result = named
        return name, result, detections.write_extras(out, result, name, options.score, **extras)

    with files.lines(detections.lines_file(out, process.rank), keep=True) as add:
        results = detector.stream(
            own(sources),
            edges=options.edges,
            classes=_classes(options.classes, detector),
            on_error=report,
            keep_pixels=extras["picture"] or options.edges or options.crops,
        )
        # This thread keeps the detector busy.
        for name, result, failed in map_ahead(write, kept(results, add), min(MOST, cores())):
            for text in failed:
                say(text, sys.stderr)
            _report(result, out / f"{name}.jpg" if extras["picture"] else None)
    process.wait()
    if not process.main:
        return 0
    categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.classes)]
    images, boxes = detections.merge(out, process.world, categories, extras["picture"])
    say(f"{boxes} objects in {images} images, {len(unreadable)} unreadable -> {out / detections.ANNOTATIONS}")
    return 0 if images else 1


def _report(result: Result, picture: Path | None) -> None:
    counts = ", ".join(f"{number} {name}" for name, number in Counter(result.names).items())
    times = " + ".join(f"{1000 * seconds:.0f}" for seconds in result.times)
    shown = "" if picture is None else f" -> {picture}"
    say(f"{result.source}: {counts or 'nothing'} ({times} ms){shown}")


def _settings(test: InferenceConfig, options: argparse.Namespace) -> InferenceConfig:
    from ..config import replace

    fields: dict[str, Any] = {"iou_threshold": options.iou, "max_detections": options.max_detections}
    if options.size is not None:
        sides = [int(part) for part in options.size.lower().split("x") if part.isdecimal()]
        if len(sides) != options.size.lower().count("x") + 1 or not 1 <= len(sides) <= 2 or min(sides) < 1:
            raise ValueError(f"`--size` must be N or NxM pixels, as 640 or 640x1066, got {options.size!r}")
        fields["short_side"] = min(sides)
        # One number keeps the proportions of the model's own sides.
        fields["long_side"] = max(sides) if len(sides) == 2 else round(sides[0] * test.long_side / test.short_side)
    for name, limit in (("iou_threshold", 1.0), ("max_detections", None)):
        value = fields[name]
        if value is not None and not (value > 0 and (limit is None or value <= limit)):
            option = "--iou" if name == "iou_threshold" else "--max-detections"
            raise ValueError(f"`{option}` must be positive{' and at most 1' if limit else ''}, got {value}")
    return replace(dataclasses.replace(test), **{name: value for name, value in fields.items() if value is not None})


def _classes(text: str | None, detector: Detector) -> list[str | int] | None:
    if text is None:
        return None
    known = set(detector.classes)
    return [int(one) if one.isdecimal() and one not in known else one for one in map(str.strip, text.split(","))]
