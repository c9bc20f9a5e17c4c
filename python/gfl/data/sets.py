# SPDX-License-Identifier: Apache-2.0
"""Which annotations and images a configuration's `data` section means: COCO's files as typed, or a layout found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ..config import DataConfig
from . import layouts
from .coco import Annotations, CocoDataset, read_annotations
from .layouts.build import suspect
from .subsets import class_counts, hold_out, names_of, without_ghosts

DEFAULTS = {field.name: field.default for field in fields(DataConfig)}


def dataset(data: DataConfig, part: str, classes: Sequence[str] | None = None) -> CocoDataset | None:
    """The part "train" or "val" of the data, None if there is no such validation part.

    Typed names of annotations and images are taken as they are, and so are COCO's where those files exist; with such
    training data alone there is no validation part. Else `gfl.data.layouts` finds out what is in the folder.
    `classes` are a model's, which the data should have too.

    Raises:
        ValueError: nothing there can be used; `val_share` is out of range.
        OSError: a file or folder that was typed is not there.
    """
    if not 0 <= data.val_share < 1:
        raise ValueError(f"`val_share` must be at least 0 and below 1, got {data.val_share}")
    if part == "val" and not data.val_annotations:
        return None
    found, other = _typed(data, part), _typed(data, "train" if part == "val" else "val")
    if found is None and other is not None and part == "val":
        return None
    if found is None:
        parts, root, kind = layouts.read(data.data, classes)
        # What is typed as validation data is not held out once more.
        chosen = _chosen(parts, part, 0.0 if other is not None else data.val_share, data.data)
        if chosen is None:
            return None
        annotations, images = chosen, root
        annotations.problems.note(f"images in the format {kind}", annotations.path, len(annotations.image_ids))
    else:
        annotations, images = read_annotations(found[0]), found[1]
        suspect(annotations)
    annotations = without_ghosts(annotations, classes or ())
    if part == "train":
        without = [label for label, count in enumerate(class_counts(annotations)) if not count]
        annotations.problems.note(f"classes without a box: {names_of(annotations, without)}", "", len(without))
    return CocoDataset(annotations, images, keep_empty=data.keep_empty or part == "val")


def _typed(data: DataConfig, part: str) -> tuple[Path, Path] | None:
    """The files of a part by their names, if those were typed or are COCO's and there."""
    root, names = Path(data.data), (f"{part}_annotations", f"{part}_images")
    annotations, images = (getattr(data, name) for name in names)
    if (root / annotations).is_file() or any(getattr(data, name) != DEFAULTS[name] for name in names):
        return root / annotations, root / images
    return None


def _chosen(parts: dict[str, Annotations], part: str, val_share: float, root: str) -> Annotations | None:
    train, val = parts.get("train"), parts.get("val")
    if part == "train" and train is None:
        raise ValueError(f"{root} has no part to train on, only {' and '.join(parts)}")
    if val is not None or not val_share or train is None:
        return train if part == "train" else val
    if len(train.image_ids) < 2:
        return train if part == "train" else None
    held, rest = hold_out(train, [val_share, 1 - val_share])
    chosen = rest if part == "train" else held
    what = "images held out for validation (val_share)"
    chosen.problems.note(what, "", len(held.image_ids))
    return chosen
