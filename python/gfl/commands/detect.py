# SPDX-License-Identifier: Apache-2.0
"""``gfl detect``: detections of a trained model, as pictures and as a COCO-format file."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import DTYPES

if TYPE_CHECKING:
    from ..detector import Result

HELP = "detect objects in images: writes pictures and a COCO-format file"
ANNOTATIONS = "detections.json"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "gfl detect CHECKPOINT IMAGE [IMAGE …] [option …]"
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="trained model: this package's, mmdet's or GFocal's")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or quoted glob patterns")
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
    files = [file for given in found for file in given]
    out = Path(options.out)
    for file in files:
        if file.resolve().parent == out.resolve():
            raise ValueError(f"--out {out} is the folder of {file}: pictures would be written among the images")
    detector = Detector(
        options.checkpoint,
        options.device,
        getattr(torch, DTYPES[options.dtype]),
        score_threshold=options.score,
        batch_size=options.batch_size,
        optimize=options.optimize,
    )
    out.mkdir(parents=True, exist_ok=True)
    unreadable: list[str] = []

    def report(source: object, why: str) -> None:
        unreadable.append(why)
        print(why, file=sys.stderr)

    def write(named: tuple[str, Result]) -> tuple[str, Result]:
        name, result = named
        result.draw(options.score).save(out / f"{name}.jpg", quality=92)
        if options.edges and len(result):
            result.draw_edges(0).save(out / f"{name}.edges.png")
        return named

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results = _named(detector.stream(files, edges=options.edges, on_error=report, keep_pixels=True))
    # This thread keeps the detector busy.
    for name, result in map_ahead(write, results, min(MOST, cores())):
        height, width = result.size
        images.append({"id": len(images) + 1, "file_name": str(result.path), "height": height, "width": width})
        for one in result.to_coco(len(images)):
            area = one["bbox"][2] * one["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **one, "area": area, "iscrowd": 0})
        counts = [f"{result.names.count(name)} {name}" for name in dict.fromkeys(result.names)]
        print(f"{result.path}: {', '.join(counts) or 'nothing'} -> {out / name}.jpg")
    categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / ANNOTATIONS).write_text(json.dumps(content))
    print(f"{len(annotations)} objects in {len(images)} images, {len(unreadable)} unreadable -> {out / ANNOTATIONS}")
    return 0 if images else 1


def _named(results: Iterator[Result]) -> Iterator[tuple[str, Result]]:
    """Each result with a name for its pictures; images of one name may come from several folders."""
    used: set[str] = set()
    for result in results:
        name = stem = result.path.stem if result.path else "image"
        numbers = itertools.count(2)
        while name in used:
            name = f"{stem}-{next(numbers)}"
        used.add(name)
        yield name, result
