# SPDX-License-Identifier: Apache-2.0
"""A training's folder: its files, and which of its checkpoints to resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint, files
from ..config import Config
from ..files import error_text
from .distributed import Process

LAST = "last.pt"
PREVIOUS = "previous.pt"
DAMAGED = "damaged.pt"
BEST = "best.pt"
CONFIG = "config.json"


def saved_training(out: Path, resume: bool, process: Process) -> dict[str, Any] | None:
    """The checkpoint to resume from; None for a new training.

    A damaged ``last.pt`` is an error, after which the one before it, if that is whole, is in its place.
    """
    last, previous = out / LAST, out / PREVIOUS
    # Without links a kill between two renames leaves the previous one alone.
    path = last if last.exists() or not previous.exists() else previous
    exists = path.exists()
    begun = exists or _is_configuration(out / CONFIG)
    # Every process has looked before one writes.
    process.wait()
    if begun and not resume:
        raise ValueError(f"{out} holds a training: resume it, or choose another folder for this one")
    if resume and not begun:
        raise ValueError(f"{out} holds no training to resume: neither {LAST} nor {CONFIG} is there")
    # A training killed before its first checkpoint starts again.
    if not exists:
        return None
    try:
        saved = checkpoint.read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_fall_back(path, out, process)}") from None
    if not all(isinstance(saved.get(part), Mapping) for part in ("training", "optimizer")):
        raise ValueError(f"{path} has weights alone: `init` starts a training from them, `resume` can't")
    return saved


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Makes what a checkpoint lacks, or has in another form than is needed here, a ValueError that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {files.shown(str(error))}"
        raise ValueError(
            f"{path}: what a training goes on from is not as this version needs it ({why}): `init` starts a new one "
            "from its weights"
        ) from None


def _fall_back(damaged: Path, out: Path, process: Process) -> str:
    """Puts the checkpoint before a damaged one in its place; returns what was done."""
    previous, best, step = out / PREVIOUS, out / BEST, None
    if damaged != previous:
        with suppress(ValueError, OSError, KeyError):
            step = checkpoint.read(previous)["training"]["position"]["step"]
    process.wait()
    if step is None:
        start = f"; `init` can start from its best weights, {best}" if best.exists() else ""
        return f"no checkpoint before it is whole: start a new training in another folder{start}"
    if process.main:
        os.replace(damaged, out / DAMAGED)
        os.replace(previous, damaged)
    return f"it is now {DAMAGED}, and {LAST} is the one before it, of step {step}: resume once more to go on from there"


def stored_config(out: Path) -> Config:
    """The configuration of the training in a folder; ValueError if there is none."""
    try:
        return _read_config(out / CONFIG)
    except (OSError, ValueError) as error:
        for name in (LAST, PREVIOUS):  # A full disk may have cut the file.
            with suppress(OSError, ValueError, KeyError):
                return Config.from_dict(checkpoint.read(out / name)["meta"]["config"])
        why = "is not there" if isinstance(error, FileNotFoundError) else f"can't be read ({error_text(error)})"
        raise ValueError(f"{out} holds no training to resume: {CONFIG} {why}") from None


def _read_config(path: Path) -> Config:
    try:
        return Config.from_dict(json.loads(files.read_bytes(path)))
    except RecursionError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_configuration(path: Path) -> bool:
    try:
        return _read_config(path) is not None
    except (OSError, ValueError):
        return False
