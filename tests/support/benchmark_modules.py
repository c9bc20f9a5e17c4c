# SPDX-License-Identifier: Apache-2.0
"""The modules of `benchmarks/`, which import each other by their bare names, for the tests."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


class Modules:
    """Modules as attributes, imported at their first use."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)

    def command(self, name: str) -> ModuleType:
        return importlib.import_module(f"commands.{name}")


@contextlib.contextmanager
def imported() -> Iterator[Modules]:
    """The modules while the block lasts; afterwards their names are free again."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield Modules()
    finally:
        sys.path.remove(str(FOLDER))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(f"{FOLDER}/"):
                del sys.modules[name]


def run_command(*words: str, folder: Path, script: Path = FOLDER / "bench.py") -> tuple[str, dict[str, Any]]:
    """The output and the record of a benchmark started as a file from another folder."""
    common = [
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--device",
        "cpu",
        "--data",
        "/nowhere/at/all",
        "--out",
        str(folder),
    ]
    command = [sys.executable, str(script), *words, *common]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    (file,) = folder.glob("bench_*.json")
    return done.stdout, json.loads(file.read_text())
