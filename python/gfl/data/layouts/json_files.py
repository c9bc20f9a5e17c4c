# SPDX-License-Identifier: Apache-2.0
"""JSON: COCO's files by their names, Label Studio's tasks, LabelMe's file per image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import values
from ..coco import read_json
from ..problems import Problems
from ..transforms import IMAGE_SUFFIXES
from .entry import Entry, Found, Object, floats, of_centre, of_points, one_by_one, turned
from .folder import Folder, part_of

LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")


def find(folder: Folder) -> Found | None:
    """COCO before Label Studio before LabelMe."""
    contents: dict[Path, Any] = {}
    labelme = []
    for path in folder.of(".json"):
        try:
            content = read_json(path)
        except (OSError, ValueError):
            continue
        if is_labelme(content):
            labelme.append(path)
        elif is_coco(content) or is_tasks(content):
            contents[path] = content
    coco = {path: content for path, content in contents.items() if is_coco(content)}
    if coco:
        return of_coco(coco, folder)
    if contents:
        return of_tasks(contents, folder)
    return _labelme(labelme, folder) if labelme else None


def is_coco(content: Any) -> bool:
    """Whether it has images with boxes: captions have no categories."""
    return isinstance(content, Mapping) and {"images", "annotations", "categories"} <= content.keys()


def is_tasks(content: Any) -> bool:
    """Whether it is a list of Label Studio's tasks, of which the first tells."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, Mapping) and ("data" in first or any(_image_of(first))) and "score" not in first


def is_labelme(content: Any) -> bool:
    """Whether it is LabelMe's file of an image."""
    return isinstance(content, Mapping) and isinstance(content.get("shapes"), list)


def of_coco(contents: Mapping[Path, Any], folder: Folder) -> Found:
    """COCO's files of the parts; of several of a part that which is called instances, else they are an error."""
    parts: dict[str | None, list[Path]] = {}
    for path in contents:
        parts.setdefault(part_of(folder.words(path)), []).append(path)
    chosen: dict[Path, str | None] = {}
    for part, paths in parts.items():
        best = [path for path in paths if path.name.startswith("instances")] or paths
        # The same by another name in an outer folder is no second file.
        if len(best) > 1:
            names = ", ".join(str(path) for path in best[:4])
            raise ValueError(
                f"{folder.root} has several annotation files{f' for {part}' if part else ''}: {names}; name one by "
                "`train_annotations`, or merge them: gfl data FILE FILE --out FOLDER"
            )
        chosen[best[0]] = part
    categories: dict[int, dict[str, Any]] = {}
    problems = Problems()
    for path in chosen:
        for number, entry in enumerate(_list(contents[path], "categories")):
            fields = entry if isinstance(entry, Mapping) else {}
            key, name = values.whole(fields.get("id")), values.text(fields.get("name"))
            before = categories.get(key) if key is not None else None
            if key is None or name is None:
                problems.note("categories without an id or a name, left out", f"{path}: categories[{number}]")
            elif before is None:
                categories[key] = {"id": key, "name": name, "supercategory": fields.get("supercategory")}
            elif before["name"] != name:
                raise ValueError(
                    f"{path}: category {key} is {name!r}, in another file of {folder.root} {before['name']!r}; merge "
                    "them by their names: gfl data FILE FILE --out FOLDER"
                )

    def entries(problems: Problems) -> Iterator[Entry]:
        for path, part in chosen.items():
            yield from _coco_images(path, contents[path], part, problems)

    return Found("COCO JSON", next(iter(chosen)), entries, list(categories.values()), problems)


def _coco_images(path: Path, content: Any, part: str | None, problems: Problems) -> Iterator[Entry]:
    images: dict[Any, Entry] = {}
    for number, fields in enumerate(_list(content, "images")):
        where = f"{path}: images[{number}]"
        fields = fields if isinstance(fields, Mapping) else {}
        key, name = values.image_id(fields.get("id")), values.text(fields.get("file_name"))
        if key is None or not name:
            problems.note("images without an id or a file name, left out", where)
        elif key in images:
            problems.note("images whose id comes twice, the second left out", where)
        else:
            images[key] = Entry(name, path.parent, where, [], (fields.get("height"), fields.get("width")), part, key)
    for number, fields in enumerate(_list(content, "annotations")):
        where = f"{path}: annotations[{number}]"
        fields = fields if isinstance(fields, Mapping) else {}
        of_image = images.get(values.image_id(fields.get("image_id")))
        if of_image is None:
            problems.note("boxes of unknown images, left out", where)
            continue
        more = {key: fields[key] for key in ("iscrowd", "ignore", "area") if key in fields}
        box = fields.get("bbox")
        if not box and isinstance(outline := fields.get("segmentation"), list):
            flat = [value for one in outline if isinstance(one, list) for value in one]
            box = of_points(zip(flat[::2], flat[1::2]))
        of_image.objects.append(Object(fields.get("category_id"), box, 0.0, {"where": where, **more}))
    yield from images.values()


def of_tasks(contents: Mapping[Path, Any], folder: Folder) -> Found:
    """Label Studio's tasks, JSON or JSON-MIN, whose boxes are in percent."""

    def entries(problems: Problems) -> Iterator[Entry]:
        for path, content in contents.items():
            for number, task in enumerate(content):
                where = f"{path}: [{number}]"
                fields = task if isinstance(task, Mapping) else {}
                data = fields.get("data", fields)
                name = next(_image_of(data if isinstance(data, Mapping) else {}), None)
                if name is None:
                    problems.note("tasks without an image, left out", where)
                    continue
                objects, size = [], (None, None)
                for result, value in _results(fields):
                    size = (result.get("original_height"), result.get("original_width"))
                    if (one := _percent(value, size, where)) is None:
                        problems.note("results that have no box (brushes, keypoints, choices), left out", where)
                    else:
                        objects.append(one)
                part = part_of([*folder.words(path), str(data.get("split", ""))])
                yield Entry(name, path.parent, where, objects, size if all(size) else None, part)

    return Found("Label Studio JSON", next(iter(contents)), entries)


def _image_of(data: Mapping[str, Any]) -> Iterator[str]:
    for value in data.values():
        if isinstance(value, str) and value.partition("?X-")[0].lower().endswith(IMAGE_SUFFIXES):
            yield value


def _results(task: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of a result, which has the image's size, and its value; in JSON-MIN they are one."""
    for annotation in [*_list(task, "annotations"), *_list(task, "completions")]:
        if isinstance(annotation, Mapping) and not annotation.get("was_cancelled"):
            for result in _list(annotation, "result"):
                if isinstance(result, Mapping) and isinstance(value := result.get("value"), Mapping):
                    yield result, value
    for key, results in task.items():
        if key not in ("annotations", "completions", "predictions") and isinstance(results, list):
            for result in results:
                if isinstance(result, Mapping) and any(name in result for name in (*LABELS, "x", "points")):
                    yield result, result


def _percent(value: Mapping[str, Any], size: tuple[Any, Any], where: str) -> Object | None:
    names = next((value[key] for key in LABELS if isinstance(value.get(key), list) and value[key]), [None])
    if "points" in value:
        return Object(names[0], of_points(value["points"]), 100.0, {"where": where})
    if "radiusX" in value:
        x, y, rx, ry = (values.number(floats([value.get(key)])[0]) for key in ("x", "y", "radiusX", "radiusY"))
        box = None if rx is None or ry is None else of_centre(x, y, 2 * rx, 2 * ry)
        return Object(names[0], box, 100.0, {"where": where})
    if not {"x", "y", "width", "height"} <= value.keys():
        return None
    box = floats(value[key] for key in ("x", "y", "width", "height"))
    height, width = (values.number(side) for side in size)
    if value.get("rotation") and height and width and values.numbers(box, 4):
        # It turns in pixels, in which both directions are equally long.
        scale = [width / 100, height / 100] * 2
        box = turned([side * by for side, by in zip(box, scale)], value["rotation"], centre=False)
        return Object(names[0], box, 0.0, {"where": where})
    return Object(names[0], box, 100.0, {"where": where})


def _labelme(paths: list[Path], folder: Folder) -> Found:
    def read(path: Path) -> Entry:
        return of_labelme(path, folder)

    return Found("LabelMe JSON", paths[0].parent, lambda problems: one_by_one(paths, read, problems))


def of_labelme(path: Path, folder: Folder) -> Entry:
    """The image of LabelMe's file; its outlines become the boxes around them."""
    content = read_json(path)
    objects = []
    for shape in content["shapes"]:
        fields = shape if isinstance(shape, Mapping) else {}
        points, kind = fields.get("points"), fields.get("shape_type", "polygon")
        if kind in ("point", "line", "linestrip", "points"):
            continue
        box = None
        if isinstance(points, list):
            box = _around_circle(points) if kind == "circle" else of_points(points)
        objects.append(Object(fields.get("label"), box, 0.0, {"where": str(path)}))
    size = (content.get("imageHeight"), content.get("imageWidth"))
    name = values.text(content.get("imagePath")) or ""
    image = folder.image(name, path.parent) or folder.image(path.stem, path.parent) or name
    return Entry(image, path.parent, str(path), objects, size, part_of(folder.words(path.parent)))


def _around_circle(points: list[Any]) -> Any:
    """Of its centre and a point on it."""
    try:
        (x, y), (ex, ey) = points
        return of_centre(x, y, *[2 * math.hypot(ex - x, ey - y)] * 2)
    except (TypeError, ValueError, OverflowError):
        return None


def _list(content: Any, key: str) -> Iterable[Any]:
    return content[key] if isinstance(content.get(key), list) else []
