# SPDX-License-Identifier: Apache-2.0
"""The recipe for data of one's own: what it sets, and that it learns from few images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gfl import checkpoint, cli
from gfl.commands import train as command
from gfl.config import RECIPES, SECTION_OF, Config, preset
from gfl.engine.train import LAST, train

Small = Callable[..., Config]


def started(*words: str) -> Config:
    from gfl import config

    options = cli.parser().parse_args(["train", "--out", "run", *words])
    return config.overrides(command._start(options), options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_a_preset_and_typed_options_win(recipe: str) -> None:
    fields = RECIPES[recipe]
    assert fields.keys() <= SECTION_OF.keys()
    made = started("--config", "gfl_r18_1x", "--recipe", recipe, "--epochs", "3")
    assert made.train.epochs == 3 and made == preset("gfl_r18_1x").replace(**fields).replace(epochs=3)
    assert started("--config", "gfl_r18_1x") == preset("gfl_r18_1x")


def test_the_network_is_the_checkpoints_it_starts_from(small: Small, tmp_path: Path) -> None:
    train(small(epochs=1, val_annotations=""), tmp_path / "first", device="cpu")
    init = tmp_path / "first" / LAST
    made = started("--init", str(init), "--recipe", "finetune")
    stored = checkpoint.model_from(init).config
    assert made.model == stored.model and made.test == stored.test and made.train.init == str(init)
    assert made.train.train_short_side == stored.train.train_short_side
    assert made.train.schedule == "cosine" and made.data.data == Config().data.data


@pytest.mark.slow
def test_a_hundred_images_are_enough(tmp_path: Path, draw_data_set: Callable[..., Path]) -> None:
    """The command of docs/training.md on drawn images, evaluated on others."""
    for seed, (name, images) in enumerate((("train", 100), ("val", 40))):
        draw_data_set(tmp_path / name, images, torch.Generator().manual_seed(seed))
    words = ["train", "--recipe", "finetune", "--config", "gfl_tiny", "--backbone-weights", "none", "--workers", "0"]
    for part in ("train", "val"):
        words += [f"--{part}-annotations", f"{part}/annotations.json", f"--{part}-images", f"{part}/images"]
    for option, value in (("short-side", "64"), ("long-side", "64"), ("train-short-side", "64,64")):
        words += [f"--{option}", value]
    words += ["--train-long-side", "64", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main(words) == 0
    measured = (tmp_path / "run" / "evaluations.csv").read_text().splitlines()
    print(measured[0], measured[-1], sep="\n")
    assert float(dict(zip(measured[0].split(","), measured[-1].split(",")))["AP"]) > 0.3
