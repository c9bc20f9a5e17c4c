# SPDX-License-Identifier: Apache-2.0
"""Machine, date, versions and command of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("gfl-ops", "torch", "triton", "torchvision", "numpy", "mmdet", "ultralytics")


def stamp() -> dict[str, Any]:
    """Machine, versions, commit, date and command."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def command_line() -> str:
    """As typed from the project's root, from whatever folder it was started."""
    program = Path(sys.argv[0]).resolve()
    name = program.relative_to(ROOT) if program.is_relative_to(ROOT) else program.name
    return shlex.join(["python", str(name), *sys.argv[1:]])


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit, with "+" if tracked files have changed since; "unknown" outside a repository."""

    def git(*words: str) -> str:
        # The folder may belong to another user, as in a container.
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


def gpu() -> str | None:
    """Name, architecture and driver of the first GPU that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), driver {driver()}, CUDA {torch.version.cuda}"


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def lines(record: dict[str, Any]) -> list[str]:
    """The stamp as a few readable lines."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items() if number)
    return [
        f"{record['date']}  commit {record['commit']}",
        f"{record['cpu']}, {record['cores']} cores" + (f"; {record['gpu']}" if record["gpu"] else ""),
        versions,
        record["command"],
    ]
