# SPDX-License-Identifier: Apache-2.0
"""The C++ compiler of the host."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, with what `CXX` adds to it, and the first line that it says of itself."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | None:
    """`CXX` where it is set (and nothing else then), otherwise the first of c++, g++ and clang++ that answers."""
    wish = os.environ.get("CXX", "").strip()
    for command in [tuple(shlex.split(wish))] if wish else [("c++",), ("g++",), ("clang++",)]:
        if shutil.which(command[0]):
            version = first_line(command)
            if version:
                return Compiler(command, version)
    return None


def first_line(command: tuple[str, ...]) -> str:
    """The first line of what a compiler says of itself; empty if it does not run."""
    return (_version(command) or ("",))[0]


def last_line(command: tuple[str, ...]) -> str:
    """The last line, which is the telling one of nvcc's."""
    return (_version(command) or ("",))[-1]


@lru_cache
def _version(command: tuple[str, ...]) -> tuple[str, ...]:
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = [line.strip() for line in said.stdout.splitlines() if line.strip()]
    return tuple(lines) if said.returncode == 0 else ()
