# SPDX-License-Identifier: Apache-2.0
"""What a data set holds, in lines of at most 80 columns and in a picture: classes, sizes, problems, duplicates."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import draw, files
from ..threads import MOST, cores, map_ahead
from .coco import Annotations
from .problems import Problems
from .subsets import class_counts
from .transforms import read_image

# The annotations of each part, and the folder of its images.
Parts = Mapping[str, tuple[Annotations, Path]]
WIDTH, NAME = 80, 26
# Side of the small pictures that images are compared by, and the most that those of one image differ: root mean square
# of levels of 0 to 255, as saving a JPEG again or resizing leaves it.
SMALL, SAME = 16, 4.0
SHEET, COLUMNS, CELL = 20, 5, 300


def class_table(parts: Parts) -> list[str]:
    """Images and boxes of each class in each part."""
    names = next(iter(parts.values()))[0].distinct_names()
    rows = [["class", *("images", "boxes") * len(parts)]]
    counts = [(_images_of(a), class_counts(a)) for a, _ in parts.values()]
    for label, name in enumerate(names):
        rows.append([name, *(str(of[label]) for pair in counts for of in pair)])
    whole = [(len(a.image_ids), len(a.boxes)) for a, _ in parts.values()]
    rows.append(["all", *(str(number) for pair in whole for number in pair)])
    room = max(8, min(NAME, max(len(row[0]) for row in rows)))
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(1, len(rows[0]))]
    head = "".join(part.rjust(a + b) for part, a, b in zip(parts, widths[::2], widths[1::2]))
    return [
        " " * room + head,
        *(_cut(row[0], room).ljust(room) + "".join(c.rjust(w) for c, w in zip(row[1:], widths)) for row in rows),
    ]


def size_lines(parts: Parts) -> list[str]:
    """The sizes of images and boxes, and the number of boxes per image, of all parts together."""
    annotations = [a for a, _ in parts.values()]
    sizes = torch.cat([a.sizes for a in annotations])
    boxes = torch.cat([a.boxes[:, 2:] for a in annotations])
    per_image = torch.cat([torch.bincount(a.rows, minlength=len(a.image_ids)) for a in annotations])
    lines = []
    for what, sides in (("width", sizes[:, 1]), ("height", sizes[:, 0])):
        middle = int(sides.double().median())
        lines.append(f"{what} of images: {int(sides.min())} to {int(sides.max())} pixels, median {middle}")
    empty = int((per_image == 0).sum())
    lines.append(
        f"boxes per image: {per_image.double().mean():.1f}, at most {int(per_image.max())}; none in {empty} images"
    )
    if len(boxes):
        sides = boxes.clamp(min=0).prod(1).sqrt()
        share = [int(((sides >= a) & (sides < b)).sum()) for a, b in ((0, 32), (32, 96), (96, math.inf))]
        low, middle, high = (round(float(side)) for side in (sides.min(), sides.median(), sides.max()))
        lines.append(f"boxes: side (root of the area) {low} to {high} pixels, median {middle}")
        lines.append(f"boxes: {share[0]} small (below 32), {share[1]} medium, {share[2]} large (from 96 on)")
    return lines


def duplicates(parts: Parts, problems: Problems) -> Iterator[tuple[str, str]]:
    """Pairs of images, of two parts or of one, that are the same or look the same in small; counts unreadable ones."""
    places = [(part, images / name) for part, (a, images) in parts.items() for name in a.file_names]

    reading = map_ahead(lambda place: _small(place[1]), places, min(cores(), MOST))
    found = list(tqdm(reading, "comparing", len(places), leave=False, disable=None))
    for (_, path), small in zip(places, found):
        if small is None:
            problems.note("images that can't be decoded", path)
    known = [(place, small) for place, small in zip(places, found) if small is not None]
    if not known:
        return
    small = torch.stack([one for _, one in known])
    for first in range(0, len(small), 1024):
        distance = torch.cdist(small[first : first + 1024], small) / math.sqrt(small.shape[1])
        for i, j in (distance < SAME).nonzero().tolist():
            if first + i < j:
                yield tuple(f"{path.name} ({part})" for part, path in (known[first + i][0], known[j][0]))  # type: ignore[misc]


def sheet(parts: Parts) -> Image.Image:
    """A picture of some images of each part with their boxes: of each class the image with most of its boxes."""
    sheets = []
    for part, (a, images) in parts.items():
        pictures = []
        for row in _typical(a, max(1, SHEET // len(parts))):
            try:
                pixels = read_image(images / a.file_names[row], tuple(a.sizes[row].tolist()))
            except (ValueError, OSError):
                continue
            photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            inside = a.rows == row
            corners = torch.cat([a.boxes[inside][:, :2], a.boxes[inside][:, :2] + a.boxes[inside][:, 2:]], 1)
            labels, scale = a.labels[inside].tolist(), CELL / max(photo.size)
            names = [a.classes[label] for label in labels]
            pictures.append(draw.draw_detections(photo, corners.tolist(), labels, names, scale=scale))
        if pictures:
            title = f"{part}: {len(pictures)} of {len(a.image_ids)} images"
            sheets.append(draw.contact_sheet(pictures, COLUMNS, title=title))
    if not sheets:
        raise ValueError("no image can be decoded: there is no picture")
    return draw.contact_sheet(sheets, 1)


def wrapped(lines: list[str]) -> list[str]:
    """Lines of problems in the width of a terminal."""
    return [
        part for line in lines for part in textwrap.wrap(line, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
    ]


def _images_of(a: Annotations) -> list[int]:
    """Images of each class."""
    pairs = torch.unique(torch.stack([a.labels, a.rows], 1), dim=0)
    return torch.bincount(pairs[:, 0], minlength=len(a.classes)).tolist()


def _typical(a: Annotations, number: int) -> list[int]:
    """Rows of images so that as many classes as possible are seen, then the first others."""
    chosen: dict[int, None] = {}
    for label in range(len(a.classes)):
        rows = a.rows[a.labels == label]
        if len(rows) and len(chosen) < number:
            chosen.setdefault(int(rows.mode().values))
    for row in range(len(a.image_ids)):
        if len(chosen) < number:
            chosen.setdefault(row)
    return sorted(chosen)


def _small(path: Path) -> Tensor | None:
    """fp32 of an image in `SMALL`×`SMALL` pixels, each the mean of its part of the image; None if it has none."""
    try:
        with files.open_regular(path) as file, Image.open(file) as photo:
            photo.draft("RGB", (8 * SMALL, 8 * SMALL))  # of a JPEG file as few pixels as will do
            small = photo.convert("RGB").resize((SMALL, SMALL), Image.Resampling.BOX)
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders raise many types on broken files.
        return None
    return torch.from_numpy(np.asarray(small, np.float32).reshape(-1))


def _cut(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"
