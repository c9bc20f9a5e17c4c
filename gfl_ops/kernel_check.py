# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels compute on this machine what the reference computes; ``gfl doctor --check`` prints the verdicts.

The kernels run in a subprocess, since a fault on a GPU takes the whole process with it, and a hang would never return.
The subprocess announces each kernel before it runs it; where it ends or falls silent, the kernel announced last is the
culprit, and a fresh subprocess goes on with the rest. Verdicts are kept in the user's cache folder under everything
that they depend on (device, driver, torch, Triton, this build of the package), so that a machine is checked once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from ._version import __version__
from .core import backends, checks, extension
from .core.conformance import Mismatch, check_forward, check_gradient, operator
from .core.registry import SPECS, OpSpec

OK, WRONG, FAILED, CRASHED, HUNG, SKIPPED = "ok", "wrong", "failed", "crashed", "hung", "not checked"

# Seconds without a word from the subprocess: until its first (imports, the device's context), from one sample to the
# next (a Triton kernel compiles at its first); and seconds for all together. Many times what a busy machine takes.
START_LIMIT, SAMPLE_LIMIT, WHOLE_LIMIT = 60.0, 30.0, 180.0
_MARK = "gfl_ops.self_check: "
_COMMAND = (sys.executable, "-m", "gfl_ops.kernel_check")


@dataclass(frozen=True)
class Verdict:
    """What came of one operator's kernels of one backend.

    Attributes:
        operator: its stem.
        backend: "native" or "triton".
        status: "ok"; "wrong" (a result differs from the reference's by more than rounding explains), "failed" (an
            exception), "crashed" (the process ended), "hung" (no answer in time) or "not checked" (out of time).
        seconds: how long it took, forward and backward, over all dtypes.
        detail: what was wrong; empty where nothing was.
    """

    operator: str
    backend: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """The verdicts of one device.

    Attributes:
        device: "cpu" or "cuda".
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
        device: "cpu" or "cuda"; None for the GPU where torch can use one, else the CPU.
        save: keep the verdicts in the user's cache folder, where ``gfl`` and later imports find them.

    Returns:
        The report: ``report.ok``, ``report.verdicts`` (one per operator and backend), ``str(report)`` as a table.
        An operator whose kernels are not ok runs on another backend from then on, in this process too.

    Raises:
        ValueError: a device that is neither, or a GPU that torch can't use.
    """
    kind = _device_type(device)
    started = time.monotonic()
    verdicts = tuple(_Runner(kind).verdicts())
    report = Report(kind, machine(kind), verdicts, time.monotonic() - started)
    apply(report)
    if save:
        with contextlib.suppress(OSError):  # a read-only home: the verdicts last as long as the process
            _write(_path(kind), report.to_json())
    return report


def devices() -> list[str]:
    """The kinds of device that this machine has: "cpu", and "cuda" where torch can use a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def ensure_checked(device: str | torch.device | None = None) -> Report | None:
    """Check the device unless that was done before on this machine; what the ``gfl`` commands call before first use.

    One process at a time: the others wait and take its verdicts. Processes of ``torchrun`` other than each machine's
    first never check by themselves. ``GFL_OPS_SELF_CHECK=0`` turns it off.

    Returns:
        The report, or None where nothing was checked.
    """
    if os.environ.get("GFL_OPS_SELF_CHECK", "1") == "0":
        return None
    kind = _device_type(device)
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return _wait_for(kind, WHOLE_LIMIT)
    with _locked(_path(kind).with_suffix(".lock")):
        report = stored(kind)
        if report is None:
            print(f"gfl_ops: checking the kernels on {_device_name(kind)}, once", file=sys.stderr, flush=True)
            report = self_check(kind)
            bad = [v.operator for v in report.verdicts if v.status != OK]
            said = f"not right: {', '.join(bad)}; `gfl doctor --check` says more" if bad else "all right"
            print(f"gfl_ops: {said} ({report.seconds:.0f} s)", file=sys.stderr, flush=True)
        else:
            apply(report)
    return report


def _at_first_gpu_call() -> None:
    if os.environ.get("GFL_OPS_SELF_CHECK", "1") == "0":
        return
    report = stored("cuda")
    if report is not None:
        apply(report)
        return
    warnings.warn(
        f"gfl_ops: the kernels were not yet checked on {_device_name('cuda')}; `gfl doctor --check` does so.",
        RuntimeWarning,
        stacklevel=5,
    )


def stored(device: str) -> Report | None:
    """The verdicts that are kept for this very machine and build, or None."""
    try:
        return Report.from_json(_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def apply(report: Report) -> None:
    """Let operators whose kernels are not ok run on another backend."""
    for verdict in report.verdicts:
        if verdict.status not in (OK, SKIPPED):
            reason = f"the self-check found its result {verdict.status}: {verdict.detail}".rstrip(": ")
            backends.distrust(verdict.backend, verdict.operator, report.device, reason)


def machine(device: str) -> dict[str, str]:
    """What a verdict depends on."""
    facts = {"device": _device_name(device), "torch": str(torch.__version__), "package": f"{__version__} {_build()}"}
    if device == "cuda":
        facts["driver"] = str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else "?"
    triton = backends.triton_version()
    facts["triton"] = ".".join(map(str, triton)) if triton else "none"
    return facts


def _device_type(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(checks.message("self_check", "device", "must be a CPU or a CUDA device", repr(str(device))))
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(checks.message("self_check", "device", "must be one that torch can use", repr(str(device))))
    return kind


def _device_name(device: str) -> str:
    if device == "cuda":
        names = {
            f"{torch.cuda.get_device_name(i)} sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        }
        return ", ".join(sorted(names))
    module = extension.EXTENSION.module
    return f"CPU with {module.cpu_isa()}" if module else "CPU"


def _build() -> str:
    """Tells one build of the extension from another."""
    module = extension.EXTENSION.module
    if module is None or module.__file__ is None:
        return "without extension"
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]


backends.at_first_gpu_call(_at_first_gpu_call)


# --- where verdicts are kept ----------------------------------------------------------------------------------------


def _path(device: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gfl_ops"
    key = hashlib.sha256(json.dumps(machine(device), sort_keys=True).encode()).hexdigest()[:24]
    return cache / f"self_check_{device}_{key}.json"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this user; without a lock where the folder can't be written."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except (ImportError, OSError):
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for(device: str, seconds: float) -> Report | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        report = stored(device)
        if report is not None:
            apply(report)
            return report
        time.sleep(0.2)
    return None


# --- the subprocess, seen from outside ------------------------------------------------------------------------------


def cases(device: str) -> list[tuple[OpSpec, str]]:
    """The operators and backends that have kernels for the device and can run."""
    pairs = [(spec, backend) for backend in ("native", "triton") for spec in SPECS.values()]
    return [(s, b) for s, b in pairs if backends.unavailable(b, s.stem, device) is None]


class _Runner:
    def __init__(self, device: str) -> None:
        self.device = device
        self.end = time.monotonic() + WHOLE_LIMIT

    def verdicts(self) -> Iterator[Verdict]:
        """One verdict per case, in order; a new subprocess after each that took its process with it."""
        left = [f"{spec.stem}:{backend}" for spec, backend in cases(self.device)]
        while left:
            done = 0
            for verdict in self._process(left):
                done += 1
                yield verdict
            left = left[done:]

    def _process(self, names: list[str]) -> Iterator[Verdict]:
        command = [*_COMMAND, "--device", self.device, *names]
        # Asynchronous faults would be blamed on a later kernel.
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "GFL_OPS_SELF_CHECK": "0", "GFL_OPS_BACKEND": "auto"}
        # Threads that wait for each other in a loop crawl on a busy machine.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
            ) as process,
        ):
            try:
                yield from self._follow(process, names, errors)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _follow(self, process: subprocess.Popen[str], names: list[str], errors: IO[str]) -> Iterator[Verdict]:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        current, limit = names[0], START_LIMIT
        began = time.monotonic()
        for current in names:
            stem, backend = current.split(":")
            while True:
                wait = min(limit, self.end - time.monotonic())
                try:
                    line = lines.get(timeout=max(wait, 0.0))
                except queue.Empty:
                    late = time.monotonic() >= self.end
                    status = SKIPPED if late else HUNG
                    detail = f"{WHOLE_LIMIT:.0f} s were over" if late else f"no answer within {limit:.0f} s"
                    yield Verdict(stem, backend, status, time.monotonic() - began, detail)
                    if late:
                        for name in names[names.index(current) + 1 :]:
                            later_stem, later_backend = name.split(":")
                            yield Verdict(later_stem, later_backend, SKIPPED, 0.0, detail)
                    return
                if line is None:
                    code = process.wait()
                    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                    yield Verdict(stem, backend, CRASHED, time.monotonic() - began, f"{how}{_last_line(errors)}")
                    return
                message = json.loads(line)
                limit = SAMPLE_LIMIT
                if "started" in message:
                    began = time.monotonic()
                    continue
                if "sample" in message:
                    continue
                verdict = Verdict(stem, backend, **message)
                yield replace(verdict, seconds=time.monotonic() - began)
                if verdict.status == FAILED and self.device == "cuda":
                    return  # the process may be poisoned
                break


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        if line.startswith(_MARK):
            lines.put(line[len(_MARK) :])
    lines.put(None)


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return f": {lines[-1]}" if lines else ""


# --- the subprocess itself ------------------------------------------------------------------------------------------


def _check(spec: OpSpec, backend: str, device: str, say: Callable[..., None]) -> dict[str, Any]:
    """Every sample of every dtype, forward and backward; returns the verdict's status and detail."""
    function = operator(spec, backend)
    try:
        for dtype in spec.dtypes:
            for sample in spec.samples(torch.device(device), dtype, torch.Generator().manual_seed(0)):
                say(sample=sample.id)
                check_forward(spec, function, sample)
                if spec.differentiable:
                    check_gradient(spec, function, sample, 0)
        if device == "cuda":
            torch.cuda.synchronize()
    except Mismatch as error:
        return {"status": WRONG, "detail": str(error).strip().splitlines()[0]}
    except Exception as error:  # whatever a kernel raises is the verdict
        return {"status": FAILED, "detail": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"}
    return {"status": OK}


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()

    def say(**message: Any) -> None:
        print(_MARK + json.dumps(message), flush=True)

    for case in options.cases:
        stem, backend = case.split(":")
        say(started=case)
        say(**_check(SPECS[stem], backend, options.device, say))


if __name__ == "__main__":
    _main()
