# SPDX-License-Identifier: Apache-2.0
"""The modules of `benchmarks/`, which import each other by their bare names, for the tests."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
