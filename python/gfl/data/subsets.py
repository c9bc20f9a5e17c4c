# SPDX-License-Identifier: Apache-2.0
"""Annotations from annotations: some of the images, some of the classes, shares for training and validation, unions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .coco import Annotations
from .problems import Problems

MOST_NAMES = 5


def of_images(annotations: Annotations, rows: Sequence[int]) -> Annotations:
    """Only the images of those rows, in that order, with their boxes."""
    a, chosen = annotations, list(rows)
    place = torch.full((len(a.image_ids),), -1, dtype=torch.int64)
    place[torch.tensor(chosen, dtype=torch.int64)] = torch.arange(len(chosen))
    kept = _boxes(a, place[a.rows] >= 0)
    return replace(
        kept,
        rows=place[kept.rows],
        image_ids=[a.image_ids[row] for row in chosen],
        file_names=[a.file_names[row] for row in chosen],
        sizes=a.sizes[chosen].reshape(-1, 2),
    )


def of_labels(annotations: Annotations, labels: Sequence[int]) -> Annotations:
    """Only the classes of those labels, in that order, with their boxes; all images stay."""
    a = annotations
    place = torch.full((len(a.classes),), -1, dtype=torch.int64)
    place[torch.tensor(list(labels), dtype=torch.int64)] = torch.arange(len(labels))
    kept = _boxes(a, place[a.labels] >= 0)
    return replace(
        kept,
        labels=place[kept.labels],
        category_ids=[a.category_ids[label] for label in labels],
        classes=[a.classes[label] for label in labels],
        parents=[a.parents[label] for label in labels] if a.parents else [],
    )


def of_classes(annotations: Annotations, names: Sequence[str]) -> Annotations:
    """Only the classes of those names; ValueError for one that is not there."""
    known = annotations.distinct_names()
    if unknown := [name for name in names if name not in known and name not in annotations.classes]:
        raise ValueError(f"{annotations.path} has no class {unknown[0]!r}; it has {', '.join(known)}")
    pairs = enumerate(zip(annotations.classes, known))
    return of_labels(annotations, [label for label, pair in pairs if not {*pair}.isdisjoint(names)])


def without_ghosts(annotations: Annotations, keep: Collection[str] = (), said: bool = True) -> Annotations:
    """Without categories that only name others' supercategory and have no box, as Roboflow's exports begin with.

    Those whose names are in `keep`, a model's classes, stay. What is left out is counted if it is to be `said`.
    """
    a = annotations
    boxes, parents = class_counts(a), a.parents or [""] * len(a.classes)
    ghosts = [
        label
        for label, name in enumerate(a.classes)
        if not boxes[label]
        and name not in keep
        and parents[label] != name
        and any(parent == name for other, parent in enumerate(parents) if other != label)
    ]
    if not ghosts:
        return a
    left = of_labels(a, [label for label in range(len(a.classes)) if label not in ghosts])
    text = f"classes that are supercategories without a box, left out: {names_of(a, ghosts)}"
    left.problems.note(text, "", len(ghosts) * said)
    return left


def hold_out(annotations: Annotations, shares: Sequence[float], seed: int = 0) -> list[Annotations]:
    """Several parts of the images, of those shares; which image goes where follows from its name and the seed alone.

    Shares that add up to less than 1 leave images out. A share above zero gets at least one image, if there are enough.
    """
    if not shares or min(shares) < 0 or not 0 < sum(shares) <= 1 + 1e-9:
        raise ValueError(f"shares must be positive and add up to 1 at most, got {', '.join(map(str, shares))}")

    def drawn(row: int) -> bytes:
        return hashlib.sha256(f"{seed} {annotations.file_names[row]}".encode("utf-8", "surrogatepass")).digest()

    order = sorted(range(len(annotations.image_ids)), key=drawn)
    parts, first, ends = [], 0, 0.0
    for share in shares:
        ends += share
        last = max(round(ends * len(order)), first + (share > 0))
        parts.append(of_images(annotations, sorted(order[first:last])))
        first = last
    return parts


def merged(parts: Sequence[tuple[Annotations, str | Path]], root: str | Path, names: Iterable[str] = ()) -> Annotations:
    """All images of several annotations, each with its images' folder, as one whose names are relative to `root`.

    Classes of one name become one; images and categories are numbered anew, in the order in which they come, but those
    of `names` first.
    """
    classes = list(names)
    for a, _ in parts:
        classes += [name for name in a.distinct_names() if name not in classes]
    problems, file_names, columns, offset = Problems(), [], [], 0
    for a, images in parts:
        problems.add(a.problems)
        labels = torch.tensor([classes.index(name) for name in a.distinct_names()], dtype=torch.int64)
        file_names += [os.path.relpath(os.path.join(images, name), root) for name in a.file_names]
        columns.append((a.sizes, a.boxes, labels[a.labels], a.rows + offset, a.areas, a.crowd, a.ignored))
        offset += len(a.image_ids)
    sizes, boxes, targets, rows, areas, crowd, ignored = (torch.cat(column) for column in zip(*columns))
    return Annotations(
        path=parts[0][0].path if len(parts) == 1 else Path(root),
        category_ids=list(range(1, len(classes) + 1)),
        classes=classes,
        image_ids=list(range(1, len(file_names) + 1)),
        file_names=file_names,
        sizes=sizes,
        boxes=boxes,
        labels=targets,
        rows=rows,
        areas=areas,
        crowd=crowd,
        ignored=ignored,
        problems=problems,
        parents=[""] * len(classes),
    )


def converted(annotations: Annotations, boxes: str) -> Annotations:
    """With boxes that were "corners" (x1, y1, x2, y2) or "shares" of their image's sides as x, y, width, height."""
    a = annotations
    if boxes == "corners":
        new = torch.cat([a.boxes[:, :2], a.boxes[:, 2:] - a.boxes[:, :2]], 1)
    else:
        new = a.boxes * a.sizes[a.rows].flip(1).repeat(1, 2)
    left = {what: times for what, times in a.problems.items() if not what.startswith("boxes look like")}
    problems = Problems(left)
    problems.first = a.problems.first
    return replace(a, boxes=new, areas=new[:, 2:].prod(1), problems=problems)


def class_counts(annotations: Annotations) -> list[int]:
    """Boxes of each class, crowd boxes too."""
    return torch.bincount(annotations.labels, minlength=len(annotations.classes)).tolist()


def names_of(annotations: Annotations, labels: Sequence[int]) -> str:
    """The names of some classes, the first few of many."""
    known = annotations.distinct_names()
    shown = ", ".join(known[label] for label in labels[:MOST_NAMES])
    return shown if len(labels) <= MOST_NAMES else f"{shown} and {len(labels) - MOST_NAMES} more"


def _boxes(a: Annotations, kept: Tensor) -> Annotations:
    columns = ("boxes", "labels", "rows", "areas", "crowd", "ignored")
    return replace(a, problems=Problems(a.problems), **{name: getattr(a, name)[kept] for name in columns})
