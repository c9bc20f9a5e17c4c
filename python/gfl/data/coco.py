# SPDX-License-Identifier: Apache-2.0
"""Annotation files in COCO's format, checked, and the images they describe.

What breaks the file as a whole (not JSON, a wrong image or category, an id twice, a missing file) is an error that
names the file and the place. A single wrong box, of whatever form, is left out and counted in `problems`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files
from . import values
from .cache import ImageCache
from .problems import Problems
from .transforms import ConflictingOrientations, UnreadableImage, read_image, stored_size
from .values import ImageId

DIGESTED = 100  # image files whose contents are part of a data set's digest: all would take as long as an epoch
MAX_SIDE = 2**31 - 1
PLACE = "_place"


@dataclass
class Annotations:
    """The contents of a COCO annotation file: N boxes on n images, without malformed boxes."""

    path: Path
    category_ids: list[int]  # ascending; label c stands for category_ids[c]
    classes: list[str]  # their names
    image_ids: list[ImageId]  # in the file's order, all numbers or all texts
    file_names: list[str]  # of the images, relative to their folder
    sizes: Tensor  # int64 [n, 2], (height, width) in pixels
    boxes: Tensor  # fp64 [N, 4], (x, y, width, height) in pixels as in the file, of any sign and size but finite
    labels: Tensor  # int64 [N]
    rows: Tensor  # int64 [N], the image of each box as an index into image_ids
    areas: Tensor  # fp64 [N], of the object (of its mask where there is one), square pixels
    crowd: Tensor  # bool [N], one box around many objects
    ignored: Tensor  # bool [N], marked by the key `ignore` as no target of a training
    problems: Problems  # what was left out
    parents: list[str] = field(default_factory=list)  # the classes' supercategories, '' for none

    def distinct_names(self) -> list[str]:
        """The names of the classes, each with its category's id if two are equal."""
        if len(set(self.classes)) == len(self.classes):
            return self.classes
        return [f"{name} (category {number})" for name, number in zip(self.classes, self.category_ids)]

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
    boxes of a category or an image that the file does not list, boxes that are not four finite numbers, boxes with an
    ``iscrowd`` or ``ignore`` that is neither yes nor no. An area that is no number is width · height, and counted.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not JSON or not an annotation file, a key of an image or category is missing or of a wrong
            type, or its id comes twice. The text names the file and the place.
    """
    if isinstance(path, Annotations):
        return path
    return checked(Path(path), read_json(Path(path)))


def checked(path: Path, content: Any) -> Annotations:
    """The contents of an annotation file as `read_annotations` gives them, or its errors; `path` is for their texts.

    An annotation may have its `PLACE`, for an example of its problems.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a COCO annotation file: a JSON object is needed")
    categories: dict[int, str] = {}
    parents: dict[int, str] = {}
    for where, entry in _entries(path, content, "categories"):
        _add(where, categories, _get(where, entry, "id", values.whole), _get(where, entry, "name", values.text))
        parents[values.whole(entry["id"]) or 0] = values.text(entry.get("supercategory")) or ""
    images: dict[ImageId, int] = {}
    file_names, sizes = [], []
    for row, (where, entry) in enumerate(_entries(path, content, "images")):
        _add(where, images, _get(where, entry, "id", values.image_id), row)
        file_names.append(_get(where, entry, "file_name", values.text))
        sizes.append((_get(where, entry, "height", values.whole), _get(where, entry, "width", values.whole)))
        if not 1 <= min(sizes[-1]) <= max(sizes[-1]) <= MAX_SIDE:
            raise ValueError(f"{where}: `height` and `width` must be positive, at most {MAX_SIDE}, got {sizes[-1]}")
    if len({type(image) for image in images}) > 1:
        raise ValueError(f"{path}: the ids of its images are numbers and texts, not all of one kind")

    category_ids = sorted(categories)
    labels = {category: label for label, category in enumerate(category_ids)}
    problems = Problems()
    kept: list[tuple[int, int, list[float], float, bool, bool]] = []
    for where, entry in _entries(path, content, "annotations"):
        entry = entry if isinstance(entry, dict) else {}
        place = entry.get(PLACE, where)
        of_image = images.get(values.image_id(entry.get("image_id")))  # type: ignore[arg-type]
        label = labels.get(values.whole(entry.get("category_id")))  # type: ignore[arg-type]
        box = values.numbers(entry.get("bbox"), 4)
        crowd, ignored = values.truth(entry.get("iscrowd", False)), values.truth(entry.get("ignore", False))
        if label is None:
            problems.note("boxes of unknown categories, left out", place)
        elif of_image is None:
            problems.note("boxes of unknown images, left out", place)
        elif box is None:
            problems.note("boxes that are not four finite numbers, left out", place)
        elif crowd is None or ignored is None:
            problems.note("boxes with `iscrowd` or `ignore` neither true nor false, left out", place)
        else:
            area = values.number(entry.get("area", box[2] * box[3]))
            if area is None:
                problems.note("areas that are not finite numbers, width · height instead", place)
                area = box[2] * box[3]
            kept.append((of_image, label, box, min(area, sys.float_info.max), crowd, ignored))
    rows, targets, boxes, areas, crowds, ignore = list(zip(*kept)) or [()] * 6
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
        crowd=torch.tensor(crowds, dtype=torch.bool),
        ignored=torch.tensor(ignore, dtype=torch.bool),
        problems=problems,
        parents=[parents[c] for c in category_ids],
    )


def read_detections(path: str | Path, annotations: Annotations) -> list[dict[str, Any]]:
    """Detections of a file, checked; `annotations` are what they will be compared with.

    The file is a list in COCO's result format, or what ``gfl detect`` writes, whose images are found in the annotations
    by their file names.

    Raises:
        OSError: the file can't be read.
        ValueError: it is neither, or a detection is not as `check_detections` needs it, or an image is not in the
            annotations or of another size there. The text names it.
    """
    path = Path(path)
    content = read_json(path)
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        content = _of_detect(path, content, annotations)
    if not isinstance(content, list):
        raise ValueError(f"{path} is not a COCO result file: a list of detections is needed")
    return check_detections(content, annotations, path)


def check_detections(
    detections: Any, annotations: Annotations, path: str | Path = "detections"
) -> list[dict[str, Any]]:
    """Detections as plain numbers, or a ValueError that names the one of another form.

    Each has ``image_id``, ``category_id``, ``bbox`` and ``score``: finite numbers, and ids that the annotations list.
    """
    known = {"image_id": (values.image_id, set(annotations.image_ids))}
    known["category_id"] = (values.whole, set(annotations.category_ids))
    checked = []
    for number, entry in enumerate(detections):
        where = _Place(path, "entry ", number)
        found: dict[str, Any] = {}
        for key, (parse, ids) in known.items():
            found[key] = _get(where, entry, key, parse)
            if found[key] not in ids:
                raise ValueError(f"{where}: `{key}` {found[key]!r} is not in {annotations.path}")
        found["bbox"] = _get(where, entry, "bbox", lambda value: values.numbers(value, 4), "four finite numbers")
        found["score"] = _get(where, entry, "score", values.number, "a finite number")
        checked.append(found)
    return checked


def _of_detect(path: Path, content: Mapping[str, Any], annotations: Annotations) -> list[dict[str, Any]]:
    """The detections of a file of ``gfl detect``, with the annotations' ids of images."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(annotations.file_names):
        rows.setdefault(PurePath(name).name, []).append(row)
    names = dict(zip(annotations.category_ids, annotations.classes))
    for label, (where, entry) in enumerate(_entries(path, content, "categories")):
        number, name = _get(where, entry, "id", values.whole), _get(where, entry, "name", values.text)
        # A checkpoint without names has these.
        if name != f"class {label}" and names.get(number, name) != name:
            raise ValueError(f"{where}: category {number} is {name!r}, in {annotations.path} {names[number]!r}")
    images: dict[ImageId, ImageId] = {}
    taken: dict[int, str] = {}
    for where, entry in _entries(path, content, "images"):
        file = PurePath(_get(where, entry, "file_name", values.text))
        # The one whose name is the longest end of the path.
        lengths = {row: len(PurePath(annotations.file_names[row]).parts) for row in rows.get(file.name, ())}
        fitting = [row for row, n in lengths.items() if PurePath(annotations.file_names[row]).parts == file.parts[-n:]]
        fitting = [row for row in fitting if lengths[row] == max(lengths[r] for r in fitting)]
        if len(fitting) != 1:
            what = f"is several images of {annotations.path}" if fitting else f"is not in {annotations.path}"
            raise ValueError(f"{where}: {file} {what}")
        row = fitting[0]
        if row in taken:
            raise ValueError(f"{where}: {file} and {taken[row]} are one image of {annotations.path}")
        size = [_get(where, entry, key, values.whole) for key in ("height", "width")]
        if size != annotations.sizes[row].tolist():
            there = "×".join(map(str, annotations.sizes[row].flip(0).tolist()))
            raise ValueError(f"{where}: {file} is {size[1]}×{size[0]} pixels, {there} in {annotations.path}")
        taken[row] = str(file)
        _add(where, images, _get(where, entry, "id", values.image_id), annotations.image_ids[row])
    found = []
    for where, entry in _entries(path, content, "annotations"):
        image = _get(where, entry, "image_id", values.image_id)
        if image not in images:
            raise ValueError(f"{where}: `image_id` {image!r} is not in its own images")
        found.append({**entry, "image_id": images[image]})
    return found


def coco_detection(image_id: ImageId, category_id: int, box: Sequence[float], score: float) -> dict[str, Any]:
    """An entry of COCO's result format, whose boxes are (x, y, width, height), of an xyxy box."""
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


class Sample(NamedTuple):
    """An image with its objects."""

    image: Tensor  # uint8 [3, H, W], RGB
    boxes: Tensor  # fp32 [n, 4], xyxy in pixels, inside the image, at least a pixel wide and high
    labels: Tensor  # int64 [n]
    image_id: ImageId  # of the annotation file
    size: tuple[int, int]  # (height, width)


class CocoDataset(torch.utils.data.Dataset[Sample]):
    """Images and their objects, from an annotation file in COCO's format and a folder.

    Of the boxes that `read_annotations` keeps, these are no targets, each kind counted in `problems`: crowd boxes
    (which an evaluation still uses), boxes marked ``ignore``, without width or height, outside their image, or less
    than a pixel wide or high. The rest is clipped to the image.

    Photos with an EXIF orientation are read by one rule, the one that their boxes were drawn in: upright, unless the
    sizes in the file say that the boxes are on the stored pixels.

    The file names of `annotations` are relative to the folder `images`. With `keep_empty` images without a target are
    kept; they are all background.

    Raises:
        OSError: the annotation file or the folder can't be read, or images are missing in it.
        ValueError: the annotation file is broken, or no image is left.
    """

    image_ids: list[ImageId]  # of the images in this data set
    sizes: Tensor  # int64 [n, 2], their (height, width)

    def __init__(self, annotations: str | Path | Annotations, images: str | Path, keep_empty: bool = True):
        # The whole file's, including images without objects.
        self.annotations = annotations = read_annotations(annotations)
        self.images = Path(images)
        self.classes, self.category_ids = annotations.classes, annotations.category_ids
        self.problems = Problems(annotations.problems)  # what was left out or changed
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
            found = "; ".join(self.problems.lines())
            raise ValueError(f"{annotations.path} has no image with an object to train on: {found}")
        order = rows.argsort(stable=True)
        # One tensor for all boxes, sliced where it is read, so that worker processes copy none of it.
        self._boxes, self._labels = boxes[order], labels[order]
        ends = count.cumsum(0)
        self._first, self._last = (ends - count)[chosen].tolist(), ends[chosen].tolist()
        self.sizes = annotations.sizes[chosen]
        self.image_ids = [annotations.image_ids[i] for i in chosen.tolist()]
        self._names = [annotations.file_names[i] for i in chosen.tolist()]
        self._upright: bool | None = None
        self.cache: ImageCache | None = None
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
        self.problems.note("images that can't be decoded, passed over", path, int(new))
        return new

    def labels_of(self, index: int) -> Tensor:
        """The classes of an image's targets, int64 ``[n]``."""
        return self._labels[self._first[index] : self._last[index]]

    def __getitem__(self, index: int) -> Sample:
        """Reads an image; raises what `read_image` does."""
        height, width = self.sizes[index].tolist()

        def read() -> Tensor:
            return read_image(self.path(index), (height, width), self._boxes_are_upright)

        image = read() if self.cache is None else self.cache.get(index, read)
        boxes, labels = (part[self._first[index] : self._last[index]].clone() for part in (self._boxes, self._labels))
        return Sample(image, boxes, labels, self.image_ids[index], (height, width))

    def digest(self) -> str:
        """SHA-256 of all that a training takes from it: classes, boxes, order, and a hundred of the image files."""
        digest = hashlib.sha256(json.dumps([self.category_ids, self.classes, self.image_ids, self._names]).encode())
        for tensor in (self.sizes, self._boxes, self._labels, torch.tensor(self._last)):
            digest.update(tensor.numpy().tobytes())
        for index in range(0, len(self), -(-len(self) // DIGESTED)):
            with suppress(OSError):
                digest.update(hashlib.sha256(files.read_bytes(self.path(index))).digest())
        return digest.hexdigest()

    def _boxes_are_upright(self) -> bool:
        """Whether boxes refer to photos as a viewer shows them, for one whose size does not tell: as those that do.

        It is a ValueError if some photos say so and others not.
        """
        if self._upright is None:
            said: dict[bool, Path] = {}
            for index, (height, width) in enumerate(self.sizes.tolist()):
                try:
                    stored, turned = stored_size(self.path(index))
                except UnreadableImage:
                    continue
                if stored != turned and (height, width) in (stored, turned):
                    said.setdefault((height, width) == turned, self.path(index))
            if len(said) == 2:
                raise ConflictingOrientations(
                    f"{self.annotations.path}: the boxes of {said[True]} are on the upright photo, those of "
                    f"{said[False]} on the stored pixels: save all photos upright"
                )
            self._upright = next(iter(said), True)
        return self._upright

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
            self._note(what, left & there)
            left &= ~there
        # COCO's own boxes end fractions of a pixel outside, which is not worth reporting.
        over = left & ((corners - clipped).abs() > 1).any(1)
        self._note("boxes more than a pixel over their image's edge, clipped", over)
        return clipped[left].float(), a.rows[left], a.labels[left]

    def _note(self, what: str, boxes: Tensor) -> None:
        """Counts a problem of some boxes, with the first one's image."""
        if found := boxes.nonzero()[:, 0].tolist():
            self.problems.note(what, self.annotations.file_names[int(self.annotations.rows[found[0]])], len(found))

    def _require_images(self) -> None:
        # One listing per folder: one query per file takes minutes on a network file system.
        folders = {os.path.dirname(name) for name in self._names}
        there = {folder: set(os.listdir(self.images / folder)) for folder in folders if (self.images / folder).is_dir()}
        missing = [n for n in self._names if os.path.basename(n) not in there.get(os.path.dirname(n), ())]
        if missing:
            found = f"{len(missing)} of {len(self)} images of {self.annotations.path}"
            raise FileNotFoundError(f"{found} are not in {self.images}, {missing[0]} for one")


def read_json(path: Path) -> Any:
    """The contents of a JSON file, with or without a byte order mark; ValueError if it is none."""
    try:
        return json.loads(files.read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or only its beginning: {error}") from None


class _Place(NamedTuple):
    """The place of an entry in a file; formatted only when an error needs it."""

    path: str | Path
    key: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}: {self.key}[{self.number}]"


def _entries(path: Path, content: Mapping[str, Any], key: str) -> Iterator[tuple[_Place, Mapping[str, Any]]]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not a COCO annotation file: a list `{key}` is needed")
    return ((_Place(path, key, number), entry) for number, entry in enumerate(entries))


def _get(where: _Place, entry: Any, key: str, parse: Callable[[Any], Any], kind: str | None = None) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise ValueError(f"{where} has no `{key}`")
    if (value := parse(entry[key])) is None:
        kind = kind or (parse.__doc__ or "").partition(",")[0]
        raise ValueError(f"{where}: `{key}` must be {kind}, got {files.shown(entry[key])}")
    return value


def _add(where: _Place, known: dict[Any, Any], key: ImageId, value: Any) -> None:
    if key in known:
        raise ValueError(f"{where}: `id` {key!r} comes twice")
    known[key] = value
