# SPDX-License-Identifier: Apache-2.0
"""Training from end to end: what it writes, and that stopping it at any moment loses nothing."""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_data
import torch
from torch import Tensor

from gfl import checkpoint
from gfl.config import Config, TrainConfig, preset
from gfl.demo.course import computes_bf16
from gfl.detector import Detector
from gfl.engine import train as training
from gfl.engine.log import EVALUATIONS, STEPS, TEXT
from gfl.engine.optimizer import make_optimizer
from gfl.engine.step import Step
from gfl.engine.train import BEST, CONFIG, LAST, train
from gfl.models.losses import LOSSES

Small = Callable[..., Config]
# What differs from one run to the next by its nature.
TIMES = ("images_per_second", "seconds", "data_wait", "memory_gib")


def weights(folder: Path, name: str = LAST) -> dict[str, Tensor]:
    return checkpoint.read(folder / name)["state_dict"]


def rows(folder: Path, name: str = STEPS) -> list[dict[str, str]]:
    with (folder / name).open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_same_training(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert rows(a) == rows(b)
    assert rows(a, EVALUATIONS) == rows(b, EVALUATIONS)


def command(config: Config, out: Path, *more: str) -> list[str]:
    path = out.with_suffix(".json")
    config.save(path)
    return [
        sys.executable,
        "-m",
        "gfl.cli",
        "train",
        "--config",
        str(path),
        "--out",
        str(out),
        "--device",
        "cpu",
        *more,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_a_training_leaves_its_weights_its_figures_and_its_configuration(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = small(eval_every=1)
    metrics = train(config, out, device="cpu")
    assert 0 <= metrics["AP"] <= 1
    steps = rows(out)
    assert [int(row["step"]) for row in steps] == list(range(1, 9))
    assert [row["epoch"] for row in steps] == ["1"] * 4 + ["2"] * 4
    assert all(float(row["loss"]) == pytest.approx(sum(float(row[k]) for k in LOSSES), rel=1e-4) for row in steps)
    assert [row["step"] for row in rows(out, EVALUATIONS)] == ["4", "8"]
    assert "8 images, 2 classes; 2 epochs of 4 steps of 2 images" in (out / TEXT).read_text()
    # The data's two classes, not the preset's 80.
    assert preset(str(out / CONFIG)).model.num_classes == 2
    saved = checkpoint.read(out / BEST)
    assert saved["meta"]["classes"] == ["disc", "box"]
    model, read, classes, ids = checkpoint.model_from(out / BEST)
    # As the annotation file numbers them.
    assert ids == Detector(out / BEST).category_ids == [2, 5]
    assert classes == ["disc", "box"] and read.model.num_classes == 2
    assert model.state_dict().keys() == saved["state_dict"].keys()


def test_it_learns(small: Small, tmp_path: Path) -> None:
    config = small(epochs=40, lr_drops=(30,), lr=0.1, warmup_steps=20, width=16, neck_channels=16, head_channels=16)
    metrics = train(config, tmp_path / "run", device="cpu")
    assert metrics["AP50"] > 0.3


def test_the_same_seed_gives_the_same_weights_with_and_without_workers(small: Small, tmp_path: Path) -> None:
    for name, workers in (("a", 0), ("b", 2)):
        train(small(workers=workers), tmp_path / name, device="cpu")
    train(small(seed=1), tmp_path / "c", device="cpu")
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert any(
        not torch.equal(x, y) for x, y in zip(weights(tmp_path / "a").values(), weights(tmp_path / "c").values())
    )


@pytest.mark.parametrize("stop", range(1, 9, 3))
def test_a_training_that_stopped_after_any_step_ends_the_same(
    stop: int, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill would: nothing is done after the step, and what follows the last checkpoint is done again."""
    config = small(eval_every=1, checkpoint_steps=2, log_steps=3)
    train(config, tmp_path / "whole", device="cpu")

    class Killed(BaseException):
        pass

    step, done = Step.__call__, itertools.count(1)

    def and_die(self: Step, *arguments: Any) -> None:
        step(self, *arguments)
        if next(done) == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", and_die)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", device="cpu")
    metrics = train(config, tmp_path / "killed", resume=True, device="cpu")
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    assert metrics == pytest.approx(train(config, tmp_path / "whole", resume=True, device="cpu"), nan_ok=True)


def train_killed(config: Config, out: Path, kills: int, duration: float, seed: int) -> None:
    """A training that takes `duration` seconds, by the command, with SIGKILL at random moments of it."""
    more: list[str] = []
    moments = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(command(config, out, *more), env=environment(), stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.1, 0.6) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        more = ["--resume"] if (out / CONFIG).exists() else []
    subprocess.run(command(config, out, *more), check=True, env=environment(), capture_output=True)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(small: Small, tmp_path: Path, seed: int) -> None:
    """SIGKILL to a real process, wherever it is: starting, reading, in a step, in the middle of a checkpoint."""
    config = small(epochs=6, eval_every=2, checkpoint_steps=1, workers=1)
    started = time.perf_counter()
    subprocess.run(command(config, tmp_path / "whole"), check=True, env=environment(), capture_output=True)
    train_killed(config, tmp_path / "killed", 5, time.perf_counter() - started, seed)
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
def test_real_photos_are_learned_by_heart_however_often_it_is_killed(tmp_path: Path, seed: int) -> None:
    config = preset("gfl_tiny").replace(
        data=str(real_data.COCO),
        train_annotations=real_data.annotations().name,
        val_annotations=real_data.annotations().name,
        train_images="images",
        val_images="images",
        short_side=320,
        long_side=320,
        train_short_side=(320, 320),
        train_long_side=320,
        strides=(8, 16, 32, 64),
        anchor_scale=6.0,
        batch_size=8,
        epochs=100,
        eval_every=0,
        checkpoint_steps=2,
        optimizer="adamw",
        lr=5e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=100,
        flip=0.0,
        amp="bf16" if computes_bf16() else "none",
        workers=1,
    )
    started = time.perf_counter()
    subprocess.run(command(config, tmp_path / "whole"), check=True, env=environment(), capture_output=True)
    duration = time.perf_counter() - started
    train_killed(config, tmp_path / "killed", 4, duration, seed)
    assert_same_training(tmp_path / "whole", tmp_path / "killed")
    (figures,) = rows(tmp_path / "whole", EVALUATIONS)
    print(f"{duration:.0f} s, AP {figures['AP']}, AP50 {figures['AP50']}")
    assert float(figures["AP50"]) > 0.7


def test_a_signal_waits_for_the_step_and_a_checkpoint(small: Small, tmp_path: Path) -> None:
    config, out = small(epochs=500, val_annotations="", log_steps=1), tmp_path / "run"
    process = subprocess.Popen(command(config, out), env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.perf_counter() + 120
    while not (out / STEPS).exists() and time.perf_counter() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    position = checkpoint.read(out / LAST)["training"]["position"]
    assert position["step"] >= 1 and f"stopped after step {position['step']}" in errors
    assert "Traceback" not in errors


def test_two_processes_train_as_one(small: Small, tmp_path: Path) -> None:
    """Losses and weights of the whole batch in one process: images of one size, batch norms as they are."""
    same = {"train_short_side": (64, 64), "batch_size": 4}
    train(small(epochs=20, lr_drops=(), **same, val_annotations=""), tmp_path / "start", device="cpu")
    # Scores about a half: the boxes' weights are the scores at the positives, and with small ones their sum can fall
    # below the least normaliser of a process, which is 1, and two processes differ from one by their nature.
    start = checkpoint.read(tmp_path / "start" / LAST)
    start["state_dict"]["bbox_head.gfl_cls.bias"].zero_()
    torch.save(start, tmp_path / "start.pth")
    config = small(**same, norm_eval=True, frozen_stages=1, init=str(tmp_path / "start.pth"), backbone_weights="")
    train(config, tmp_path / "one", device="cpu")
    line = command(config, tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *line[1:]]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        for key in LOSSES:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-4, abs=1e-6), (key, a, b)
    for key, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert rows(tmp_path / "one", EVALUATIONS)[0].keys() == rows(tmp_path / "two", EVALUATIONS)[0].keys()


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision_trains(amp: str, small: Small, tmp_path: Path) -> None:
    train(small(amp=amp, epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("optimizer", ["adamw"])
@pytest.mark.parametrize("schedule", ["cosine"])
def test_the_other_optimizer_resumes_too(optimizer: str, schedule: str, small: Small, tmp_path: Path) -> None:
    settings = {"optimizer": optimizer, "schedule": schedule, "lr": 1e-3, "clip_grad_norm": 1.0, "val_annotations": ""}
    train(small(**settings), tmp_path / "whole", device="cpu")
    out = tmp_path / "parts"
    train(small(**settings, checkpoint_steps=1), out, device="cpu")
    content = checkpoint.read(out / LAST)
    content["training"]["position"].update(epoch=2)
    train(small(**settings), out, resume=True, device="cpu")
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(tmp_path / "whole")]


def test_a_rate_that_a_graph_reads_is_a_number_in_a_checkpoint(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor of ``--graph`` would bind the file to its device; a training with and without a graph resumes it."""
    config = small(epochs=1, val_annotations="")

    def with_tensor(model: torch.nn.Module, settings: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(parameters, lr=torch.tensor(settings.lr), momentum=0.9, fused=True)

    with monkeypatch.context() as patch:
        patch.setattr(training, "make_optimizer", with_tensor)
        train(config, tmp_path / "run", device="cpu")
        (group,) = checkpoint.read(tmp_path / "run" / LAST)["optimizer"]["param_groups"]
        assert type(group["lr"]) is float and group["lr"] > 0
        train(config.replace(epochs=2), tmp_path / "run", resume=True, device="cpu")
    train(config.replace(epochs=3), tmp_path / "run", resume=True, device="cpu")
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(1, 13))


def test_it_starts_from_a_checkpoint_of_other_classes(small: Small, tmp_path: Path) -> None:
    train(small(epochs=1, val_annotations=""), tmp_path / "first", device="cpu")
    content = checkpoint.read(tmp_path / "first" / LAST)
    for name in ("weight", "bias"):
        key = f"bbox_head.gfl_cls.{name}"
        content["state_dict"][key] = content["state_dict"][key][:1].repeat_interleave(5, 0)
    content["meta"]["config"]["model"]["num_classes"] = 5
    checkpoint.write(tmp_path / "five.pt", {"meta": content["meta"], "state_dict": content["state_dict"]})
    train(small(epochs=1, val_annotations="", init=str(tmp_path / "five.pt")), tmp_path / "second", device="cpu")
    assert weights(tmp_path / "second")["bbox_head.gfl_cls.bias"].shape == (2,)
    assert "for 5 classes, the model has 2" in (tmp_path / "second" / TEXT).read_text()


def test_a_training_is_not_overwritten(small: Small, tmp_path: Path) -> None:
    train(small(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    before = (tmp_path / "run" / LAST).read_bytes()
    with pytest.raises(ValueError, match="holds a training"):
        train(small(), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / LAST).read_bytes() == before


def test_there_must_be_something_to_resume(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no training to resume"):
        train(small(), tmp_path / "run", resume=True, device="cpu")


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 3}])
def test_what_decides_the_batches_cannot_change(change: dict[str, Any], small: Small, tmp_path: Path) -> None:
    train(small(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` was"):
        train(small(epochs=2, val_annotations="", **change), tmp_path / "run", resume=True, device="cpu")


def test_more_epochs_may_follow(small: Small, tmp_path: Path) -> None:
    train(small(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    train(small(epochs=2, val_annotations=""), tmp_path / "run", resume=True, device="cpu")
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == list(range(1, 9))


def test_a_loss_that_is_no_number_ends_it_before_a_checkpoint(small: Small, tmp_path: Path) -> None:
    config = small(lr=1e18, warmup_steps=0, epochs=4, checkpoint_steps=1, val_annotations="")
    with pytest.raises(RuntimeError, match="no checkpoint was written of it"):
        train(config, tmp_path / "run", device="cpu")
    if (tmp_path / "run" / LAST).exists():
        position = checkpoint.read(tmp_path / "run" / LAST)["training"]["position"]
        assert all(float(row["loss"]) < float("inf") for row in rows(tmp_path / "run")[: position["step"]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backbone_weights": ""}, "`backbone_weights` must be given"),
        ({"epochs": 0}, "`epochs` must be positive"),
        ({"lr": -1.0}, "`lr` must be positive"),
        ({"warmup_steps": -1}, "`warmup_steps` must not be negative"),
        ({"train_annotations": "nothing.json"}, "nothing.json"),
    ],
)
def test_a_wrong_setting_is_named(change: dict[str, Any], text: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=text):
        train(small(**change), tmp_path / "run", device="cpu")


def test_no_weights_means_that_all_is_trained(small: Small, tmp_path: Path) -> None:
    config = small(epochs=1, val_annotations="", frozen_stages=1, norm_eval=True)
    train(config, tmp_path / "run", device="cpu")
    used = preset(str(tmp_path / "run" / CONFIG)).model
    assert used.frozen_stages == -1 and not used.norm_eval
    assert "no stage is frozen and the batch norms are trained" in (tmp_path / "run" / TEXT).read_text()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_optimizer_of_a_graph_can_be_captured_and_reads_its_rate_from_a_tensor(
    optimizer: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a GPU by name: what is asked for there is made on the CPU."""
    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: made(value))
    config = small(optimizer=optimizer)
    found = []
    for graph in (False, True):
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, 0.5)
        torch.nn.init.zeros_(model.bias)
        built = make_optimizer(model, config.replace(graph=graph).train, torch.device("cuda"))
        for group in built.param_groups:
            assert isinstance(group["lr"], torch.Tensor) == graph
            # Where an optimizer has the option, it refuses to be captured without it.
            assert group.get("capturable", True) or not graph
            assert group["fused"]
        for rate in (0.1, 0.02):
            for group in built.param_groups:
                group["lr"] = group["lr"].fill_(rate) if graph else rate
            built.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            built.step()
        found.append(model.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
