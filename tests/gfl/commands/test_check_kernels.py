# SPDX-License-Identifier: Apache-2.0
"""The commands check a GPU's kernels before they use it, and leave a CPU alone; the GPU is a stand-in."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gfl import checkpoint, cli, detector, preset
from gfl.commands import bench, check_kernels
from gfl.commands import eval as evaluation
from gfl.data import loader
from gfl.demo import course
from gfl.engine import distributed, train
from gfl_ops import kernel_check

COMMANDS = {
    "train": ["train", "--config", "gfl_tiny", "--data", "data", "--backbone-weights", "none", "--out", "run"],
    "eval": ["eval", "model.pt"],
    "detect": ["detect", "model.pt", __file__],
    "bench": ["bench", "--models", "gfl_tiny"],
    "demo": ["demo"],
}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The devices that are checked, and "used" where a command would begin to compute, in order."""
    found: list[Any] = []

    def used(*_: object, **__: object) -> None:
        found.append("used")
        raise ValueError("used")

    def failing(*_: object, **__: object) -> None:
        found.append("used")
        raise RuntimeError("used")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "current_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(kernel_check, "ensure_checked", found.append)
    monkeypatch.setattr(checkpoint, "model_from", lambda *_, **__: (None, preset("gfl_tiny"), None, None))
    monkeypatch.setattr(loader, "validation_dataset", lambda *_: None)
    monkeypatch.setattr(evaluation, "_check_classes", lambda *_: None)
    monkeypatch.setattr(train, "train", used)
    monkeypatch.setattr(distributed, "processes", used)
    monkeypatch.setattr(detector, "Detector", used)
    monkeypatch.setattr(course, "run_demo", used)
    monkeypatch.setattr(bench, "_times", failing)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_gpu_is_checked_before_it_is_used(command: str, events: list[Any]) -> None:
    cli.main([*COMMANDS[command], "--device", "cuda:1"])
    assert events[:2] == [torch.device("cuda:1"), "used"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_cpu_is_not(command: str, events: list[Any]) -> None:
    cli.main([*COMMANDS[command], "--device", "cpu"])
    assert events[:1] == ["used"] and set(events) == {"used"}


@pytest.mark.parametrize("command", ["train", "eval", "detect"])
def test_the_gpu_that_is_taken_unasked_is_checked_too(command: str, events: list[Any]) -> None:
    cli.main(COMMANDS[command])
    assert events[:2] == [None, "used"]


@pytest.mark.parametrize(("device", "checked"), [("nonsense", 0), ("cuda:7", 0), ("cuda", 1)])
def test_a_device_that_is_not_there_is_left_to_the_command(device: str, checked: int, events: list[Any]) -> None:
    check_kernels(device)
    assert len(events) == checked


def test_without_a_gpu_nothing_is_checked(events: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_kernels(None)
    assert events == []
