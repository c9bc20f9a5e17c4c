# SPDX-License-Identifier: Apache-2.0
"""``gfl detect``: detections of a trained model, as pictures and as a COCO-format file."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..files import say
from . import DTYPES, add_config, check_kernels, given_config

if TYPE_CHECKING:
    from ..detector import Result

HELP = "detect objects in images: writes pictures and a COCO-format file"
ANNOTATIONS = "detections.json"
PARTIAL = "detections.partial.jsonl"
PROGRAM = "gfl detect"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl detect CHECKPOINT IMAGE [IMAGE …] [option …]"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained model: this package's, mmdet's or GFocal's")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or quoted glob patterns")
    add_config(parser)
    parser.add_argument("--out", default="detections", metavar="DIR", help="folder to write to [%(default)s]")
    parser.add_argument("--score", type=float, default=0.3, metavar="X", help="min score of a detection [%(default)s]")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the network [%(default)s]")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per batch [1 on the CPU, 8 on a GPU]")
    parser.add_argument("--optimize", action="store_true", help="fold batch norms into convolutions: faster")
    parser.add_argument("--edges", action="store_true", help="also draw the best box's four distributions")


def run(options: argparse.Namespace) -> int:
    """Images that can't be read are reported and left out; the exit status is 1 only if none could be read."""
    import torch

    from ..detector import Detector, find_images
    from ..threads import MOST, cores, map_ahead

    # A file that is named is taken whatever its suffix.
    found = ([Path(given)] if Path(given).is_file() else find_images(given) for given in options.images)
    paths = [file for given in found for file in given]
    out = Path(options.out)
    for file in paths:
        if file.resolve().parent == out.resolve():
            raise ValueError(f"--out {out} is the folder of {file}: pictures would be written among the images")
    check_kernels(options.device)
    detector = Detector(
        options.checkpoint,
        options.device,
        getattr(torch, DTYPES[options.dtype]),
        score_threshold=options.score,
        batch_size=options.batch_size,
        optimize=options.optimize,
        config=given_config(options),
    )
    out.mkdir(parents=True, exist_ok=True)
    earlier = _earlier_pictures(out / ANNOTATIONS)
    unreadable: list[str] = []

    def report(source: object, why: str) -> None:
        unreadable.append(why)
        say(why, sys.stderr)

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pictures: list[str] = []

    def write(named: tuple[str, Result]) -> tuple[str, Result, list[str]]:
        name, result = named
        drawn = {f"{name}.jpg": lambda: result.draw(options.score)}
        if options.edges and len(result):
            drawn[f"{name}.edges.png"] = lambda: result.draw_edges(0)
        failed = []
        for picture, draw in drawn.items():
            try:
                with files.replacing(out / picture) as part:
                    draw().save(part, quality=92)  # of JPEG; PNG has none
            except (OSError, ValueError) as error:  # The detections are there; a picture is an extra.
                failed.append(f"{out / picture} is not written: {error}")
        return name, result, failed

    def named(results: Iterator[Result], add: Callable[[Any], None]) -> Iterator[tuple[str, Result]]:
        """Each result with a name for its pictures, when its detections are kept."""
        for result in results:
            height, width = result.size
            images.append({"id": len(images) + 1, "file_name": str(result.path), "height": height, "width": width})
            boxes: list[dict[str, Any]] = []
            for one in result.to_coco(len(images)):
                area = one["bbox"][2] * one["bbox"][3]
                boxes.append({"id": len(annotations) + len(boxes) + 1, **one, "area": area, "iscrowd": 0})
            annotations.extend(boxes)
            add({"image": images[-1], "annotations": boxes})
            name = _free_name(result.path.stem if result.path else "image", out, pictures, earlier)
            pictures.extend((f"{name}.jpg", f"{name}.edges.png"))
            yield name, result

    with files.locked(out), files.lines(out / PARTIAL) as add:
        results = detector.stream(paths, edges=options.edges, on_error=report, keep_pixels=True)
        # This thread keeps the detector busy.
        for name, result, failed in map_ahead(write, named(results, add), min(MOST, cores())):
            for text in failed:
                say(text, sys.stderr)
            labels = result.labels.tolist()
            counts = [f"{labels.count(c)} {detector.classes[c]}" for c in dict.fromkeys(labels)]
            say(f"{result.path}: {', '.join(counts) or 'nothing'} -> {out / name}.jpg")
        categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.classes)]
        info = {"description": PROGRAM, "pictures": pictures}
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        files.write_json(out / ANNOTATIONS, content)
    say(f"{len(annotations)} objects in {len(images)} images, {len(unreadable)} unreadable -> {out / ANNOTATIONS}")
    return 0 if images else 1


def _earlier_pictures(path: Path) -> set[str]:
    """The pictures of an earlier run, which this one may replace; ValueError if the file is not of such a run."""
    if not path.exists() and not path.is_symlink():
        return set()
    try:
        info = json.loads(files.read_bytes(path))["info"]
        if info["description"] == PROGRAM:
            return {str(name) for name in info["pictures"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{path} is there already and is not of `{PROGRAM}`: choose another --out")


def _free_name(stem: str, out: Path, taken: list[str], earlier: set[str]) -> str:
    """The name of an image's pictures, with a number where files of that name are not of an earlier run."""
    used = {name.casefold() for name in taken}
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        both = (f"{name}.jpg", f"{name}.edges.png")
        there = (picture in earlier or not os.path.lexists(out / picture) for picture in both)
        if not used & {picture.casefold() for picture in both} and all(there):
            return name
    raise AssertionError
