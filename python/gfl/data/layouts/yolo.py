# SPDX-License-Identifier: Apache-2.0
"""YOLO's text files, a line per box: with a data.yaml (ultralytics, Roboflow), as CVAT or Label Studio write them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ... import config
from .. import values
from ..problems import Problems
from ..transforms import IMAGE_SUFFIXES
from .entry import Entry, Found, Object, floats, of_centre, of_points
from .folder import Folder, part_of

KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# A class's name per line: darknet and CVAT, Label Studio.
NAMES = ("obj.names", "classes.txt", "predefined_classes.txt", "data.names")


def find(folder: Folder) -> Found | None:
    """A data.yaml with `names`, or text files with a class's name or a box per line beside images."""
    for path in folder.of(".yaml", ".yml"):
        content = _yaml(path)
        if isinstance(content, Mapping) and ("names" in content or "nc" in content):
            return of_yaml(path, folder, content)
    names = next((path for path in folder.of(".txt", ".names") if path.name.lower() in NAMES), None)
    labels = _label_files(folder)
    if names is None and not labels:
        return None
    lines = [] if names is None else names.read_text("utf-8-sig", "replace").splitlines()
    classes: dict[Any, str] = dict(enumerate(line.strip() for line in lines if line.strip()))

    def listed() -> Iterator[tuple[Path, str | None]]:
        for path in folder.images():
            yield path, part_of(folder.words(path.parent))

    return _found(names or folder.root, folder, classes, listed, labels)


def of_yaml(path: Path, folder: Folder, content: Any = None) -> Found:
    """The data set of a data.yaml; ValueError if it is none."""
    content = _yaml(path) if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a data.yaml: `names`, `train` and `val` are needed")
    names = content.get("names")
    if names is None and values.whole(content.get("nc")):
        names = [str(number) for number in range(int(content["nc"]))]
    if isinstance(names, (list, tuple)):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names:
        raise ValueError(f"{path}: `names` must be a list of the classes, or their names by number, got {names!r:.80}")
    problems = Problems()

    def listed() -> Iterator[tuple[Path, str | None]]:
        said = False
        for key, part in KEYS.items():
            given = content.get(key)
            for one in given if isinstance(given, list) else [given] if given else []:
                said = True
                paths = _images(str(one), path, content.get("path"), folder)
                if paths is None:
                    problems.note(f"folders of {path.name} that are not there, left out", f"{key}: {one}")
                yield from ((image, part) for image in paths or ())
        if not said:
            yield from ((image, part_of(folder.words(image.parent))) for image in folder.images())

    numbered = {floats([str(key)])[0]: str(name) for key, name in names.items()}
    found = _found(path, folder, numbered, listed, _label_files(folder))
    found.problems = problems
    return found


def _found(path: Path, folder: Folder, classes: dict[Any, str], listed: Any, labels: Mapping[str, list[Path]]) -> Found:
    def entries(problems: Problems) -> Iterator[Entry]:
        images = dict(listed())
        without = 0
        for image, part in images.items():
            label = _label_of(image, folder, labels)
            without += label is None
            yield Entry(
                image, image.parent, str(label), [] if label is None else list(_lines(label, problems)), part=part
            )
        if images and without == len(images):
            raise ValueError(
                f"{path}: none of {without} images has a label file, labels/NAME.txt or NAME.txt beside it"
            )
        problems.note("images without a label file, taken for background", "", without)

    categories = [{"id": int(number), "name": name} for number, name in classes.items()]
    return Found("YOLO text files", path, entries, categories or None)


def _lines(path: Path, problems: Problems) -> Iterator[Object]:
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        label, rest = values.whole(floats(words[:1])[0]), floats(words[1:])
        box: Any = rest
        if len(rest) in (4, 5):  # the fifth is a score
            box = of_centre(*rest[:4])
        elif len(rest) >= 6 and len(rest) % 2 == 0:  # an outline
            box = of_points(zip(rest[::2], rest[1::2]))
        yield Object(label, box, 1.0, {"where": f"{path}:{number}"})


def _yaml(path: Path) -> Any:
    try:
        return config.parse_file(path)
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def _label_files(folder: Folder) -> dict[str, list[Path]]:
    """The text files that lie beside an image of their name, or in a folder `labels`, by their names without suffix."""
    images = {path.with_suffix("") for path in folder.images()}
    found: dict[str, list[Path]] = {}
    for path in folder.of(".txt"):
        if path.with_suffix("") in images or "labels" in folder.words(path.parent):
            found.setdefault(path.stem, []).append(path)
    return found


def _label_of(image: Path, folder: Folder, labels: Mapping[str, list[Path]]) -> Path | None:
    """images/…/NAME.jpg → labels/…/NAME.txt, as ultralytics has it; else beside it, else the only one of its name."""
    if not image.is_relative_to(folder.root):
        beside = image.with_suffix(".txt")
        head, images, tail = str(beside).rpartition(f"{os.sep}images{os.sep}")
        moved = Path(f"{head}{os.sep}labels{os.sep}{tail}") if images else beside
        return next((path for path in (moved, beside) if path.is_file()), None)
    found = labels.get(image.stem, [])
    words = [word for word in folder.words(image.parent) if word != "images"]
    for path in found:
        if [word for word in folder.words(path.parent) if word != "labels"] == words:
            return path
    return found[0] if len(found) == 1 and found[0].parent.name == "labels" else None


def _images(given: str, yaml: Path, base: Any, folder: Folder) -> list[Path] | None:
    """The images of a folder or a list that a data.yaml names, or None.

    Paths are relative to its `path` or to itself; Roboflow's begin with "../" and mean the folder itself, and absolute
    ones may be another machine's: then the end of the path decides.
    """
    given = given.replace("\\", "/")
    bases = [yaml.parent / str(base).replace("\\", "/")] if base else []
    tries = [start / given for start in (*bases, yaml.parent)]
    words = [word for word in given.split("/") if word not in ("", ".", "..")]
    tries += [folder.root.joinpath(*words[first:]) for first in range(len(words))]
    for path in (Path(os.path.normpath(path)) for path in tries):
        if path.is_dir():
            return _inside(path, folder)
        if path.is_file() and path.suffix.lower() == ".txt":
            return list(_listed(path, folder))
    return None


def _inside(path: Path, folder: Folder) -> list[Path]:
    inner = folder if path.is_relative_to(folder.root) else Folder(path)
    return [image for image in inner.images() if image.is_relative_to(path)]


def _listed(path: Path, folder: Folder) -> Iterable[Path]:
    for line in path.read_text("utf-8-sig", "replace").splitlines():
        if line.strip() and Path(line.strip()).suffix.lower() in IMAGE_SUFFIXES:
            yield folder.image(line.strip(), path.parent) or path.parent / line.strip()
