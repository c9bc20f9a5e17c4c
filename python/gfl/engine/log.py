# SPDX-License-Identifier: Apache-2.0
"""A training's log: lines by `logging`, a row of figures every few steps (CSV and TensorBoard), evaluations."""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

from .. import files
from ..data.transforms import to_tensor

TEXT = "train.log"
STEPS = "steps.csv"
EVALUATIONS = "evaluations.csv"
GROUPS = {STEPS: "train", EVALUATIONS: "val"}  # in TensorBoard
# The logger of all trainings: a program may give it handlers of its own.
LOGGER = logging.getLogger("gfl.train")
Item = TypeVar("Item")


class RunLog:
    """The log of one training in its folder, created if missing; only an active process writes.

    Resuming after `step`, with the last evaluation at `evaluated`, drops what was written later, so that the tables of
    a training that was killed and resumed read like those of one that was not.
    """

    def __init__(self, folder: Path, step: int = 0, evaluated: int = 0, active: bool = True) -> None:
        self.folder = folder
        self.active = active
        self._tensorboard: Any = None
        self._handlers: list[logging.Handler] = []
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(logging.INFO)
        # The screen is a program's own where it has set up logging.
        self._handlers = [File(folder / TEXT), *([] if LOGGER.hasHandlers() else [Screen()])]
        for handler in self._handlers:
            LOGGER.addHandler(handler)
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
        if self.active:
            LOGGER.info("%s", files.printable(text, "\n"))

    def pictures(self, drawn: Mapping[str, Image.Image], step: int) -> None:
        """Shows pictures in TensorBoard."""
        if self._tensorboard is not None:
            for name, picture in drawn.items():
                self._tensorboard.add_image(name, to_tensor(picture).contiguous(), step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        for handler in self._handlers:
            LOGGER.removeHandler(handler)

    def row(self, table: str, step: int, values: Mapping[str, float]) -> None:
        """A row of `STEPS`, figures of the steps up to and including `step`, or of `EVALUATIONS`, one after `step`."""
        if not self.active:
            return
        path = self.folder / table
        columns = ["step", *values]
        with suppress(FileNotFoundError), path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), columns)  # of an earlier version, which may have fewer
        with path.open("a", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, columns, extrasaction="ignore")
            if not file.tell():
                rows.writeheader()
            rows.writerow({"step": step} | {key: f"{value:.6g}" for key, value in values.items()})
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"{GROUPS[table]}/{key}", value, step)


class File(logging.Handler):
    """Adds lines to a file that it doesn't keep open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self.format(record) + "\n")


class Screen(logging.Handler):
    """Prints lines above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError), tqdm.external_write_mode(sys.stderr):
            files.say(self.format(record), sys.stderr)


class Pace:
    """Where the time of a training goes: between two readings, and since it was started."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds, self._steps = 0.0, 0  # of all readings
        self.began = False  # whether there was a step
        self.start()

    def start(self) -> None:
        """Begins a stretch of steps, after an evaluation for example, whose time is no step's."""
        self._began, self._waited, self._images, self._counted = time.perf_counter(), 0.0, 0, 0

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time until each is there is counted as waiting for data."""
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield item

    def count(self, images: int) -> None:
        """One more step, of so many images."""
        self._images += images
        self._counted += 1
        self.began = True

    def read(self) -> dict[str, float]:
        """Figures of the steps since the last reading."""
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        self._seconds += seconds
        self._steps += self._counted
        result = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        result["memory_gib"] = memory(self.device) / 2**30
        self.start()
        return result

    def left(self, steps: int) -> str:
        """How long so many steps will take, at the mean pace so far."""
        return str(timedelta(seconds=round(steps * self._seconds / max(self._steps, 1))))


def memory(device: torch.device) -> float:
    """The most bytes that were in use: of the GPU by torch, or of this process; NaN where the system can't say."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not a POSIX system
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


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
