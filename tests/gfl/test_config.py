# SPDX-License-Identifier: Apache-2.0
"""Configurations: presets, files, the command line."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import pytest

from gfl import config
from gfl.config import PRESETS, Config, preset


def parsed(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    config.add_options(parser, *(name for name, _ in Config().sections()))
    return config.overrides(preset("gfl_r50_1x"), parser.parse_args(arguments))


def test_a_field_is_in_one_section_only() -> None:
    names = [part.name for _, section in Config().sections() for part in fields(section)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    preset(name).save(tmp_path / "config.json")
    assert preset(str(tmp_path / "config.json")) == preset(name)


def test_the_paper_s_schedules() -> None:
    once, twice = preset("gfl_r50_1x").train, preset("gfl_x101_32x4d_dcnv2_2x").train
    assert (once.epochs, once.lr_drops, once.train_short_side) == (12, (8, 11), (800, 800))
    assert (twice.epochs, twice.lr_drops, twice.train_short_side) == (24, (16, 22), (480, 800))
    assert preset("gfl_x101_32x4d_dcnv2_2x").model.dcn == "v2"


def test_an_option_changes_its_field_alone() -> None:
    changed = parsed("--lr", "0.02", "--dcn", "v1", "--dcn-stages", "4,5", "--no-norm-eval", "--strides", "8,16")
    want = preset("gfl_r50_1x").replace(lr=0.02, dcn="v1", dcn_stages=(4, 5), norm_eval=False, strides=(8, 16))
    assert changed == want and changed != preset("gfl_r50_1x")
    assert parsed() == preset("gfl_r50_1x")
    assert parsed("--dcn", "none").model.dcn is None


def test_the_help_explains_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    for _, section in Config().sections():
        for part in fields(section):
            assert "--" + part.name.replace("_", "-") in text
            assert part.metadata["help"].split()[0] in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": "fast"}, "`lr` must be of type float, got 'fast'"),
        ({"epochs": 1.5}, "`epochs` must be of type int, got 1.5"),
        ({"dcn": "v3"}, "`dcn` must be one of v1, v2, got 'v3'"),
        ({"loss_weights": (1, 2)}, "`loss_weights` must have 3 numbers"),
        ({"strides": 8}, "`strides` must be a list of numbers, got 8"),
        ({"norm_eval": 1}, "`norm_eval` must be true or false, got 1"),
        ({"learning_rate": 1}, "no field `learning_rate`"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config().replace(**values)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "is not a configuration"),
        ("[1]", "is not a configuration"),
        (json.dumps({"optim": {}}), "no section `optim`"),
        (json.dumps({"train": {"lrr": 1}}), "TrainConfig: no field `lrr`"),
    ],
)
def test_a_wrong_file_is_named(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        preset(str(path))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="gfl_tiny"):
        preset("gfl_r51")
