# SPDX-License-Identifier: Apache-2.0
"""A small data set in COCO's format, drawn anew for each test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gfl.data.coco import CocoDataset

CATEGORIES = [{"id": 7, "name": "cup"}, {"id": 3, "name": "ball"}, {"id": 90, "name": "kite"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an annotation file of the given lists; returns its path."""

    def write(name: str = "annotations.json", **content: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"categories": CATEGORIES, "images": [], "annotations": [], **content}))
        return path

    return write


@pytest.fixture
def photos(tmp_path: Path, generator: torch.Generator) -> Callable[[int], list[dict[str, Any]]]:
    """Draws that many images of random sizes into the folder ``images``; returns the list of them."""

    def draw(number: int) -> list[dict[str, Any]]:
        (tmp_path / "images").mkdir(exist_ok=True)
        images = []
        for n in range(number):
            height, width = torch.randint(24, 65, (2,), generator=generator).tolist()
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{n}.png")
            images.append({"id": 1000 - 3 * n, "file_name": f"{n}.png", "height": height, "width": width})
        return images

    return draw


@pytest.fixture
def dataset(
    write: Callable[..., Path], photos: Callable[[int], list[dict[str, Any]]], tmp_path: Path
) -> Callable[[int], CocoDataset]:
    """A data set of that many images, each with one or two objects."""

    def make(number: int) -> CocoDataset:
        images = photos(number)
        annotations = [
            {"image_id": i["id"], "category_id": CATEGORIES[n % 3]["id"], "bbox": [2 + k, 3, 10.5, 8]}
            for n, i in enumerate(images)
            for k in range(1 + n % 2)
        ]
        return CocoDataset(write(images=images, annotations=annotations), tmp_path / "images")

    return make
