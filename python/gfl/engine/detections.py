# SPDX-License-Identifier: Apache-2.0
"""What `gfl detect` writes: lines of JSON as results come, pictures, crops and texts, and one file in COCO's format."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .. import files
from ..result import Result
from ..sources import Named, Source, Unread

PROGRAM = "gfl detect"
ANNOTATIONS, LINES = "detections.json", "detections.jsonl"
LABELS, CROPS = "labels", "crops"
MAX_NAME = 100


def lines_file(out: Path, rank: int) -> Path:
    """The lines of a process; the first one's have no number."""
    return out / (LINES if rank == 0 else f"detections-{rank}.jsonl")


def safe_name(text: str) -> str:
    """A text of any origin as the name of a file, which leads to no other folder."""
    name = re.sub(r"[^\w.() +-]+|\.{2,}", "_", text).strip(". ")
    return name[:MAX_NAME] or "image"


def stem(source: Source) -> str:
    """What an image's pictures are called, without a suffix."""
    if isinstance(source, Unread) and source.path is not None:
        return source.path.stem or "image"
    if isinstance(source, Unread):
        return safe_name(Path(unquote(urlsplit(str(source.place)).path)).stem)
    if isinstance(source, Named):
        video, _, number = source.name.rpartition("#")
        return safe_name(f"{Path(video).stem}-{int(number):06}" if number.isdecimal() and video else source.name)
    return "image"


class Names:
    """Names of pictures that no two images and no other file in the folder share; the same in every process."""

    def __init__(self, out: Path) -> None:
        earlier = _earlier_pictures(out / ANNOTATIONS)
        there = (name for name in (os.listdir(out) if out.is_dir() else ()) if name not in earlier)
        self._used = {name.casefold() for name in there}

    def __call__(self, wanted: str) -> str:
        for number in itertools.count(1):
            name = wanted if number == 1 else f"{wanted}-{number}"
            both = {picture.casefold() for picture in pictures(name)}
            if not self._used & both:
                self._used |= both
                return name
        raise AssertionError


def pictures(name: str) -> tuple[str, str]:
    """The detections and the best one's distributions."""
    return f"{name}.jpg", f"{name}.edges.png"


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


def line(index: int, result: Result, name: str) -> dict[str, Any]:
    """What is kept of an image: numbered `index` among all of this run."""
    height, width = result.size
    times = {key: round(1000 * value, 2) for key, value in result.times._asdict().items()}
    image = {"file_name": result.source, "height": height, "width": width, "milliseconds": times}
    found = []
    for one in result.to_coco(0):
        box = one["bbox"]
        found.append({"category_id": one["category_id"], "bbox": box, "score": one["score"], "area": box[2] * box[3]})
    return {"index": index, "image": image, "annotations": found, "name": name}


def write_extras(
    out: Path, result: Result, name: str, score: float, *, picture: bool, edges: bool, text: bool, crops: bool
) -> list[str]:
    """Writes what was asked for; returns what could not be written, since the detections are kept already."""
    jobs: dict[Path, Callable[[Path], object]] = {}
    drawn, distributions = (out / file for file in pictures(name))
    if picture:
        jobs[drawn] = lambda part: result.draw(score).save(part, quality=92)
    if edges and len(result):
        jobs[distributions] = lambda part: result.draw_edges(0).save(part)
    if text:
        jobs[out / LABELS / f"{name}.txt"] = lambda part: part.write_text(yolo_text(result))
    if crops and len(result):
        image = result.image()
        for number, one in enumerate(result, 1):
            box = tuple(map(round, one.box))
            if box[2] > box[0] and box[3] > box[1]:
                file = out / CROPS / safe_name(one.name) / f"{name}-{number}.jpg"
                jobs[file] = lambda part, box=box: image.crop(box).save(part, quality=92)  # type: ignore[misc]
    failed = []
    for file, write in jobs.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(file) as part:
                write(part)
        except (OSError, ValueError) as error:
            failed.append(f"{file} is not written: {files.reason(error)}")
    return failed


def yolo_text(result: Result) -> str:
    """A line per object: label, centre x and y, width and height as shares of the image, score."""
    height, width = result.size
    rows = []
    for (x1, y1, x2, y2), score, label, _ in result:
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        rows.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n")
    return "".join(rows)


def merge(out: Path, world: int, categories: list[dict[str, Any]], with_pictures: bool) -> tuple[int, int]:
    """Writes all processes' lines as one file in COCO's format, an image at a time; the numbers of images and boxes."""
    parts = [lines_file(out, rank) for rank in range(world)]

    def entries() -> Iterator[dict[str, Any]]:
        return heapq.merge(*map(_read, parts), key=lambda entry: entry["index"])

    def images() -> Iterator[dict[str, Any]]:
        return ({"id": number, **entry["image"]} for number, entry in enumerate(entries(), 1))

    def boxes() -> Iterator[dict[str, Any]]:
        number = itertools.count(1)
        for image, entry in enumerate(entries(), 1):
            for one in entry["annotations"]:
                yield {"id": next(number), "image_id": image, **one, "iscrowd": 0}

    named = (picture for entry in entries() if with_pictures for picture in pictures(entry["name"]))
    counts = []
    with files.replacing(out / ANNOTATIONS) as part, part.open("w", encoding="ascii") as file:
        file.write(f'{{"info": {{"description": {json.dumps(PROGRAM)}, "pictures": ')
        _write_list(file, named)
        file.write('}, "images": ')
        counts.append(_write_list(file, images()))
        file.write(',\n"annotations": ')
        counts.append(_write_list(file, boxes()))
        file.write(f',\n"categories": {json.dumps(categories)}}}\n')
    for path in parts[1:]:  # Their lines are in the one file now.
        path.unlink(missing_ok=True)
    return counts[0], counts[1]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="ascii") as file:
        yield from map(json.loads, file)


def _write_list(file: Any, items: Iterable[Any]) -> int:
    count = 0
    file.write("[")
    for count, item in enumerate(items, 1):
        file.write(("" if count == 1 else ",\n") + json.dumps(item))
    file.write("]")
    return count
