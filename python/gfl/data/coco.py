# SPDX-License-Identifier: Apache-2.0
"""Annotation files in COCO's format, checked, and the images they describe.

What breaks the file as a whole (not JSON, a missing key, an id twice, a missing image) is an error that names the file
and the place. A single wrong box is left out and counted in `problems`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .transforms import read_image


@dataclass
class Annotations:
    """The contents of a COCO annotation file: N boxes on n images, without malformed boxes."""

    path: Path
    category_ids: list[int]  # ascending; label c stands for category_ids[c]
    classes: list[str]  # their names
    image_ids: list[int]  # in the file's order
    file_names: list[str]  # of the images, relative to their folder
    sizes: Tensor  # int64 [n, 2], (height, width) in pixels
    boxes: Tensor  # fp64 [N, 4], (x, y, width, height) in pixels as in the file, of any sign and size but finite
    labels: Tensor  # int64 [N]
    rows: Tensor  # int64 [N], the image of each box as an index into image_ids
    areas: Tensor  # fp64 [N], of the object (of its mask where there is one), square pixels
    crowd: Tensor  # bool [N], one box around many objects
    ignored: Tensor  # bool [N], marked by the key `ignore` as no target of a training
    problems: Counter[str]  # what was left out, in words, and how often

    def to_coco(self) -> dict[str, list[dict[str, Any]]]:
        """The same in the form that pycocotools takes.

        Boxes are renumbered from 1: pycocotools takes an object of id 0 for none and loses repeated ids.
        """
        images = [
            {"id": image, "file_name": name, "height": h, "width": w}
            for image, name, (h, w) in zip(self.image_ids, self.file_names, self.sizes.tolist(), strict=True)
        ]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        columns = zip(*(c.tolist() for c in (self.rows, self.labels, self.boxes, self.areas, self.crowd.int())))
        names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        annotations = [
            dict(zip(names, (number, self.image_ids[row], self.category_ids[label], *rest)))
            for number, (row, label, *rest) in enumerate(columns, 1)
        ]
        return {"images": images, "categories": categories, "annotations": annotations}


def read_annotations(path: str | Path | Annotations) -> Annotations:
    """Reads and checks a COCO annotation file; what was read already is returned as it is.

    Optional in an annotation: ``id``, ``area`` (width · height), ``iscrowd`` and ``ignore`` (no). Left out and counted:
    boxes of a category or an image that the file does not list, boxes that are not four finite numbers.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not JSON or not an annotation file, a key is missing or of a wrong type, or an id of an image
            or category comes twice. The text names the file and the place.
    """
    if isinstance(path, Annotations):
        return path
    path = Path(path)
    content = _json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a COCO annotation file: a JSON object is needed")
    categories: dict[int, str] = {}
    for where, entry in _entries(path, content, "categories"):
        _add(where, categories, _get(where, entry, "id", int), _get(where, entry, "name", str))
    images: dict[int, int] = {}
    file_names, sizes = [], []
    for row, (where, entry) in enumerate(_entries(path, content, "images")):
        _add(where, images, _get(where, entry, "id", int), row)
        file_names.append(_get(where, entry, "file_name", str))
        sizes.append((_get(where, entry, "height", int), _get(where, entry, "width", int)))
        if min(sizes[-1]) < 1:
            raise ValueError(f"{where}: `height` and `width` must be positive, got {sizes[-1]}")

    category_ids = sorted(categories)
    labels = {category: label for label, category in enumerate(category_ids)}
    problems: Counter[str] = Counter()
    kept: list[tuple[int, int, list[float], float, bool, bool]] = []
    for where, entry in _entries(path, content, "annotations"):
        of_image = images.get(_get(where, entry, "image_id", int))
        label = labels.get(_get(where, entry, "category_id", int))
        box = _numbers(_get(where, entry, "bbox", list))
        if label is None:
            problems["boxes of unknown categories, left out"] += 1
        elif of_image is None:
            problems["boxes of unknown images, left out"] += 1
        elif box is None:
            problems["boxes that are not four finite numbers, left out"] += 1
        else:
            area = _numbers([entry.get("area", box[2] * box[3])], 1)
            if area is None:
                raise ValueError(f"{where}: `area` must be a finite number, got {entry['area']!r}")
            kept.append((of_image, label, box, area[0], bool(entry.get("iscrowd")), bool(entry.get("ignore"))))
    rows, targets, boxes, areas, crowd, ignored = list(zip(*kept)) or [()] * 6
    return Annotations(
        path=path,
        category_ids=category_ids,
        classes=[categories[c] for c in category_ids],
        image_ids=list(images),
        file_names=file_names,
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        boxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        labels=torch.tensor(targets, dtype=torch.int64),
        rows=torch.tensor(rows, dtype=torch.int64),
        areas=torch.tensor(areas, dtype=torch.float64),
        crowd=torch.tensor(crowd, dtype=torch.bool),
        ignored=torch.tensor(ignored, dtype=torch.bool),
        problems=problems,
    )


def read_detections(path: str | Path, annotations: Annotations) -> list[dict[str, Any]]:
    """A file of detections in COCO's result format, checked; `annotations` are what they will be compared with.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not a JSON list of objects with ``image_id``, ``category_id``, ``bbox`` and ``score``, or one
            has numbers that are not finite, or an image or category unknown to the annotations. The text names it.
    """
    path = Path(path)
    content = _json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a COCO result file: a list of detections is needed")
    images, categories = set(annotations.image_ids), set(annotations.category_ids)
    detections = []
    for number, entry in enumerate(content):
        where = _Place(path, "entry ", number)
        found: dict[str, Any] = {}
        for key, known in (("image_id", images), ("category_id", categories)):
            found[key] = _get(where, entry, key, int)
            if found[key] not in known:
                raise ValueError(f"{where}: `{key}` {found[key]} is not in {annotations.path}")
        box, score = _numbers(_get(where, entry, "bbox", list)), _numbers([entry.get("score")], 1)
        if box is None:
            raise ValueError(f"{where}: `bbox` must be four finite numbers, got {entry['bbox']!r}")
        if score is None:
            raise ValueError(f"{where}: `score` must be a finite number, got {entry.get('score')!r}")
        detections.append({**found, "bbox": box, "score": score[0]})
    return detections


def coco_detection(image_id: int, category_id: int, box: Sequence[float], score: float) -> dict[str, Any]:
    """An entry of COCO's result format, whose boxes are (x, y, width, height), of an xyxy box."""
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


class Sample(NamedTuple):
    """An image with its objects."""

    image: Tensor  # uint8 [3, H, W], RGB
    boxes: Tensor  # fp32 [n, 4], xyxy in pixels, inside the image, at least a pixel wide and high
    labels: Tensor  # int64 [n]
    image_id: int  # of the annotation file
    size: tuple[int, int]  # (height, width)


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Images and their objects, from an annotation file in COCO's format and a folder.

    Of the boxes that `read_annotations` keeps, these are no targets, each kind counted in `problems`: crowd boxes
    (which an evaluation still uses), boxes marked ``ignore``, without width or height, outside their image, or less
    than a pixel wide or high. The rest is clipped to the image.

    The file names of `annotations` are relative to the folder `images`. With `keep_empty` images without a target are
    kept; they are all background.

    Raises:
        OSError: the annotation file or the folder can't be read, or images are missing in it.
        ValueError: the annotation file is broken, or no image is left.
    """

    image_ids: list[int]  # of the images in this data set
    sizes: Tensor  # int64 [n, 2], their (height, width)

    def __init__(self, annotations: str | Path | Annotations, images: str | Path, keep_empty: bool = True):
        # The whole file's, including images without objects.
        self.annotations = annotations = read_annotations(annotations)
        self.images = Path(images)
        self.classes, self.category_ids = annotations.classes, annotations.category_ids
        self.problems = Counter(annotations.problems)  # what was left out or changed, in words, and how often
        self.unreadable: set[Path] = set()  # files that can't be decoded, as reported to `pass_over`
        if not annotations.image_ids:
            raise ValueError(f"{annotations.path} lists no image")

        boxes, rows, labels = self._targets()
        count = torch.bincount(rows, minlength=len(annotations.image_ids))
        empty = int((count == 0).sum())
        if empty:
            self.problems[f"images without objects, {'kept' if keep_empty else 'left out'}"] = empty
        chosen = torch.arange(len(count)) if keep_empty else count.nonzero().squeeze(1)
        if not len(chosen):
            found = "; ".join(f"{n} {what}" for what, n in self.problems.items())
            raise ValueError(f"{annotations.path} has no image with an object to train on: {found}")
        order = rows.argsort(stable=True)
        # One tensor for all boxes, sliced where it is read, so that worker processes copy none of it.
        self._boxes, self._labels = boxes[order], labels[order]
        ends = count.cumsum(0)
        self._first, self._last = (ends - count)[chosen].tolist(), ends[chosen].tolist()
        self.sizes = annotations.sizes[chosen]
        self.image_ids = [annotations.image_ids[i] for i in chosen.tolist()]
        self._names = [annotations.file_names[i] for i in chosen.tolist()]
        self._require_images()

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.images / self._names[index]

    def pass_over(self, path: Path) -> bool:
        """Counts an image that can't be decoded; returns whether it is a new one."""
        new = path not in self.unreadable
        self.unreadable.add(path)
        self.problems["images that can't be decoded, passed over"] += new
        return new

    def __getitem__(self, index: int) -> Sample:
        """Reads an image; raises what `read_image` does."""
        height, width = self.sizes[index].tolist()
        image = read_image(self.path(index), (height, width))
        boxes, labels = (part[self._first[index] : self._last[index]].clone() for part in (self._boxes, self._labels))
        return Sample(image, boxes, labels, self.image_ids[index], (height, width))

    def _targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """xyxy boxes to train on, their images' rows in the file and their labels; the rest is counted."""
        a = self.annotations
        corners = torch.cat([a.boxes[:, :2], a.boxes[:, :2] + a.boxes[:, 2:]], 1)
        limits = a.sizes[a.rows].flip(1).repeat(1, 2).double()
        clipped = torch.minimum(corners.clamp(min=0), limits)
        reasons = {
            "crowd boxes, no targets": a.crowd,
            "boxes marked `ignore`, no targets": a.ignored,
            "boxes without width or height, left out": (a.boxes[:, 2:] <= 0).any(1),
            "boxes outside their image, left out": (clipped[:, 2:] <= clipped[:, :2]).any(1),
            "boxes less than a pixel wide or high, left out": (clipped[:, 2:] - clipped[:, :2] < 1).any(1),
        }
        left = torch.ones_like(a.crowd)
        for what, there in reasons.items():
            self.problems[what] = int((left & there).sum())
            left &= ~there
        # COCO's own boxes end fractions of a pixel outside, which is not worth reporting.
        over = (left & ((corners - clipped).abs() > 1).any(1)).sum()
        self.problems["boxes more than a pixel over their image's edge, clipped"] = int(over)
        self.problems = +self.problems  # without what there is none of
        return clipped[left].float(), a.rows[left], a.labels[left]

    def _require_images(self) -> None:
        # One listing per folder: one query per file takes minutes on a network file system.
        folders = {os.path.dirname(name) for name in self._names}
        there = {folder: set(os.listdir(self.images / folder)) for folder in folders if (self.images / folder).is_dir()}
        missing = [n for n in self._names if os.path.basename(n) not in there.get(os.path.dirname(n), ())]
        if missing:
            found = f"{len(missing)} of {len(self)} images of {self.annotations.path}"
            raise FileNotFoundError(f"{found} are not in {self.images}, {missing[0]} for one")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or only its beginning: {error}") from None


class _Place(NamedTuple):
    """The place of an entry in a file; formatted only when an error needs it."""

    path: Path
    key: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}: {self.key}[{self.number}]"


def _entries(path: Path, content: Mapping[str, Any], key: str) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not a COCO annotation file: a list `{key}` is needed")
    return ((_Place(path, key, number), entry) for number, entry in enumerate(entries))


def _get(where: _Place, entry: Mapping[str, Any], key: str, kind: type) -> Any:
    try:
        value = entry[key]
    except (KeyError, TypeError):
        raise ValueError(f"{where} has no `{key}`") from None
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: `{key}` must be of type {kind.__name__}, got {value!r}")
    return value


def _add(where: _Place, known: dict[int, Any], key: int, value: Any) -> None:
    if key in known:
        raise ValueError(f"{where}: `id` {key} comes twice")
    known[key] = value


def _numbers(values: list[Any], count: int = 4) -> list[float] | None:
    """The values as floats if they are that many finite numbers."""
    if len(values) != count or not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values):
        return None
    return [float(v) for v in values]
