# SPDX-License-Identifier: Apache-2.0
"""Data sets in the formats that labelling tools and other trainers write, found by what is in their folder.

Each reader gives images by the format's own names, with the boxes in the format's unit (`entry.py`); `build` makes the
same `Annotations` of all. The readers are our own, since converters stop at the first fault (globox, supervision), know
classes by name alone, so that two of one name become one (globox), take one image suffix per folder (globox), read
neither CVAT nor Label Studio (supervision), or bring video and plotting libraries (supervision, pylabel).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...files import error_text
from ..coco import Annotations, read_json
from . import csv_files, json_files, xml_files, yolo
from .build import build
from .entry import Found
from .folder import Folder

FORMATS = (
    "YOLO (data.yaml, labels/*.txt), COCO (*.json; Roboflow's, CVAT's, Label Studio's too), CVAT XML, Pascal VOC XML, "
    "Label Studio JSON, LabelMe JSON, CSV"
)
# Files that an error may be about.
MOST_TRIED = 20
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")


def read(source: str | Path, classes: Sequence[str] | None = None) -> tuple[dict[str, Annotations], Path, str]:
    """The parts (train, val, test) of a data set, the folder of its images, and its format in words.

    `source` is its folder, or the file in it that describes it; `classes` are a model's, as `build` takes them.

    Raises:
        ValueError: nothing is there in a format that is known, or no image of it is left.
        OSError: it is not there, or can't be read.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise ValueError(f"unpack {path} first")
    folder = Folder(path if path.is_dir() else path.parent)
    found = _in_folder(folder) if path.is_dir() else _of_file(path, folder)
    return build(found, folder, classes), folder.root, found.kind


def _in_folder(folder: Folder) -> Found:
    for format in (yolo_yaml, json_files.find, xml_files.find, csv_files.find, yolo.find):
        if (found := format(folder)) is not None:
            return found
    archives = [path.name for path in folder.files if path.suffix.lower() in ARCHIVES]
    if archives and not folder.images():
        raise ValueError(f"{folder.root}: unpack {archives[0]} first")
    images, broken = len(folder.images()), ""
    for path in folder.of(".json", ".xml")[:MOST_TRIED]:
        try:
            read_json(path) if path.suffix.lower() == ".json" else xml_files.root_of(path)
        except (OSError, ValueError) as error:
            broken = f"; {error_text(error)}"
    raise ValueError(f"{folder.root} has {images or 'no'} images and no annotations that are known: {FORMATS}{broken}")


def yolo_yaml(folder: Folder) -> Found | None:
    """YOLO's files where a data.yaml says so; bare text files come last, since many things are text."""
    found = yolo.find(folder) if folder.of(".yaml", ".yml") else None
    return found if found is not None and found.path.suffix.lower() in (".yaml", ".yml") else None


def _of_file(path: Path, folder: Folder) -> Found:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return yolo.of_yaml(path, folder)
    found: Found | None = None
    only = folder.only(path)
    if suffix == ".json":
        content = read_json(path)
        if json_files.is_coco(content):
            return json_files.of_coco({path: content}, folder)
        found = json_files.find(only)
    elif suffix == ".xml":
        found = xml_files.find(only)
    elif suffix == ".csv":
        found = csv_files.find(only)
    if found is None:
        raise ValueError(f"{path} is in no format that is known: {FORMATS}")
    return found
