# SPDX-License-Identifier: Apache-2.0
"""One small data set, written as each labelling tool and trainer writes it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("ball", "cup")
# Of each image: part, (width, height), and boxes as (class, x1, y1, x2, y2).
TRUTH: dict[str, tuple[str, tuple[int, int], list[tuple[int, int, int, int, int]]]] = {
    "a": ("train", (64, 48), [(0, 4, 8, 20, 40), (1, 32, 0, 64, 24)]),
    "b": ("train", (40, 80), [(1, 10, 20, 30, 60)]),
    "c": ("train", (64, 64), [(0, 16, 16, 48, 32)]),
    "d": ("val", (80, 40), [(1, 8, 10, 40, 30), (0, 0, 0, 16, 8)]),
    "e": ("val", (48, 48), [(0, 12, 24, 36, 48)]),
}
Writer = Callable[[Path], Path]
WRITERS: dict[str, Writer] = {}


def writer(function: Writer) -> Writer:
    """Registers a function that writes the set into a folder and returns what `--data` is given."""
    WRITERS[function.__name__] = function
    return function


def photo(path: Path, number: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def photos(place: Callable[[str, str], Path]) -> None:
    """All images, each where its name and part say."""
    for number, (name, (part, size, _)) in enumerate(TRUTH.items()):
        photo(place(name, part), number, size)


def coco(part: str | None, name: Callable[[str], str], categories: list[dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {"categories": categories, "images": [], "annotations": []}
    first = max(c["id"] for c in categories) - 1
    for number, (key, (of, (width, height), boxes)) in enumerate(TRUTH.items(), 1):
        if part not in (None, of):
            continue
        content["images"].append({"id": number, "file_name": name(key), "width": width, "height": height})
        for label, x1, y1, x2, y2 in boxes:
            box = {"image_id": number, "category_id": first + label, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            content["annotations"].append({"id": len(content["annotations"]) + 1, **box, "iscrowd": 0})
    return content


def plain() -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]


def yolo_lines(key: str) -> str:
    _, (width, height), boxes = TRUTH[key]
    rows = [
        (c, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        for c, x1, y1, x2, y2 in boxes
    ]
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


@writer
def yolo_images_labels(root: Path) -> Path:
    """As ultralytics' data sets: images/train, labels/train, a data.yaml with another machine's path."""
    photos(lambda name, part: root / "images" / part / f"{name}.jpg")
    for key, (part, _, _) in TRUTH.items():
        (root / "labels" / part).mkdir(parents=True, exist_ok=True)
        (root / "labels" / part / f"{key}.txt").write_text(yolo_lines(key))
    text = (
        f"path: /home/someone/set\ntrain: images/train\nval: images/val\nnames:\n  0: {CLASSES[0]}\n  1: {CLASSES[1]}\n"
    )
    (root / "data.yaml").write_text(text)
    return root


@writer
def yolo_roboflow(root: Path) -> Path:
    """train and valid with images and labels in each; paths that begin with "../" and mean the folder itself."""
    places = {"train": "train", "val": "valid"}
    photos(lambda name, part: root / places[part] / "images" / f"{name}_jpg.rf.0123.jpg")
    for key, (part, _, _) in TRUTH.items():
        label = root / places[part] / "labels" / f"{key}_jpg.rf.0123.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(yolo_lines(key))
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n"
    text += f"names: ['{CLASSES[0]}', '{CLASSES[1]}']\n"
    (root / "data.yaml").write_text(text)
    (root / "README.roboflow.txt").write_text("exported\n")
    return root / "data.yaml"


@writer
def yolo_cvat(root: Path) -> Path:
    """CVAT's YOLO 1.1."""
    places = {"train": "obj_train_data", "val": "obj_valid_data"}
    photos(lambda name, part: root / places[part] / f"{name}.jpg")
    for key, (part, _, _) in TRUTH.items():
        (root / places[part] / f"{key}.txt").write_text(yolo_lines(key))
    (root / "obj.names").write_text("\n".join(CLASSES) + "\n")
    (root / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    (root / "train.txt").write_text("data/obj_train_data/a.jpg\n")
    return root


@writer
def coco_roboflow(root: Path) -> Path:
    """A file beside the images of each part, with a category for the project above the others."""
    categories = [{"id": 0, "name": "things", "supercategory": "none"}]
    categories += [{**c, "supercategory": "things"} for c in plain()]
    for part, place in (("train", "train"), ("val", "valid")):
        photos(lambda name, of: root / {"train": "train", "val": "valid"}[of] / f"{name}.jpg")
        content = coco(part, lambda name: f"{name}.jpg", categories)
        (root / place / "_annotations.coco.json").write_text(json.dumps(content))
    return root


@writer
def coco_cvat(root: Path) -> Path:
    """CVAT's COCO 1.0: annotations/instances_PART.json and images in folders."""
    photos(lambda name, part: root / "images" / part / f"{name}.jpg")
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        content = coco(part, lambda name: f"{name}.jpg", plain())
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@writer
def voc(root: Path) -> Path:
    photos(lambda name, part: root / "JPEGImages" / f"{name}.jpg")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for part in ("train", "val"):
        names = [key for key, value in TRUTH.items() if value[0] == part]
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
    for key, (_, (width, height), boxes) in TRUTH.items():
        objects = "".join(
            f"<object><name>{CLASSES[c]}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for c, x1, y1, x2, y2 in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        text = f"<annotation><folder>x</folder><filename>{key}.jpg</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{key}.xml").write_text(text)
    return root


@writer
def cvat_xml(root: Path) -> Path:
    photos(lambda name, part: root / "images" / f"{name}.jpg")
    labels = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    images = []
    for number, (key, (part, (width, height), boxes)) in enumerate(TRUTH.items()):
        inner = "".join(
            f'<box label="{CLASSES[c]}" occluded="0" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0"></box>'
            for c, x1, y1, x2, y2 in boxes
        )
        head = f'<image id="{number}" name="{key}.jpg" subset="{part}" width="{width}" height="{height}">'
        images.append(f"{head}{inner}</image>")
    meta = f"<meta><job><labels>{labels}</labels></job></meta>"
    (root / "annotations.xml").write_text(f"<annotations><version>1.1</version>{meta}{''.join(images)}</annotations>")
    return root


@writer
def labelme(root: Path) -> Path:
    photos(lambda name, part: root / part / f"{name}.jpg")
    for key, (part, (width, height), boxes) in TRUTH.items():
        shapes = [
            {"label": CLASSES[c], "points": [[x2, y2], [x1, y1]], "shape_type": "rectangle", "flags": {}}
            for c, x1, y1, x2, y2 in boxes
        ]
        content = {"version": "5.4", "shapes": shapes, "imagePath": f"..\\old\\{key}.jpg", "imageData": None}
        (root / part / f"{key}.json").write_text(json.dumps({**content, "imageHeight": height, "imageWidth": width}))
    return root


@writer
def csv_roboflow(root: Path) -> Path:
    places = {"train": "train", "val": "valid"}
    photos(lambda name, part: root / places[part] / f"{name}.jpg")
    for part, place in places.items():
        with (root / place / "_annotations.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
            for key, (of, size, boxes) in TRUTH.items():
                if of == part:
                    rows.writerows([f"{key}.jpg", *size, CLASSES[c], *corners] for c, *corners in boxes)
    return root


@writer
def csv_retinanet(root: Path) -> Path:
    """Without a head line, absolute paths of another machine, semicolons and a byte order mark."""
    photos(lambda name, part: root / "images" / part / f"{name}.jpg")
    for part in ("train", "val"):
        lines = ["\ufeff"]
        for key, (of, _, boxes) in TRUTH.items():
            if of == part:
                path = f"C:\\data\\images\\{part}\\{key}.jpg"
                lines += [";".join(map(str, [path, *corners, CLASSES[c]])) + "\n" for c, *corners in boxes]
        (root / f"{part}.csv").write_text("".join(lines), "utf-8")
    return root


def task(key: str) -> tuple[str, list[dict[str, Any]], tuple[int, int]]:
    _, (width, height), boxes = TRUTH[key]
    values = [
        {
            "x": 100 * x1 / width,
            "y": 100 * y1 / height,
            "width": 100 * (x2 - x1) / width,
            "height": 100 * (y2 - y1) / height,
            "rotation": 0,
            "rectanglelabels": [CLASSES[c]],
        }
        for c, x1, y1, x2, y2 in boxes
    ]
    return f"/data/upload/3/0a1b2c3d-{key}.jpg", values, (width, height)


@writer
def label_studio_min(root: Path) -> Path:
    """JSON-MIN without parts: all images are of one."""
    photos(lambda name, part: root / "media" / f"{name}.jpg")
    content = []
    for number, key in enumerate(TRUTH):
        image, values, (width, height) = task(key)
        results = [{**value, "original_width": width, "original_height": height} for value in values]
        content.append({"image": image, "id": number, "label": results, "annotator": 1, "lead_time": 3.2})
    (root / "project-1.json").write_text(json.dumps(content))
    return root


@writer
def label_studio(root: Path) -> Path:
    """JSON, of images in a synchronised folder of a Windows machine."""
    photos(lambda name, part: root / "photos" / f"{name} 1.jpg")
    content = []
    for number, key in enumerate(TRUTH):
        _, values, (width, height) = task(key)
        results = [
            {"value": value, "type": "rectanglelabels", "original_width": width, "original_height": height}
            for value in values
        ]
        data = {"image": f"/data/local-files/?d=photos%5C{key}%201.jpg"}
        content.append({"id": number, "data": data, "annotations": [{"id": 1, "result": results}], "predictions": []})
    (root / "tasks.json").write_text(json.dumps(content))
    return root / "tasks.json"


@writer
def label_studio_coco(root: Path) -> Path:
    photos(lambda name, part: root / "images" / f"0a1b2c3d-{name}.jpg")
    content = coco(None, lambda name: f"..\\..\\label-studio\\media\\0a1b2c3d-{name}.jpg", plain())
    (root / "result.json").write_text(json.dumps(content))
    return root


@writer
def label_studio_yolo(root: Path) -> Path:
    photos(lambda name, part: root / "images" / f"0a1b2c3d-{name}.jpg")
    (root / "labels").mkdir()
    for key in TRUTH:
        (root / "labels" / f"0a1b2c3d-{key}.txt").write_text(yolo_lines(key))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "notes.json").write_text(json.dumps({"categories": [{"id": 0, "name": "ball"}], "info": {}}))
    return root
