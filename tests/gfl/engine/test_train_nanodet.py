# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus is trained as any other detector: the loss falls, and a stopped training ends with the same weights."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gfl import checkpoint
from gfl.config import Config
from gfl.engine.folder import LAST
from gfl.engine.log import STEPS
from gfl.engine.step import Step
from gfl.engine.train import train

FIELDS = {"backbone": "shufflenetv2", "neck": "ghost_pan", "head": "nanodet_plus", "reg_max": 7}
FIELDS |= {"channel_order": "bgr", "resize": "stretch", "optimizer": "adamw", "schedule": "cosine"}
FIELDS |= {"train_short_side": (64, 64), "weight_decay": 0.05, "clip_grad_norm": 35.0, "val_annotations": ""}


def losses(out: Path) -> list[float]:
    with (out / STEPS).open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_loss_falls(small: Callable[..., Config], tmp_path: Path) -> None:
    """From where the objects are found on: box losses are weighted by the class scores, which begin at 0.01."""
    train(small(**FIELDS, width=16, neck_channels=16, head_channels=16, lr=0.04, epochs=24), tmp_path, device="cpu")
    epochs = torch.tensor(losses(tmp_path)).view(24, -1).mean(1)
    assert epochs[-1] < 0.9 * epochs.max()


def test_a_stopped_training_ends_the_same(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(**FIELDS, lr=0.01, checkpoint_steps=2)
    train(config, tmp_path / "whole", device="cpu")
    step, count = Step.__call__, 0

    def stop(self: Step, *arguments: object) -> None:
        nonlocal count
        step(self, *arguments)  # type: ignore[arg-type]
        count += 1
        if count == 3:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", stop)
        with pytest.raises(SystemExit):
            train(config, tmp_path / "stopped", device="cpu")
    train(config, tmp_path / "stopped", resume=True, device="cpu")
    whole, stopped = (checkpoint.read(tmp_path / name / LAST) for name in ("whole", "stopped"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, stopped["state_dict"][key]), key
