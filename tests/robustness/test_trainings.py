# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed, damaged, started twice, or get numbers that are none."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import file_fuzz
import pytest
import torch

from gfl import checkpoint
from gfl.cli import main
from gfl.config import Config, preset
from gfl.engine import folder
from gfl.engine.step import Step
from gfl.engine.train import train
from gfl.files import LOCK


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file_fuzz.data_set(tmp_path / "data", 6)
    sides = {"short_side": 32, "long_side": 32, "train_short_side": (32, 32), "train_long_side": 32}
    names = {f"{part}_{kind}": value for part in ("train", "val")
             for kind, value in (("annotations", "annotations.json"), ("images", "images"))}  # fmt: skip
    small = {"width": 8, "neck_channels": 8, "head_channels": 8, "head_convs": 1, "head_groups": 2, "workers": 0}
    steps = {"batch_size": 2, "epochs": 2, "lr_drops": (), "warmup_steps": 2, "log_steps": 1, "checkpoint_steps": 1}
    return preset("gfl_tiny").replace(data=str(tmp_path / "data"), **sides, **names, **small, **steps, eval_every=0)


def weights(out: Path, name: str = folder.LAST) -> dict[str, torch.Tensor]:
    return checkpoint.read(out / name)["state_dict"]


def equal(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(config: Config, tmp_path: Path, seed: int) -> None:
    config = config.replace(val_annotations="")
    train(config, tmp_path / "whole", device="cpu")
    out = tmp_path / "run"
    train(config.replace(epochs=1), out, device="cpu")
    last = out / folder.LAST
    content = bytearray(last.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 8
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt: .*now damaged\.pt, and last\.pt is the one before it, of step 2"):
        train(config, out, resume=True, device="cpu")
    assert (out / folder.DAMAGED).read_bytes() == content
    train(config, out, resume=True, device="cpu")
    assert equal(out, tmp_path / "whole")
    for name in (folder.LAST, folder.PREVIOUS):
        (out / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no checkpoint before it is whole"):
        train(config, out, resume=True, device="cpu")


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, count = Step._backward, iter(range(100))

    def poisoned(self: Step, losses: dict[str, torch.Tensor]) -> None:
        if next(count) == 2:
            losses["loss_cls"].register_hook(lambda gradient: gradient * float("inf"))
        backward(self, losses)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "_backward", poisoned)
        with pytest.raises(RuntimeError, match="the weights are no longer finite by step 3"):
            train(config, tmp_path / "run", device="cpu")
    saved = checkpoint.read(tmp_path / "run" / folder.LAST)
    assert saved["training"]["position"]["step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    train(config, tmp_path / "run", resume=True, device="cpu")


def test_without_an_object_there_is_no_best(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((tmp_path / "data" / "annotations.json").read_text()) | {"annotations": []}
    (tmp_path / "data" / "none.json").write_text(json.dumps(content))
    config.replace(epochs=1, val_annotations="none.json").save(tmp_path / "config.json")
    words = ["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "no AP" in said.out and "last.pt" in said.out and "best" not in said.out
    assert not (tmp_path / "run" / folder.BEST).exists()
    assert "no object to find" in (tmp_path / "run" / "train.log").read_text()


def test_a_state_of_another_form_is_refused_by_name(config: Config, tmp_path: Path) -> None:
    """As of a version that kept less, or more, beside the weights."""
    config, out = config.replace(epochs=1, val_annotations=""), tmp_path / "run"
    train(config, out, device="cpu")
    sound = checkpoint.read(out / folder.LAST)
    state, optimizer = sound["training"], sound["optimizer"]
    changes = [{"training": {k: v for k, v in state.items() if k != name}} for name in state]
    changes += [{"training": {**state, "position": {**state["position"], "step": step}}} for step in ("7", -1, None)]
    changes += [{"training": {**state, name: "\x1b[2J"}} for name in ("sums", "generator", "threads")]
    changes += [{"training": [1]}, {"optimizer": "x"}, {"optimizer": {}}, {"meta": {}}, {"meta": None}]
    changes += [{"optimizer": {**optimizer, "param_groups": groups}} for groups in ([], None, [{}])]
    for change in changes:
        checkpoint.write(out / folder.LAST, {**sound, **change})
        with pytest.raises(ValueError, match=r"last\.pt"):
            train(config, out, resume=True, device="cpu")
    checkpoint.write(out / folder.LAST, sound)
    train(config.replace(epochs=2), out, resume=True, device="cpu")


@pytest.mark.parametrize("what", ["label", "box", "order", "pixels"])
def test_data_that_changed_are_noticed(what: str, config: Config, tmp_path: Path) -> None:
    train(config.replace(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    path = tmp_path / "data" / "annotations.json"
    content = json.loads(path.read_text())
    if what == "label":
        content["annotations"][0]["category_id"] = 2
    elif what == "box":
        content["annotations"][0]["bbox"][0] += 1
    elif what == "order":
        content["images"].reverse()
    else:
        (tmp_path / "data" / "images" / "2.png").write_bytes((tmp_path / "data" / "images" / "3.png").read_bytes())
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the training data are no longer those"):
        train(config.replace(val_annotations=""), tmp_path / "run", resume=True, device="cpu")


def test_a_start_from_weights_of_another_geometry_is_refused(config: Config, tmp_path: Path) -> None:
    train(config.replace(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    start = {"init": str(tmp_path / "run" / folder.LAST), "val_annotations": "", "epochs": 1}
    with pytest.raises(ValueError, match=r"last\.pt: its `head_groups` is 2, this network's 4"):
        train(config.replace(**start, head_groups=4), tmp_path / "other", device="cpu")
    train(config.replace(**start), tmp_path / "same", device="cpu")


def test_half_a_configuration_hinders_nobody(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / folder.CONFIG).write_text('{"model": {')
    with pytest.raises(ValueError, match="holds no training to resume"):
        train(config, out, resume=True, device="cpu")
    train(config.replace(epochs=1, val_annotations=""), out, device="cpu")
    (out / folder.CONFIG).write_text("")
    assert folder.stored_config(out).train.epochs == 1


def command(config: Config, out: Path, *more: str) -> list[str]:
    config.save(out.with_suffix(".json"))
    words = ["--config", str(out.with_suffix(".json")), "--out", str(out), "--device", "cpu", *more]
    return [sys.executable, "-m", "gfl.cli", "train", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_a_second_training_in_the_folder_is_refused_by_the_owners_name(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(config.replace(epochs=10**6), out), env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (out / folder.LAST).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
                train(config, out, resume=resume, device="cpu")
    finally:
        process.kill()
        process.wait()
    step = checkpoint.read(out / folder.LAST)["training"]["position"]["step"]
    # The killed one's lock is taken over, and said.
    train(config.replace(epochs=step // 3 + 2), out, resume=True, device="cpu")
    assert f"taken over from process {process.pid} on" in (out / "train.log").read_text()
    assert not (out / LOCK).exists()


@pytest.mark.slow
def test_thirty_kills(config: Config, tmp_path: Path, seed: int) -> None:
    """SIGKILL at drawn moments: the last weights are those of a training that nobody killed, bit for bit."""
    config = config.replace(epochs=40, val_annotations="")
    started = time.monotonic()
    subprocess.run(command(config, tmp_path / "whole"), check=True, env=environment(), capture_output=True)
    duration = time.monotonic() - started
    out, moments, more = tmp_path / "killed", random.Random(seed), []
    for _ in range(30):
        process = subprocess.Popen(command(config, out, *more), env=environment(), stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.3, 1.1) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        more = ["--resume"] if (out / folder.CONFIG).exists() else []
    subprocess.run(command(config, out, *more), check=True, env=environment(), capture_output=True)
    assert equal(out, tmp_path / "whole")
    assert not list(out.glob(".part-*"))
