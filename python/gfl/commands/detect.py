# SPDX-License-Identifier: Apache-2.0
"""``gfl detect``: pictures and a COCO-format file of what is found in photos."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..detector import Detector, find_images

HELP = "find objects in photos: pictures and a COCO-format file"
ANNOTATIONS = "detections.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="file of a trained model: this package's, mmdet's or GFocal's")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, folders or globs (quoted)")
    parser.add_argument("--out", default="detections", metavar="DIR", help="folder to write to [%(default)s]")
    parser.add_argument(
        "--score", type=float, default=0.3, metavar="X", help="lowest score that is drawn and written [%(default)s]"
    )
    parser.add_argument("--device", metavar="TEXT", help="cpu, cuda, cuda:1, … [the GPU if there is one]")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="precision of the network [%(default)s]")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time [1 on the CPU, 8 on a GPU]")
    parser.add_argument(
        "--optimize", action="store_true", help="fold the network's norms and run it with few calls: quicker"
    )
    parser.add_argument("--edges", action="store_true", help="draw the best box's four distributions, too")


def run(options: argparse.Namespace) -> int:
    """Photos that can't be read are reported and left out; the exit status is 1 only if none could be."""
    photos = [path for given in options.photos for path in _files(given)]
    out = Path(options.out)
    for photo in photos:
        if photo.resolve().parent == out.resolve():
            raise ValueError(f"--out {out} is the folder of {photo}: pictures would be written among the photos")
    detector = Detector(
        options.checkpoint,
        options.device,
        _DTYPES[options.dtype],
        score_threshold=options.score,
        batch_size=options.batch_size,
        optimize=options.optimize,
    )
    out.mkdir(parents=True, exist_ok=True)
    unread: list[str] = []

    def report(source: object, why: str) -> None:
        unread.append(why)
        print(why, file=sys.stderr)

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    used: set[str] = set()
    for result in detector.stream(photos, edges=options.edges, on_error=report):
        name = _unused(result.path.stem if result.path else "image", used)
        result.draw(options.score).save(out / f"{name}.jpg", quality=92)
        if options.edges and len(result):
            result.draw_edges(0).save(out / f"{name}.edges.png")
        images.append(
            {
                "id": len(images) + 1,
                "file_name": str(result.path),
                "height": result.size[0],
                "width": result.size[1],
            }
        )
        for one in result.to_coco(len(images)):
            area = one["bbox"][2] * one["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **one, "area": area, "iscrowd": 0})
        print(f"{result.path}: {_summary(result.names)} -> {out / name}.jpg")
    categories = [{"id": i, "name": name} for i, name in zip(detector.category_ids, detector.classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / ANNOTATIONS).write_text(json.dumps(content))
    print(f"{len(annotations)} objects in {len(images)} photos, {len(unread)} not readable -> {out / ANNOTATIONS}")
    return 0 if images else 1


def _files(given: str) -> list[Path]:
    # A file that is named is taken by whatever name; the detector says what is wrong with it.
    return [Path(given)] if Path(given).is_file() else find_images(given)


def _unused(stem: str, used: set[str]) -> str:
    """`stem`, or with a number for a second photo of that name."""
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name)
    return name


def _summary(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
