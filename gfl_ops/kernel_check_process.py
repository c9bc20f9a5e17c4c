# SPDX-License-Identifier: Apache-2.0
"""Runs kernels in subprocesses and tells what came of each; see kernel_check.py.

A fault on a GPU takes the whole process with it, and a hang would never return. A subprocess announces each kernel
before it runs it; where it ends or falls silent, the kernel announced last is the culprit, and a fresh subprocess goes
on with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from .core import backends
from .core.conformance import Mismatch, check_forward, check_gradient, check_one_pass, operator, tensors
from .core.registry import SPECS, OpSpec, Sample

OK, WRONG, FAILED, CRASHED, HUNG, SKIPPED = "ok", "wrong", "failed", "crashed", "hung", "not checked"

# Seconds without a word from the subprocess: until its first (imports, the device's context), from one sample to the
# next (a Triton kernel compiles at its first); and seconds for all together. Many times what a busy machine takes.
START_LIMIT, SAMPLE_LIMIT, WHOLE_LIMIT = 60.0, 30.0, 180.0
_MARK = "gfl_ops.self_check: "
# What CUDA, its libraries, torch's allocators, C++ and the system say where memory is short.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can.?t allocate memory|cannot allocate memory|not enough memory|bad_alloc|ALLOC_FAILED|MemoryError",
    re.IGNORECASE,
)
# This very package, whatever folder the subprocess starts in.
_PATH = str(Path(__file__).resolve().parents[1])
_START = f"import sys; sys.path[0] = {_PATH!r}; from gfl_ops.kernel_check_process import main; main()"
_COMMAND = (sys.executable, "-c", _START)


@dataclass(frozen=True)
class Verdict:
    """What came of one operator's kernels of one backend.

    Attributes:
        operator: its stem.
        backend: "native" or "triton".
        status: "ok"; "wrong" (a result differs from the reference's by more than rounding explains), "failed" (an
            exception), "crashed" (the process ended), "hung" (no answer in time) or "not checked" (no verdict: out of
            time or of memory, of the device or the host).
        seconds: how long it took, forward and backward, over all dtypes.
        detail: what was wrong; empty where nothing was.
    """

    operator: str
    backend: str
    status: str
    seconds: float = 0.0
    detail: str = ""


def cases(device: str) -> list[tuple[OpSpec, str]]:
    """The operators and backends that have kernels for the device and can run."""
    kind = torch.device(device).type
    if kind == "cuda":
        backends.meet_gpu()
    pairs = [(spec, backend) for backend in ("native", "triton") for spec in SPECS.values()]
    return [(s, b) for s, b in pairs if backends.unavailable(b, s.stem, kind) is None]


def run(device: str) -> tuple[Verdict, ...]:
    """One verdict per case, in their order; on many cores several subprocesses share the work."""
    names = [f"{spec.stem}:{backend}" for spec, backend in cases(device)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(8, cores // 2))
    end = time.monotonic() + WHOLE_LIMIT
    with ThreadPoolExecutor(workers) as pool:
        shares = [names[i::workers] for i in range(workers)]
        found = pool.map(lambda share: list(_verdicts(share, device, end, cores // workers)), shares)
    by_name = {f"{v.operator}:{v.backend}": v for verdicts in found for v in verdicts}
    return tuple(by_name[name] for name in names)


# --- the subprocess, seen from outside ------------------------------------------------------------------------------


def _verdicts(names: list[str], device: str, end: float, threads: int) -> Iterator[Verdict]:
    """One verdict per name, in order; a new subprocess after each that took its process with it."""
    while names:
        done = 0
        try:
            for verdict in _process(names, device, end, threads):
                done += 1
                yield verdict
        except OSError as error:  # no memory for another process, or no room for its output
            yield from _skipped(names[done:], f"no process could be started: {error}")
            return
        names = names[done:]


def _skipped(names: list[str], why: str) -> Iterator[Verdict]:
    for stem, backend in (name.split(":") for name in names):
        yield Verdict(stem, backend, SKIPPED, 0.0, why)


def _process(names: list[str], device: str, end: float, threads: int) -> Iterator[Verdict]:
    # Asynchronous faults would be blamed on a later kernel.
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1", "GFL_OPS_SELF_CHECK": "0", "GFL_OPS_BACKEND": "auto"}
    environment.setdefault("OMP_NUM_THREADS", str(max(threads, 1)))
    # Threads that wait for each other in a loop crawl on a busy machine.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = [*_COMMAND, "--device", device, *names]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            yield from _follow(process, names, device, end, errors)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _follow(
    process: subprocess.Popen[str], names: list[str], device: str, end: float, errors: IO[str]
) -> Iterator[Verdict]:
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
    limit, began, started = START_LIMIT, time.monotonic(), False
    for position, current in enumerate(names):
        stem, backend = current.split(":")
        while True:
            try:
                line = lines.get(timeout=max(min(limit, end - time.monotonic()), 0.0))
            except queue.Empty:
                if time.monotonic() >= end:
                    yield from _skipped(names[position:], f"{WHOLE_LIMIT:.0f} s were over")
                elif not started:
                    yield from _skipped(names, f"the process did not start within {limit:.0f} s")
                else:
                    detail = f"no answer within {limit:.0f} s"
                    yield Verdict(stem, backend, HUNG, time.monotonic() - began, detail)
                return
            if line is None:
                code = process.wait()
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                how += _last_line(errors)
                if not started:  # no kernel has run
                    yield from _skipped(names, f"the process did not start: {how}")
                else:
                    # The system ends a process by SIGKILL where the host is out of memory.
                    killed = code == -signal.SIGKILL or _OUT_OF_MEMORY.search(how)
                    yield Verdict(stem, backend, SKIPPED if killed else CRASHED, time.monotonic() - began, how)
                return
            message = json.loads(line)
            limit, started = SAMPLE_LIMIT, True
            if "started" in message:
                began = time.monotonic()
            elif "status" in message:
                verdict = replace(Verdict(stem, backend, **message), seconds=time.monotonic() - began)
                yield verdict
                if verdict.status in (FAILED, SKIPPED) and torch.device(device).type == "cuda":
                    return  # the process may be poisoned, or hold memory
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


def _samples(spec: OpSpec, backend: str, device: torch.device) -> Iterator[tuple[Sample, bool]]:
    """What is run, and whether it is a large case.

    Triton compiles each new combination of shapes and flags, which takes longer than all else: it gets about four
    samples of the first dtype and the largest of each other one.
    """

    def drawn(samples: Callable[..., Iterator[Sample]], dtype: torch.dtype) -> Iterator[Sample]:
        return samples(device, dtype, torch.Generator().manual_seed(0))

    for dtype in spec.dtypes:
        samples = list(drawn(spec.samples, dtype))
        if backend == "triton":
            few = samples[:: max(1, len(samples) // 4)] if dtype == spec.dtypes[0] else []
            samples = [*few, max(samples, key=lambda s: sum(t.numel() for t in tensors(s.args)))]
        yield from ((sample, False) for sample in samples)
    if backend != "triton" or not backends.TRITON_INTERPRETS:
        yield from ((sample, True) for sample in drawn(spec.large, spec.dtypes[0]))


def _check(spec: OpSpec, backend: str, device: str, say: Callable[..., None]) -> dict[str, Any]:
    """Every sample, forward and backward; returns the verdict's status and detail."""
    function = operator(spec, backend)
    try:
        for sample, large in _samples(spec, backend, torch.device(device)):
            say(sample=sample.id)
            if not spec.differentiable:
                check_forward(spec, function, sample)
                continue
            check_gradient(spec, function, sample, 0)
            if large or backend == "native":
                check_one_pass(spec, backend, sample, None)
            if large:
                check_one_pass(spec, backend, sample, 0)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except Mismatch as error:
        return {"status": WRONG, "detail": str(error).strip().splitlines()[0]}
    except Exception as error:  # whatever a kernel raises is the verdict, unless memory was short
        text = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        short = isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
        return {"status": SKIPPED if short else FAILED, "detail": text}
    return {"status": OK}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda":
        torch.cuda.set_device(options.device)

    def say(**message: Any) -> None:
        print(_MARK + json.dumps(message), flush=True)

    for case in options.cases:
        stem, backend = case.split(":")
        say(started=case)
        say(**_check(SPECS[stem], backend, options.device, say))
