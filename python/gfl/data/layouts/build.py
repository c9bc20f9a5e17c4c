# SPDX-License-Identifier: Apache-2.0
"""From what a format says to `Annotations`: names become files, classes numbers, boxes pixels, each fault a count."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...threads import MOST, cores, map_ahead
from .. import values
from ..coco import MAX_SIDE, PLACE, Annotations, checked
from ..problems import Problems
from ..transforms import UnreadableImage, stored_size
from .entry import Entry, Found, Object
from .folder import Folder

Size = tuple[int, int]


def build(found: Found, folder: Folder, classes: Sequence[str] | None = None) -> dict[str, Annotations]:
    """The parts train, val and test of a data set, as far as it has them; images' names are relative to the folder.

    All parts have the same classes: those that the format lists, else `classes`, a model's, else the names in all
    boxes, sorted.

    Raises:
        ValueError: no image is left, with what was wrong with them.
    """
    problems = Problems(found.problems)
    entries = [(entry, path) for entry in found.entries(problems) if (path := _file(entry, folder, problems))]
    workers = min(cores(), MOST)
    sized = map_ahead(lambda pair: _size(*pair), entries, workers if workers > 1 else 0)
    kept: list[tuple[Entry, Path, Size]] = []
    for (entry, path), size in zip(entries, sized):
        if isinstance(size, str):
            problems.note(size, path)
        else:
            kept.append((entry, path, size))
    if not kept:
        said = "".join(f"\n  {line}" for line in problems.lines())
        raise ValueError(f"{found.path} ({found.kind}): no image is left{':' if said else ''}{said}")
    categories = found.categories
    if categories is None:
        categories = _named([entry for entry, _, _ in kept], classes)
    numbers = {one["name"]: one["id"] for one in categories} if found.categories is None else None
    parts: dict[str, dict[str, list[Any]]] = {}
    ids = [entry.id for entry, _, _ in kept]
    own = None not in ids and len({(entry.part, entry.id) for entry, _, _ in kept}) == len(kept)
    own = own and len(set(map(type, ids))) == 1
    numbered: dict[tuple[str, Path], int] = {}
    for entry, path, size in kept:
        part = entry.part or "train"
        content = parts.setdefault(part, {"images": [], "annotations": []})
        # Two entries of a format without ids, as rows of two tables, may be one image.
        new = own or (part, path) not in numbered
        image = entry.id if own else numbered.setdefault((part, path), len(numbered) + 1)
        if new:
            name = os.path.relpath(path, folder.root)
            content["images"].append({"id": image, "file_name": name, "height": size[0], "width": size[1]})
        content["annotations"] += [_annotation(one, image, size, numbers, entry.where) for one in entry.objects]
    results = {part: checked(found.path, content | {"categories": categories}) for part, content in parts.items()}
    next(iter(results.values())).problems.add(problems)
    for result in results.values():
        suspect(result)
    return results


def _file(entry: Entry, folder: Folder, problems: Problems) -> Path | None:
    path = entry.name if isinstance(entry.name, Path) else folder.image(entry.name, entry.near)
    if path is None:
        problems.note("images that are not there, left out", f"{entry.name} of {entry.where}")
    return path


def _size(entry: Entry, path: Path) -> Size | str:
    """(height, width) that the boxes refer to, or why the image is left out."""
    try:
        stored, upright = stored_size(path)
    except UnreadableImage:
        return "images that can't be decoded, left out"
    said = tuple(side for one in entry.size or () if (side := values.whole(one)) and 1 <= side <= MAX_SIDE)
    if said == upright or len(said) < 2:
        return upright
    if said == stored:
        return stored
    return "images of another size than their annotations say, left out"


def _named(entries: Iterable[Entry], classes: Sequence[str] | None) -> list[dict[str, Any]]:
    names = {_name(one.label) for entry in entries for one in entry.objects} - {None}
    found = list(classes) if classes is not None and names <= set(classes) else sorted(map(str, names), key=_natural)
    return [{"id": number, "name": name} for number, name in enumerate(found, 1)]


def _natural(name: str) -> tuple[str, int, str]:
    """So that class 10 comes after class 9."""
    digits = len(name) - len(name.rstrip("0123456789"))
    return name[: len(name) - digits], int(name[-digits:]) if digits else -1, name


def _name(label: Any) -> str | None:
    """A class's name; a number where the format has no names."""
    return label if isinstance(label, str) and label else f"class {label}" if isinstance(label, int) else None


def _annotation(one: Object, image: Any, size: Size, numbers: dict[str, int] | None, where: str) -> dict[str, Any]:
    box = one.box
    if one.unit and (shares := values.numbers(box, 4)):
        box = [share * side / one.unit for share, side in zip(shares, (size[1], size[0]) * 2)]
    category = one.label if numbers is None else numbers.get(_name(one.label) or "")
    more = dict(one.more)
    return {"image_id": image, "category_id": category, "bbox": box, PLACE: more.pop("where", where), **more}


def suspect(annotations: Annotations) -> None:
    """Counts boxes that look as if they were not x, y, width, height in pixels."""
    a = annotations
    if len(a.boxes) < 4:
        return
    limits = a.sizes[a.rows].flip(1).double()
    first, last = a.boxes[:, :2], a.boxes[:, 2:]
    if bool((a.boxes.abs() <= 1).all()):
        a.problems.note(
            "boxes look like shares of the image: pixels are meant (--boxes shares converts)", "", len(a.boxes)
        )
    elif bool((last >= first).all() and (last <= limits + 1).all()):
        over = (first + last > limits + 1).any(1)
        if int(over.sum()) * 4 >= len(a.boxes):
            text = "boxes look like two corners: x, y, width, height are meant (--boxes corners converts)"
            a.problems.note(text, a.file_names[int(a.rows[over][0])], int(over.sum()))
