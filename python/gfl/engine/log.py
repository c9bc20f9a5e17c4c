# SPDX-License-Identifier: Apache-2.0
"""A training's log: lines of text, a row of figures every few steps (CSV and TensorBoard), evaluations."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import files

TEXT = "train.log"
STEPS = "steps.csv"
EVALUATIONS = "evaluations.csv"
GROUPS = {STEPS: "train", EVALUATIONS: "val"}  # in TensorBoard


class RunLog:
    """The log of one training in its folder, created if missing; only an active process writes.

    Resuming after `step`, with the last evaluation at `evaluated`, drops what was written later, so that the tables of
    a training that was killed and resumed read like those of one that was not.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: int = 0, active: bool = True) -> None:
        self.folder = folder
        self.active = active
        self._tensorboard: Any = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        cut_after(folder / STEPS, step)
        cut_after(folder / EVALUATIONS, evaluated)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard log: the package tensorboard is not installed")
        else:
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def say(self, text: str) -> None:
        """A line on the screen and in the folder."""
        if not self.active:
            return
        text = files.printable(text, "\n")
        with suppress(OSError, ValueError), tqdm.external_write_mode(sys.stderr):
            files.say(text, sys.stderr)
        with (self.folder / TEXT).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def row(self, table: str, step: int, values: Mapping[str, float]) -> None:
        """A row of `STEPS`, figures of the steps up to and including `step`, or of `EVALUATIONS`, one after `step`."""
        if not self.active:
            return
        path = self.folder / table
        fresh = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if fresh:
                rows.writerow(["step", *values])
            rows.writerow([step, *(f"{value:.6g}" for value in values.values())])
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"{GROUPS[table]}/{key}", value, step)


def cut_after(path: Path, step: int) -> None:
    """Drops a table's rows after `step`, and a last row left unfinished by a kill."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    numbers = (line.split(",", 1)[0] for line in lines[1:])
    kept = lines[:1] + [line for line, n in zip(lines[1:], numbers) if n.isdigit() and int(n) <= step]
    files.write(path, "".join(kept))
