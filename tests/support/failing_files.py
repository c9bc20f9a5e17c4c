# SPDX-License-Identifier: Apache-2.0
"""A file layer in which one call fails, as on a full or broken disk, or in a process that is killed."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# What writers call of the system, and the errors it may answer.
CALLS = ("open", "write", "fsync", "replace", "link", "unlink")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


class Killed(BaseException):
    """Stands for a process that ends at this call."""


class Failing:
    """Counts the calls under a folder and lets the one of a number fail."""

    def __init__(self, folder: Path, at: int | None, error: BaseException | None) -> None:
        self.folder, self.at, self.error = str(folder), at, error
        self.calls: list[str] = []

    def __call__(self, name: str) -> None:
        self.calls.append(name)
        # A process that is killed does nothing afterwards either.
        if self.at is not None and (len(self.calls) - 1 == self.at or self._dead()):
            assert self.error is not None
            raise self.error

    def _dead(self) -> bool:
        return isinstance(self.error, Killed) and self.at is not None and len(self.calls) - 1 > self.at


class _File(io.FileIO):
    layer: Failing

    def write(self, data: Any) -> int:
        self.layer("write")
        return super().write(data)


@contextmanager
def failing(folder: Path, at: int | None = None, error: BaseException | None = None) -> Iterator[Failing]:
    """A context in which the call number `at` under a folder raises; the layer it gives has the calls' names."""
    layer = Failing(folder, at, error)
    real_open = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(file, (str, os.PathLike))
            and os.fspath(file).startswith(layer.folder)
            and set(mode) & set("wxa+")
        ):
            layer("open")
            raw = _File(file, mode.replace("b", "").replace("t", ""))
            raw.layer = layer
            binary: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, kwargs.get("encoding"), write_through=True)
        return real_open(file, mode, *args, **kwargs)

    def wrapped(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(args[0], (str, os.PathLike)) or os.fspath(args[0]).startswith(layer.folder):
                layer(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in ("fsync", "replace", "link", "unlink"):
            patch.setattr(os, name, wrapped(name))
        yield layer
