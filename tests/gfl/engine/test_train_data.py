# SPDX-License-Identifier: Apache-2.0
"""Trainings on data as people have them, with augmentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import layout_writers
import pytest
import torch
from PIL import Image

from gfl import checkpoint
from gfl.cli import main
from gfl.config import Config
from gfl.data.layouts.folder import BATCH
from gfl.engine.train import LAST, train

Small = Callable[..., Config]
STEPS = "mosaic,mixup=0.5,copypaste,crop,jitter,color"


def found(small: Small, folder: Path, **fields: object) -> Config:
    """The small configuration with data that are found in a folder of Pascal VOC's form."""
    folder.mkdir()
    layout_writers.voc(folder)
    names = ("train_images", "val_images", "train_annotations", "val_annotations")
    return small(data=folder, epochs=2, **{name: getattr(Config().data, name) for name in names}, **fields)


def test_a_folder_is_all_that_a_training_and_an_evaluation_need(small: Small, tmp_path: Path) -> None:
    config, out = found(small, tmp_path / "set"), tmp_path / "run"
    assert "AP" in train(config, out, device="cpu")
    saved = checkpoint.read(out / LAST)
    assert saved["meta"]["classes"] == ["ball", "cup"]
    assert "training data: 3 images in the format Pascal VOC XML" in (out / "train.log").read_text()
    with Image.open(out / BATCH) as picture:
        assert picture.width > 500 and len(picture.resize((40, 40)).getcolors(1600) or ()) > 20
    assert main(["eval", str(out / LAST), "--data", str(tmp_path / "set"), "--device", "cpu"]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_augmented_training_resumes_exactly(workers: int, small: Small, tmp_path: Path) -> None:
    config = found(small, tmp_path / "set", augment=STEPS, workers=workers)
    train(config, tmp_path / "whole", device="cpu")
    train(config.replace(epochs=1), tmp_path / "parts", device="cpu")
    train(config, tmp_path / "parts", resume=True, device="cpu")
    train(config.replace(augment=""), tmp_path / "plain", device="cpu")
    whole, parts, plain = (
        checkpoint.read(tmp_path / name / LAST)["state_dict"] for name in ("whole", "parts", "plain")
    )
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert not all(torch.equal(value, plain[key]) for key, value in whole.items())
