# SPDX-License-Identifier: Apache-2.0
"""XML: Pascal VOC's file per image, CVAT's file of all images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ... import files
from ..problems import Problems
from .entry import Entry, Found, Object, floats, of_corners, of_points, one_by_one, turned
from .folder import Folder, part_of

LARGEST_FILE = 2**30
Element = ElementTree.Element


def find(folder: Folder) -> Found | None:
    """CVAT's annotations.xml, several of them, or a file per image in VOC's form."""
    paths = folder.of(".xml")
    for path in paths:
        root = _root(path)
        if root is not None and root.tag == "annotations":
            return of_cvat([p for p in paths if p.parent == path.parent] if root.find("image") is None else [path])
        if root is not None and root.tag == "annotation":
            return _voc(paths, folder)
    return None


def of_cvat(paths: list[Path]) -> Found:
    """The images of "CVAT for images"; of "CVAT for video" there are no images' names, which is counted."""
    roots = [(path, root) for path in paths if (root := _root(path)) is not None and root.tag == "annotations"]
    names: dict[str, None] = {}
    for _, root in roots:
        for label in root.iterfind("meta//label/name"):
            names.setdefault((label.text or "").strip())

    def entries(problems: Problems) -> Iterator[Entry]:
        for path, root in roots:
            problems.note("tracks of a video without names of images, left out", path, len(root.findall("track")))
            for image in root.iterfind("image"):
                objects = [thing for shape in image if (thing := _cvat_shape(shape, problems, path)) is not None]
                size = (floats([image.get("height")])[0], floats([image.get("width")])[0])
                part = part_of([image.get("subset", "")])
                yield Entry(image.get("name", ""), path.parent, f"{path}: image {image.get('id')}", objects, size, part)

    # Labels that have no box are classes too.
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    found = Found("CVAT XML", paths[0], entries, categories or None)
    if categories:
        numbers = {name: number for number, name in enumerate(names, 1)}
        found.entries = lambda problems: _numbered(entries(problems), numbers)
    return found


def _numbered(entries: Iterator[Entry], numbers: dict[str, int]) -> Iterator[Entry]:
    for entry in entries:
        entry.objects = [one._replace(label=numbers.get(one.label)) for one in entry.objects]
        yield entry


def _cvat_shape(shape: Element, problems: Problems, path: Path) -> Object | None:
    box: Any
    if shape.tag == "box":
        box = of_corners(*(shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")))
    elif shape.tag in ("polygon", "polyline"):
        box = of_points(point.split(",") for point in (shape.get("points") or "").split(";"))
    elif shape.tag == "ellipse":
        cx, cy, rx, ry = floats(shape.get(key) for key in ("cx", "cy", "rx", "ry"))
        box = of_points([(cx - rx, cy - ry), (cx + rx, cy + ry)])
    elif shape.tag == "mask":
        box = floats(shape.get(key) for key in ("left", "top", "width", "height"))
    elif shape.tag in ("tag", "attribute"):
        return None
    else:
        problems.note("shapes that have no box (points, skeletons, cuboids), left out", f"{path}: {shape.tag}")
        return None
    if isinstance(box, list):
        box = turned(box, shape.get("rotation"), centre=True)
    return Object(shape.get("label"), box)


def _voc(paths: list[Path], folder: Folder) -> Found:
    lists: dict[str, str] = {}
    for path in folder.of(".txt"):
        # ImageSets/Main: train.txt and val.txt; "cat_train.txt" is of one class, "trainval.txt" is both.
        if path.parent.parent.name == "ImageSets" and path.stem in ("train", "val", "test"):
            for line in path.read_text("utf-8-sig", "replace").splitlines():
                if line.strip():
                    lists[Path(line.split()[0]).stem] = path.stem

    def read(path: Path) -> Entry | None:
        root = root_of(path)
        if root.tag != "annotation":
            return None
        objects = []
        for thing in root.iterfind("object"):
            corners = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            name, more = (thing.findtext("name") or "").strip(), {"where": str(path)}
            objects.append(Object(name, of_corners(*corners), 0.0, more | {"ignore": thing.findtext("difficult")}))
        size = floats(root.findtext(f"size/{key}") for key in ("height", "width"))
        name = (root.findtext("filename") or "").strip()
        # A file that was renamed with its image keeps the name that it had.
        image = folder.image(path.stem, path.parent) or name
        part = lists.get(path.stem) or part_of(folder.words(path.parent))
        return Entry(image, path.parent, str(path), objects, (size[0], size[1]), part)

    return Found("Pascal VOC XML", paths[0].parent, lambda problems: one_by_one(paths, read, problems))


def _root(path: Path) -> Element | None:
    try:
        return root_of(path)
    except (OSError, ValueError):
        return None


def root_of(path: Path) -> Element:
    """The outermost element; ValueError for a file that is no XML, or defines entities, as no tool does."""
    content = files.read_bytes(path, LARGEST_FILE)
    # Entities could make gigabytes of a short file.
    if b"<!ENTITY" in content:
        raise ValueError(f"{path} defines entities, which are not read")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML, or only its beginning: {error}") from None
