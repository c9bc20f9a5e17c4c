# SPDX-License-Identifier: Apache-2.0
"""A web server on this machine, and an empty cache for what comes from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import file_server
import pytest


@pytest.fixture
def server() -> Iterator[file_server.FileServer]:
    with file_server.serving() as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"
