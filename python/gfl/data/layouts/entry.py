# SPDX-License-Identifier: Apache-2.0
"""What every format is read into: images by the names that the format gives them, with boxes in a format's own unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..problems import Problems
from ..values import number


class Object(NamedTuple):
    """A box as a format has it; what is no number is found out later."""

    label: Any  # a class's name, or its id where the format lists its classes
    box: Any  # x, y, width, height
    unit: float = 0.0  # 0: pixels, else the value that stands for the whole width or height
    more: dict[str, Any] = {}  # noqa: RUF012  # never changed; iscrowd, ignore, area as COCO has them


@dataclass
class Entry:
    """An annotated image."""

    name: str | Path  # as the format writes it; a path if it is known
    near: Path  # the folder of the file that says so
    where: str  # the place in that file
    objects: list[Object]
    size: tuple[Any, Any] | None = None  # (height, width) where the format has them
    part: str | None = None  # train, val or test where the format says so
    id: Any = None


@dataclass
class Found:
    """A data set in one of the formats."""

    kind: str  # for people
    path: Path  # for people too: the file or folder that it was found by
    entries: Callable[[Problems], Iterable[Entry]]  # counts what is wrong in the files themselves
    # COCO's list, or None if the classes are the names in the boxes.
    categories: list[dict[str, Any]] | None = None
    problems: Problems = field(default_factory=Problems)


def floats(values: Iterable[Any]) -> list[Any]:
    """Numbers of texts; what is none stays as it is."""
    found = list(values)
    for i, value in enumerate(found):
        if isinstance(value, str):
            with suppress(ValueError):
                found[i] = float(value)
    return found


def of_corners(x1: Any, y1: Any, x2: Any, y2: Any) -> Any:
    """x, y, width, height of two opposite corners, in any order."""
    corners = floats((x1, y1, x2, y2))
    if not _numbers(corners):
        return corners
    x1, y1, x2, y2 = corners
    return [min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)]


def of_centre(x: Any, y: Any, width: Any, height: Any) -> Any:
    """x, y, width, height of a box by its centre."""
    box = floats((x, y, width, height))
    return [box[0] - box[2] / 2, box[1] - box[3] / 2, *box[2:]] if _numbers(box) else box


def of_points(points: Iterable[Sequence[Any]]) -> Any:
    """x, y, width, height around points."""
    try:
        xs, ys = zip(*((float(x), float(y)) for x, y in points))
        return of_corners(min(xs), min(ys), max(xs), max(ys))
    except (TypeError, ValueError, OverflowError):
        return None


def turned(box: Any, degrees: Any, centre: bool) -> Any:
    """x, y, width, height around a box that is turned clockwise about its centre or its first corner."""
    angle = floats([degrees or 0])[0]
    if not _numbers([*box, angle]) or angle % 360 == 0:
        return box
    x, y, width, height = box
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    ox, oy = (x + width / 2, y + height / 2) if centre else (x, y)
    corners = [(a - ox, b - oy) for a in (x, x + width) for b in (y, y + height)]
    return of_points([(ox + a * cosine - b * sine, oy + a * sine + b * cosine) for a, b in corners])


def _numbers(values: Iterable[Any]) -> bool:
    return all(number(value) is not None for value in values)


def one_by_one(paths: Iterable[Path], read: Callable[[Path], Entry | None], problems: Problems) -> Iterator[Entry]:
    """The entries of files with one image each; a file that can't be read costs its image, with a count."""
    for path in paths:
        try:
            entry = read(path)
        except (OSError, ValueError) as error:
            problems.note("annotation files that can't be read, left out", error)
        else:
            if entry is not None:
                yield entry
