# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels compute on this machine what the reference computes; ``gfl doctor --check`` prints the verdicts.

Verdicts are kept in the user's cache folder under everything that they depend on (device, driver, torch, Triton, this
build of the package), so that a machine is checked once. Importing the package starts no check, but uses verdicts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import kernel_check_process as process
from ._version import __version__
from .core import backends, checks, extension
from .kernel_check_process import OK, SKIPPED, Verdict

# Seconds after which a check that was short of time or memory is repeated.
RETRY_AFTER = 600.0
_asked = False  # whether this process called for a check, so that it need not be told how to


@dataclass(frozen=True)
class Report:
    """The verdicts of one device.

    Attributes:
        device: "cpu" or "cuda:<index>".
        machine: what the verdicts depend on, by name.
        verdicts: one per operator and backend that has kernels there.
        seconds: how long the check took.
    """

    device: str
    machine: dict[str, str]
    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every kernel was checked and gives the reference's results."""
        return all(v.status == OK for v in self.verdicts)

    def to_json(self) -> str:
        """The report as a JSON object."""
        return json.dumps({**asdict(self), "ok": self.ok}, indent=2)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote."""
        fields = json.loads(text)
        verdicts = tuple(Verdict(**v) for v in fields["verdicts"])
        return Report(fields["device"], fields["machine"], verdicts, float(fields["seconds"]))

    def __str__(self) -> str:
        lines = [f"{name:<10} {value}" for name, value in self.machine.items()]
        lines += ["", f"{'operator':<18}{'backend':<9}{'verdict':<13}{'seconds':>8}", "-" * 48]
        lines += [f"{v.operator:<18}{v.backend:<9}{v.status:<13}{v.seconds:>8.2f}" for v in self.verdicts]
        bad = [v for v in self.verdicts if v.status != OK]
        lines.append("")
        lines += [f"{v.operator} ({v.backend}): {v.status}: {v.detail}" for v in bad]
        count = len(self.verdicts)
        lines.append(
            f"{count - len(bad)} of {count} kernels agree with the reference on {self.device}, {self.seconds:.1f} s"
        )
        return "\n".join(lines) + "\n"


def self_check(device: str | torch.device | None = None, *, save: bool = True) -> Report:
    """Hold every native and Triton kernel of a device against the reference, forward and backward, in a subprocess.

    Args:
        device: "cpu", "cuda" (the current GPU) or "cuda:1"; None for the current GPU where torch can use one, else the
            CPU.
        save: keep the verdicts in the user's cache folder, where ``gfl`` and later imports find them.

    Returns:
        The report: ``report.ok``, ``report.verdicts`` (one per operator and backend), ``str(report)`` as a table.
        An operator whose kernels are not ok runs on another backend from then on, in this process too.

    Raises:
        ValueError: a device that is neither, or a GPU that torch can't use.
    """
    global _asked
    _asked = True
    name = _device(device)
    started = time.monotonic()
    verdicts = process.run(name)
    report = Report(name, machine(name), verdicts, time.monotonic() - started)
    apply(report)
    folder = _folder() if save else None
    if folder is not None:
        with contextlib.suppress(OSError):  # a full disk: the verdicts last as long as the process
            _write(folder / _file(name), report.to_json())
    return report


def devices() -> list[str]:
    """The devices to check: "cpu", and of the GPUs that torch can use one of each kind."""
    return ["cpu", *_gpus()]


def ensure_checked(device: str | torch.device | None = None) -> list[Report]:
    """Check a device unless that was done before on this machine; what the ``gfl`` commands call before they use a GPU.

    One process at a time: the others wait and take its verdicts. Processes of ``torchrun`` other than each machine's
    first never check by themselves. ``GFL_OPS_SELF_CHECK=0`` turns it off.

    Args:
        device: "cpu" or "cuda:1"; "cuda" for every kind of GPU; None for the same, or the CPU where there is none.

    Returns:
        One report per device, none where nothing was checked.
    """
    global _asked
    if _off():
        return []
    _asked = True
    wanted = None if device is None else torch.device(device)
    every = wanted is None or (wanted.type == "cuda" and wanted.index is None)
    names = (_gpus() if every else []) or [_device(device)]
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    found = [_checked_once(name) if first else _wait_for(name) for name in names]
    return [report for report in found if report is not None]


def _checked_once(device: str) -> Report:
    with _locked(device):
        report = stored(device)
        if report is not None:
            apply(report)
            return report
        text = f"gfl_ops: checking the kernels on {_device_name(device)}, once; GFL_OPS_SELF_CHECK=0 turns it off"
        print(text, file=sys.stderr, flush=True)
        report = self_check(device)
        bad = [v.operator for v in report.verdicts if v.status not in (OK, SKIPPED)]
        left = [v.operator for v in report.verdicts if v.status == SKIPPED]
        said = [f"not right: {', '.join(bad)}"] if bad else []
        said += [f"not checked, to be tried again later: {', '.join(left)}"] if left else []
        text = "; ".join([*said, "`gfl doctor --check` says more"]) if said else "all right"
        print(f"gfl_ops: {text} ({report.seconds:.0f} s)", file=sys.stderr, flush=True)
        return report


def _wait_for(device: str) -> Report | None:
    """The verdicts of the process that checks, or None where it can leave none or does not in time."""
    end = time.monotonic() + process.START_LIMIT + process.WHOLE_LIMIT
    while _folder() is not None and time.monotonic() < end:
        report = stored(device)
        if report is not None:
            apply(report)
            return report
        time.sleep(0.2)
    return None


def _off() -> bool:
    return os.environ.get("GFL_OPS_SELF_CHECK", "1") == "0"


def _at_import() -> None:
    """Use the CPU's verdicts, which name the machine only where there are some: it takes a while to find out."""
    if not _off() and any(next(folder.glob("self_check_cpu_*.json"), None) for folder in _folders()):
        report = stored("cpu")
        if report is not None:
            apply(report)


def _at_first_gpu_call() -> None:
    if _off():
        return
    for name in _gpus():
        report = stored(name)
        if report is not None:
            apply(report)
        elif not _asked:
            text = f"gfl_ops: the kernels were not yet checked on {_device_name(name)}; `gfl doctor --check` does so."
            warnings.warn(text, RuntimeWarning, stacklevel=5)


def stored(device: str) -> Report | None:
    """The verdicts that are kept for this very machine and build, or None; those with gaps are kept for minutes."""
    name = _file(device)
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            report = Report.from_json((folder / name).read_text(encoding="utf-8"))
            gaps = any(v.status == SKIPPED for v in report.verdicts)
            if not gaps or time.time() - (folder / name).stat().st_mtime < RETRY_AFTER:
                return report
    return None


def apply(report: Report) -> None:
    """Let operators whose kernels are not ok run on another backend."""
    for verdict in report.verdicts:
        if verdict.status not in (OK, SKIPPED):
            reason = f"the self-check found its result {verdict.status}: {verdict.detail}".rstrip(": ")
            backends.distrust(verdict.backend, verdict.operator, torch.device(report.device).type, reason)


# --- what verdicts depend on ----------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """What a verdict depends on."""
    facts = {"device": _device_name(device), "torch": str(torch.__version__), "package": f"{__version__} {_build()}"}
    if device != "cpu":
        facts["driver"] = _driver()
    triton = backends.triton_version()
    facts["triton"] = ".".join(map(str, triton)) if triton else "none"
    return facts


def _device(device: str | torch.device | None) -> str:
    """ "cpu" or "cuda:<index>"."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return "cpu"
    if wanted.type != "cuda":
        raise ValueError(checks.message("self_check", "device", "must be a CPU or a CUDA device", repr(str(device))))
    if not torch.cuda.is_available() or (wanted.index or 0) >= torch.cuda.device_count():
        raise ValueError(checks.message("self_check", "device", "must be one that torch can use", repr(str(device))))
    return f"cuda:{torch.cuda.current_device() if wanted.index is None else wanted.index}"


def _gpus() -> list[str]:
    """One GPU of each kind that torch can use."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    first = {_device_name(name): name for name in (f"cuda:{i}" for i in reversed(range(count)))}
    return sorted(first.values())


def _device_name(device: str) -> str:
    if device != "cpu":
        capability = torch.cuda.get_device_capability(torch.device(device).index)
        return f"{torch.cuda.get_device_name(torch.device(device).index)} sm_{capability[0]}{capability[1]}"
    module = extension.EXTENSION.module
    return f"CPU with {module.cpu_isa()}" if module else "CPU"


def _driver() -> str:
    """The version of NVIDIA's kernel module; torch knows only the CUDA version that it supports."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text):
            return found[0]
    return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else "?"


def _build() -> str:
    """Tells one build of the extension, and one state of the Triton kernels, from another."""
    module = extension.EXTENSION.module
    files = [*([Path(module.__file__)] if module and module.__file__ else [])]
    files += sorted((Path(__file__).parent / "triton").glob("*.py"))
    states = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:12]


# --- where verdicts are kept ----------------------------------------------------------------------------------------


def _folders() -> list[Path]:
    """The user's cache folder, and one in place of it where that can't be written."""
    user = getattr(os, "getuid", lambda: 0)()
    found = [Path(tempfile.gettempdir()) / f"gfl_ops-{user}"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gfl_ops")
    return found


def _folder() -> Path | None:
    """The first of the folders that can be written, made if need be."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == getattr(os, "getuid", lambda: 0)():
                return folder
    return None


def _file(device: str) -> str:
    key = hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()[:24]
    return f"self_check_{device.partition(':')[0]}_{key}.json"


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(device: str) -> Iterator[None]:
    """Alone among the processes of this user; without a lock where there is no folder for it."""
    folder = _folder()
    with contextlib.ExitStack() as opened:
        if folder is not None:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                file = opened.enter_context(open(folder / f"{_file(device)}.lock", "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


backends.at_first_gpu_call(_at_first_gpu_call)
_at_import()
