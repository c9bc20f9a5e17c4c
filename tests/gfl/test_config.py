# SPDX-License-Identifier: Apache-2.0
"""Configurations: presets, files, the command line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import gfl
from gfl import cli, commands, config
from gfl.config import PRESETS, SECTION_OF, Config, preset


def parsed(*arguments: str) -> Config:
    parser = argparse.ArgumentParser()
    config.add_options(parser, *vars(Config()))
    return config.overrides(preset("gfl_r50_1x"), parser.parse_args(arguments))


def test_a_field_is_in_one_section_only() -> None:
    names = [part.name for section in vars(Config()).values() for part in fields(section)]
    assert len(names) == len(set(names)) == len(SECTION_OF)


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
    for section in vars(Config()).values():
        for part in fields(section):
            assert "--" + part.name.replace("_", "-") in text
            assert part.metadata["help"].split()[0] in text
    assert max(map(len, text.splitlines())) <= 80
    assert "--loss-weights X,X,X" in text and "--strides N,…" in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": "fast"}, "`lr` must be of type float, got 'fast'"),
        ({"epochs": 1.5}, "`epochs` must be of type int, got 1.5"),
        ({"dcn": "v3"}, "`dcn` must be one of v1, v2, got 'v3'"),
        ({"loss_weights": (1, 2)}, "`loss_weights` must have 3 numbers"),
        ({"strides": 8}, "`strides` must be a list of numbers, got 8"),
        ({"norm_eval": 1}, "`norm_eval` must be true or false, got 1"),
        ({"data": None}, "`data` must be of type str, got None"),
        ({"learning_rate": 1}, "no field `learning_rate`"),
        ({"batchsize": 1}, "no field `batchsize`; did you mean `batch_size`?"),
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
        (json.dumps({"training": {}}), "no section `training`; did you mean `train`?"),
        (json.dumps({"train": {"lrr": 1}}), "TrainConfig: no field `lrr`; did you mean `lr`?"),
        (json.dumps({"data": {"zzz": 1}}), "DataConfig: no field `zzz`; there are data, keep_empty"),
        (json.dumps({"train": 1}), "is not a configuration"),
    ],
)
def test_a_wrong_file_is_named(content: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        preset(str(path))


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"gfl_tiny.*did you mean `gflv?2?_r50_1x`"):
        preset("gfl_r51_1x")


TOML = """
# of a run with two scales
[model]
dcn = "none"
strides = [8, 16, 32]

[train]
lr = 1e-3 # for 16 images
train_short_side = [480, 800]
fold_norms = true
"""
YAML = """
# of a run with two scales
model:
  dcn: none
  strides: [8, 16, 32]
train:
  lr: 1e-3 # for 16 images
  train_short_side: [480, 800]
  fold_norms: true
"""


@pytest.mark.parametrize(("suffix", "content"), [("toml", TOML), ("yaml", YAML), ("yml", YAML)])
def test_a_file_with_comments(suffix: str, content: str, tmp_path: Path) -> None:
    (path := tmp_path / f"mine.{suffix}").write_text(content)
    if suffix != "toml" and importlib.util.find_spec("yaml") is None:
        with pytest.raises(RuntimeError, match="pip install pyyaml"):
            preset(str(path))
        return
    want = Config().replace(strides=(8, 16, 32), lr=1e-3, train_short_side=(480, 800), fold_norms=True)
    assert preset(str(path)) == want
    path.write_text(content + "[")
    with pytest.raises(ValueError, match=rf"mine.{suffix} is not a configuration: "):
        preset(str(path))


def test_files_written_before_still_load(tmp_path: Path) -> None:
    """The section and field names are those of the first version's config.json and checkpoints."""
    before = {
        "model": {"backbone": "resnet18", "dcn": None, "loss_weights": [1.0, 2.0, 0.25], "topk_mode": "pair"},
        "data": {"data": "coco", "keep_empty": False},
        "train": {"backbone_weights": "none", "lr_drops": [8, 11], "clip_grad_norm": 35, "amp": "bf16"},
        "test": {"short_side": 320, "score_threshold": 0.1, "test_batch_size": 4},
    }
    (path := tmp_path / "config.json").write_text(json.dumps(before))
    config = preset(str(path))
    assert config == Config.from_dict(before)
    assert (config.test.short_side, config.train.clip_grad_norm, config.data.data) == (320, 35.0, "coco")
    assert list(config.to_dict()) == list(before)
    assert {name: values.items() <= config.to_dict()[name].items() for name, values in before.items()} == dict.fromkeys(
        before, True
    )


# The command line


def test_help_lists_every_command_on_one_line_without_torch() -> None:
    code = "import sys; from gfl import cli; cli.parser().print_help(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert done.stdout.endswith("\nFalse\n"), done.stderr
    lines = done.stdout.partition("  COMMAND\n")[2].partition("\n\n")[0].splitlines()
    listed = [line.split()[0] for line in lines]
    assert listed == list(cli.COMMANDS)
    modules = {path.stem for path in Path(commands.__path__[0]).glob("[a-z]*.py")}
    assert modules == set(listed)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_help_of_train_begins_with_what_one_needs_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    first = capsys.readouterr().out.split("data options:")[0]
    for option in (
        "config",
        "out",
        "resume",
        "device",
        "data",
        "backbone-weights",
        "epochs",
        "batch-size",
        "lr",
        "amp",
    ):
        assert f"  --{option}" in first


def test_an_unknown_option_suggests_one(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["train", "--out", "x", "--learning-rates=1"], "unknown option --learning-rates=1"),
        (["train", "--out", "x", "--batchsize", "2"], "unknown option --batchsize; did you mean `--batch-size`?"),
        (["eval", "x.pt", "--per-clas", "--dat2"], "did you mean `--data`?"),
    ):
        with pytest.raises(SystemExit) as info:
            cli.main(arguments)
        assert info.value.code == 2 and text in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        cli.main(["--version"])
    assert info.value.code == 0 and capsys.readouterr().out == f"gfl-ops {gfl.__version__}\n"


def test_the_package_s_names_are_there_when_asked_for() -> None:
    assert {*gfl.__all__} <= {*dir(gfl)} and all(getattr(gfl, name) is not None for name in gfl.__all__)
    assert gfl.models.create_model is gfl.create_model
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gfl.nothing
