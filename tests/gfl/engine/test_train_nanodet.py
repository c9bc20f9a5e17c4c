# SPDX-License-Identifier: Apache-2.0
"""NanoDet-Plus is trained as any other detector: the loss falls, and a stopped training ends with the same weights."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gfl import Detector, checkpoint
from gfl.config import Config
from gfl.engine.folder import BEST, LAST
from gfl.engine.log import STEPS
from gfl.engine.step import Step
from gfl.engine.train import train
from gfl.models.losses import AUXILIARY, LOSSES

FIELDS = {"backbone": "shufflenetv2", "neck": "ghost_pan", "head": "nanodet_plus", "reg_max": 7}
FIELDS |= {"channel_order": "bgr", "resize": "stretch", "optimizer": "adamw", "schedule": "cosine"}
FIELDS |= {"train_short_side": (64, 64), "weight_decay": 0.05, "clip_grad_norm": 35.0, "val_annotations": ""}
FIELDS |= {"assignment": "soft_labels", "topk": 13, "aux_convs": 1, "aux_epochs": 1}


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
    """Within the first epoch, after which the auxiliary head is detached, with an average of the weights."""
    config = small(**FIELDS, lr=0.01, checkpoint_steps=2, ema=0.9)
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
    assert any(key.startswith("aux_head.") for key in whole["state_dict"])
    for kind in ("state_dict", "ema"):
        for key, value in whole[kind].items():
            assert torch.equal(value, stopped[kind][key]), key


def test_the_auxiliary_head_is_detached_after_its_epochs(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, detached = Step.__call__, []

    def note(self: Step, *arguments: object) -> None:
        detached.append(self.model.aux_detached)
        step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Step, "__call__", note)
    train(small(**FIELDS, lr=0.01), tmp_path, device="cpu")
    assert detached == [False] * 4 + [True] * 4


def test_only_a_training_keeps_the_auxiliary_head(small: Callable[..., Config], tmp_path: Path) -> None:
    fields = FIELDS | {"val_annotations": "annotations.json"}
    train(small(**fields, lr=0.01, ema=0.9), tmp_path, device="cpu")
    with (tmp_path / STEPS).open() as file:
        row = next(csv.DictReader(file))
    parts = [float(row[name]) for name in (*LOSSES, AUXILIARY)]
    assert float(row["loss"]) == pytest.approx(sum(parts), rel=1e-4) and min(parts) > 0
    best, last = (checkpoint.read(tmp_path / name) for name in (BEST, LAST))
    assert last["state_dict"].keys() - best["state_dict"].keys() == {k for k in last["ema"] if k.startswith("aux_")}
    assert not any(key.startswith("aux_") for key in best["state_dict"])
    for file in (LAST, BEST):
        model = Detector(tmp_path / file).model
        assert model.aux_head is None and model.config.aux_convs == 1
        for key, value in model.state_dict().items():
            assert torch.equal(value, last["ema"][key])


@pytest.mark.slow
def test_training_finds_objects(small: Callable[..., Config], tmp_path: Path) -> None:
    """Drawn discs and boxes, from scratch: with all of it, and nothing of the backbone known before."""
    fields = FIELDS | {"val_annotations": "annotations.json", "train_short_side": (64, 64), "aux_epochs": 30}
    sizes = {"width": 24, "neck_channels": 32, "head_channels": 32}
    metrics = train(small(**fields, **sizes, lr=0.03, epochs=80, ema=0.99, eval_every=0), tmp_path, device="cpu")
    assert metrics["AP50"] > 0.5
