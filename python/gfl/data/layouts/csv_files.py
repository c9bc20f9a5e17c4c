# SPDX-License-Identifier: Apache-2.0
"""CSV with a box per row: Roboflow's and TensorFlow's columns, OpenImages', RetinaNet's without a head line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ... import files
from ..problems import Problems
from ..transforms import IMAGE_SUFFIXES
from .entry import Entry, Found, Object, floats, of_corners
from .folder import Folder, part_of

# What a column is called, lower case, without what is no letter or digit.
COLUMNS = {
    "name": ("filename", "file", "image", "imagepath", "path", "img", "imageid", "imagename", "filepath", "imageurl"),
    "label": ("class", "label", "classname", "category", "labelname", "name", "categoryname"),
    "x1": ("xmin", "x1", "left", "xtl"),
    "y1": ("ymin", "y1", "top", "ytl"),
    "x2": ("xmax", "x2", "right", "xbr"),
    "y2": ("ymax", "y2", "bottom", "ybr"),
    "x": ("x", "bboxx", "xmin", "left"),
    "y": ("y", "bboxy", "ymin", "top"),
    "width": ("w", "width", "bboxwidth", "bboxw"),
    "height": ("h", "height", "bboxheight", "bboxh"),
    "part": ("split", "subset", "set", "part"),
}
RETINANET = ("name", "x1", "y1", "x2", "y2", "label")
LARGEST_FILE = 2**31


def find(folder: Folder) -> Found | None:
    """CSV files whose columns are known."""
    tables = {path: table for path in folder.of(".csv") if (table := _table(path)) is not None}
    return of_tables(tables, folder) if tables else None


def of_tables(tables: Mapping[Path, tuple[dict[str, int], list[list[str]]]], folder: Folder) -> Found:
    """Rows of files, grouped by their images."""

    def entries(problems: Problems) -> Iterator[Entry]:
        for path, (columns, rows) in tables.items():
            images: dict[str, Entry] = {}
            boxes = [_box(columns, row) for _, row in _numbered(rows)]
            sides = [side for box in boxes if isinstance(box, list) for side in box if isinstance(side, float)]
            unit = 1.0 if sides and max(sides) <= 1.0 else 0.0
            if unit:
                problems.note(
                    "boxes read as shares of their image, since no number in the file is above 1", path, len(boxes)
                )
            for (number, row), box in zip(_numbered(rows), boxes):
                where = f"{path}:{number}"
                if len(row) <= columns["name"] or not row[columns["name"]].strip():
                    problems.note("rows without an image, left out", where)
                    continue
                name = row[columns["name"]].strip()
                part = part_of([*folder.words(path), _cell(columns, row, "part")])
                entry = images.setdefault(name, Entry(name, path.parent, where, [], part=part))
                if box is not None:  # a row of an image without objects has empty cells
                    label = _cell(columns, row, "label") or None
                    entry.objects.append(Object(label, box, unit, {"where": where}))
            yield from images.values()

    return Found("CSV", next(iter(tables)), entries)


def _numbered(rows: Sequence[list[str]]) -> Iterator[tuple[int, list[str]]]:
    return ((number, row) for number, row in enumerate(rows, 1) if row and number)


def _cell(columns: Mapping[str, int], row: Sequence[str], key: str) -> str:
    place = columns.get(key, len(row))
    return row[place].strip() if place < len(row) else ""


def _box(columns: Mapping[str, int], row: Sequence[str]) -> list[float | str] | None:
    corners = "x1" in columns and "x2" in columns
    cells = [
        _cell(columns, row, key) for key in (("x1", "y1", "x2", "y2") if corners else ("x", "y", "width", "height"))
    ]
    if not any(cells):
        return None
    return of_corners(*cells) if corners else floats(cells)


def _table(path: Path) -> tuple[dict[str, int], list[list[str]]] | None:
    """Places of the columns and all rows; a head line is an empty row, so that numbers are those of the lines."""
    try:
        text = files.read_bytes(path, LARGEST_FILE).decode("utf-8-sig", "replace")
    except OSError:
        return None
    first = next(iter(text.splitlines()), "")
    delimiter = max(",;\t", key=first.count)
    rows = list(csv.reader(text.splitlines(), delimiter=delimiter))
    if not rows:
        return None
    head = ["".join(c for c in cell.lower() if c.isalnum()) for cell in rows[0]]
    columns = {
        key: next(head.index(name) for name in names if name in head)
        for key, names in COLUMNS.items()
        if any(name in head for name in names)
    }
    boxed = {"x1", "y1", "x2", "y2"} <= columns.keys() or {"x", "y", "width", "height"} <= columns.keys()
    if {"name", "label"} <= columns.keys() and boxed:
        return columns, [[], *rows[1:]]
    if len(rows[0]) == len(RETINANET) and Path(rows[0][0]).suffix.lower() in IMAGE_SUFFIXES:
        return {key: place for place, key in enumerate(RETINANET)}, rows
    return None
