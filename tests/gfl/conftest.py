# SPDX-License-Identifier: Apache-2.0
"""A data set of a few drawn images, and a detector that is quick on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fake_cuda
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from gfl.config import Config, preset
from gfl.models import GFL, build

CLASSES = ("disc", "box")
SIDE = 64


def draw_data_set(folder: Path, images: int, generator: torch.Generator) -> Path:
    """Discs and boxes on grey, in COCO's layout with the names train and val for the same images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content: dict[str, list[dict[str, object]]] = {
        "categories": [{"id": 3 * n + 2, "name": name} for n, name in enumerate(CLASSES)],
        "images": [],
        "annotations": [],
    }
    for number in range(images):
        picture = Image.new("RGB", (SIDE, SIDE), (90, 90, 90))
        pen = ImageDraw.Draw(picture)
        for _ in range(2):
            kind = int(torch.randint(2, (), generator=generator))
            size = int(torch.randint(14, 30, (), generator=generator))
            x, y = torch.randint(0, SIDE - size, (2,), generator=generator).tolist()
            shape = (pen.ellipse, pen.rectangle)[kind]
            shape((x, y, x + size - 1, y + size - 1), fill=((230, 60, 40), (40, 80, 230))[kind])
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 3 * kind + 2,
                    "bbox": [x, y, size, size],
                    "area": size * size,
                    "iscrowd": 0,
                }
            )
        picture.save(folder / "images" / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(name="draw_data_set")
def _draw_data_set() -> Callable[[Path, int, torch.Generator], Path]:
    return draw_data_set


@pytest.fixture
def small(tmp_path: Path, generator: torch.Generator) -> Callable[..., Config]:
    """A configuration that trains a small detector on 8 small images in seconds; takes fields to change."""
    folder = draw_data_set(tmp_path / "data", 8, generator)

    def make(**fields: object) -> Config:
        return preset("gfl_tiny").replace(
            **{
                "data": str(folder),
                "train_annotations": "annotations.json",
                "val_annotations": "annotations.json",
                "train_images": "images",
                "val_images": "images",
                "workers": 0,
                "width": 8,
                "neck_channels": 8,
                "head_channels": 8,
                "head_convs": 1,
                "head_groups": 2,
                "strides": (8, 16, 32),
                "short_side": SIDE,
                "long_side": SIDE,
                "train_short_side": (48, SIDE),
                "train_long_side": SIDE,
                "batch_size": 2,
                "epochs": 2,
                "lr_drops": (1,),
                "lr": 0.04,
                "warmup_steps": 2,
                "log_steps": 1,
                "eval_every": 0,
                **fields,
            }
        )

    return make


@pytest.fixture
def model(generator: torch.Generator) -> GFL:
    """A small network whose class logits spread enough for detections of every class."""
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    config = preset("gfl_tiny").replace(num_classes=3, width=8, neck_channels=16, head_channels=16, head_groups=4)
    model = build(config.model, config.test).eval()
    with torch.no_grad():
        model.bbox_head.gfl_cls.weight.normal_(std=0.5)
        model.bbox_head.gfl_reg.weight.normal_(std=0.3)
        model.bbox_head.gfl_cls.bias.fill_(-2)
    return model


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """Photos of several sizes and both orientations, a file that is no photo, and one that is broken."""
    rng = np.random.default_rng(seed)
    for name, size in (("b.png", (80, 120)), ("a.jpg", (120, 80)), ("c.PNG", (64, 64)), ("d.bmp", (80, 120))):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photo")
    (tmp_path / "inner").mkdir()
    return tmp_path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.FakeCuda:
    return fake_cuda.FakeCuda(monkeypatch)
