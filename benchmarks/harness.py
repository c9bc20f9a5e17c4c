# SPDX-License-Identifier: Apache-2.0
"""Check, then time: providers of one computation side by side, on the same inputs, in one interleaved run.

A provider is first compared with an oracle: the reference in fp64 on the same rounded inputs, or, for decisions (which
box, which location), the reference itself. One that disagrees is reported as wrong and not timed. The others take
turns, so that a disturbance of the machine hits all of them; the caches are flushed before each turn. A plain log1p is
timed beside them.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import gfl_ops
from gfl_ops.core import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = tuple(b for b in backends.BACKENDS if b != "auto")
# ‖got − want‖ / ‖want‖. fp32: sums of millions of terms of one sign, and boxes of a thousand pixels a few pixels wide.
# 16 bits: a gradient is rounded once to its dtype, which is half an ulp of each element, and may be summed in it.
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "fp16": 4e-3, "bf16": 1e-2}
SLOW = 1.0  # seconds: a turn that takes longer is taken once, without a second one that counts its memory
# Share of decisions that may differ: exact ties, and IoUs within a rounding of the threshold. Coordinates of 16 bits
# are whole pixels, so that many an IoU is the threshold itself; peers compare it with a threshold in double.
DECISIONS = {"fp64": 2e-3, "fp32": 2e-3, "fp16": 2e-2, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """One computation, its inputs, and who else can do it.

    Attributes:
        stem: the operator in `gfl_ops.core.registry.SPECS`.
        name: what is timed; a stem may have several.
        what: the size, for people.
        inputs: keyword arguments of `ours` and of every peer: tensors, lists of tensors, or anything else.
        ours: calls the public function, whichever backend is set.
        peers: name -> the same computation by somebody else; None where that package is not installed.
        dense: the form for torch.compile; None where there is none.
        gradients: names of the inputs that want a gradient; none means forward only.
        agree: for decisions: (got, want) -> share of them that differ.
        reads: bytes that must be read, where that is less than all inputs.
    """

    stem: str
    name: str
    what: str
    inputs: dict[str, Any]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any] | None] = field(default_factory=dict)
    dense: Callable[..., Any] | None = None
    gradients: tuple[str, ...] = ()
    agree: Callable[[Any, Any], float] | None = None
    reads: int | None = None


@dataclass
class Timing:
    """Milliseconds over the rounds."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        values = sorted(1e3 * s for s in seconds)
        return Timing(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))


@dataclass
class Result:
    """What came of one provider of one case; `status` is "timed", "wrong", "failed" or "skipped"."""

    stem: str
    name: str
    what: str
    batch: int
    dtype: str
    provider: str
    status: str = "timed"
    reason: str = ""
    error: float | None = None
    first_call_s: float | None = None
    rounds: int = 0
    forward: Timing | None = None
    backward: Timing | None = None
    both: Timing | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    gb_per_s: float | None = None
    floor_share: float | None = None
    memory: int | None = None
    launches: int | None = None

    @property
    def total(self) -> Timing | None:
        return self.both or self.forward


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours, of sorted values."""
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(value))


class Clock:
    """The time that the whole run may take; what does not fit is left out and said."""

    def __init__(self, limit: float) -> None:
        self.limit, self.start = limit, time.monotonic()

    @property
    def used(self) -> float:
        return (time.monotonic() - self.start) / self.limit


class Machine:
    """The device: its copy bandwidth, how to flush its caches, and how to time on it."""

    def __init__(self, device: str, cpu_time: bool = False) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        # Of all threads of this process: what other processes take does not count.
        self._now = time.process_time if cpu_time else time.perf_counter
        self._flush = torch.empty(self._cache_bytes() // 4, dtype=torch.float32, device=self.device)
        self._plain = torch.rand(2**20, device=self.device)
        self.log1p: list[float] = []
        self._ticks_per_s = 0.0
        self.bandwidth = self._bandwidth()

    def _cache_bytes(self) -> int:
        """Twice the last cache, within reason."""
        if self.cuda:
            return max(2 * torch.cuda.get_device_properties(self.device).L2_cache_size, 128 * 2**20)
        sizes = [0]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            with contextlib.suppress(OSError, ValueError):
                sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
        return min(max(2 * max(sizes), 64 * 2**20), 256 * 2**20)

    def _bandwidth(self) -> float:
        """Bytes a second of a large copy, read and written both counted."""
        count = 2**28 if self.cuda else 2**25
        source = torch.rand(count, device=self.device)
        target = torch.empty_like(source)
        times = [self.time([lambda: target.copy_(source)], flush=False)[0] for _ in range(9)]
        return 2 * nbytes(source) / statistics.median(times[2:])

    def flush(self) -> None:
        self._flush.fill_(1.0)

    def time(self, steps: Sequence[Callable[[], object]], flush: bool = True, host: float = 0.0) -> list[float]:
        """Seconds of each step, run one after another.

        On a GPU the device's own time: the host, which takes `host` seconds to launch the steps, gets ahead first, so
        that launches hide behind the work as in training.
        """
        if flush:
            self.flush()
        if not self.cuda:
            times = [self._now()]
            for step in steps:
                step()
                times.append(self._now())
            return [b - a for a, b in pairwise(times)]
        torch.cuda.synchronize()
        if host:
            torch.cuda._sleep(int(1.3 * host * self._clock_rate()))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        events[0].record()
        for step, event in zip(steps, events[1:]):
            step()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]

    def _clock_rate(self) -> float:
        """Ticks a second of `torch.cuda._sleep`."""
        if not self._ticks_per_s:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(2):
                begin.record()
                torch.cuda._sleep(10_000_000)
                end.record()
                torch.cuda.synchronize()
            self._ticks_per_s = 10_000_000 / (begin.elapsed_time(end) / 1e3)
        return self._ticks_per_s

    def time_log1p(self) -> None:
        self.log1p += self.time([lambda: torch.log1p(self._plain)])

    def memory(self, run: Callable[[], object]) -> int | None:
        """Peak of what a run allocates on the device, in bytes, results included."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        held = peak = 0
        for event in sorted(profiled(run, memory=True), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def launches(self, run: Callable[[], object]) -> int | None:
        """Kernels, copies and fills that a run starts on the GPU."""
        if not self.cuda:
            return None
        return sum(e.device_type() == torch.autograd.DeviceType.CUDA for e in profiled(run)) or None


def profiled(run: Callable[[], object], memory: bool = False) -> list[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return list(profile.profiler.kineto_results.events())


class Run:
    """A provider at work on a case: fresh leaves, forward, backward."""

    def __init__(self, case: Case, call: Callable[..., Any], backend: str, inputs: dict[str, Any]) -> None:
        self.case, self.call, self.backend = case, call, backend
        self.inputs = dict(inputs)
        self.leaves: list[Tensor] = []
        self.results: Any = None
        self.gradients: tuple[Tensor | None, ...] = ()
        self._grads: list[Tensor] | None = None

    def prepare(self) -> None:
        gfl_ops.set_backend(self.backend)
        for name in self.case.gradients:
            self.inputs[name] = tree_map(lambda t: t.detach().requires_grad_(), self.inputs[name])
        self.leaves = tensors([self.inputs[name] for name in self.case.gradients])
        self.results, self.gradients = None, ()

    def forward(self) -> None:
        self.results = self.call(**self.inputs)

    def backward(self) -> None:
        reached = [t for t in tensors(self.results) if t.requires_grad]
        if self._grads is None:
            # 1 for a loss; fresh numbers, the same for every provider, for a tensor.
            draw = torch.Generator().manual_seed(1)
            self._grads = [
                torch.ones_like(t) if t.dim() == 0 else torch.randn(t.shape, generator=draw).to(t) for t in reached
            ]
        self.gradients = torch.autograd.grad(reached, self.leaves, self._grads, allow_unused=True)

    def steps(self) -> list[Callable[[], None]]:
        return [self.forward, self.backward] if self.case.gradients else [self.forward]

    def once(self) -> tuple[Any, list[Tensor]]:
        """Results and gradients."""
        self.prepare()
        with torch.set_grad_enabled(bool(self.case.gradients)):
            for step in self.steps():
                step()
        zeros = [torch.zeros_like(v) if g is None else g for v, g in zip(self.leaves, self.gradients)]
        return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, self.results), zeros


def double(value: Any) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def relative(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest ‖got − want‖ / ‖want‖ of the pairs; infinite where shapes differ or anything is not finite."""
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for g, w in zip(got, want):
        if g.shape != w.shape or not bool(torch.isfinite(g).all()):
            return float("inf")
        norm = float(w.double().norm())
        difference = float((g.double() - w.double()).norm())
        worst = max(worst, difference / norm if norm else difference)
    return worst


class Bench:
    """Runs cases one after another; a turn of more than `slow` seconds is taken once."""

    def __init__(
        self, machine: Machine, clock: Clock, rounds: int = 30, seconds: float = 1.0, slow: float = SLOW
    ) -> None:
        self.machine, self.clock, self.rounds, self.seconds, self.slow = machine, clock, rounds, seconds, slow

    def providers(self, case: Case, compiled: bool) -> Iterator[tuple[str, Callable[..., Any] | None, str, str]]:
        """(name, call or None, backend, why it does not run)."""
        for name, call in case.peers.items():
            yield name, call, "auto", "" if call else f"{name} is not installed for this torch"
        if case.dense is not None:
            if not compiled:
                yield "compiled", None, "auto", "left out by default for this dtype and size (--full)"
            elif self.clock.used > 0.6:
                yield "compiled", None, "auto", "no time left to compile (--limit)"
            else:
                torch._dynamo.reset()
                mode = "max-autotune-no-cudagraphs" if self.machine.cuda else "default"
                yield "compiled", torch.compile(case.dense, dynamic=False, mode=mode), "auto", ""
        for backend in BACKENDS:
            why = backends.unavailable(backend, case.stem, self.machine.device.type)
            if backend == "triton" and not self.machine.cuda and why is None:
                why = "Triton's interpreter is not worth timing"
            yield backend, None if why else case.ours, backend, why or ""

    def run(self, case: Case, dtype: str, batch: int, only: Sequence[str] = (), compiled: bool = True) -> list[Result]:
        """Check and time every provider of a case."""
        with gfl_ops.set_backend(gfl_ops.get_backend()):  # back to it at the end
            return self._run(case, dtype, batch, only, compiled)

    def _run(self, case: Case, dtype: str, batch: int, only: Sequence[str], compiled: bool) -> list[Result]:
        oracle = Run(case, case.ours, "reference", case.inputs if case.agree else double(case.inputs))
        want, want_gradients = oracle.once()
        results, runs = [], {}
        for name, call, backend, why in self.providers(case, compiled):
            if only and name not in only:
                continue
            result = Result(case.stem, case.name, case.what, batch, dtype, name)
            results.append(result)
            if self.clock.used > 1.0:
                call, why = None, "no time left (--limit)"
            if call is None:
                result.status, result.reason = "skipped", why
                continue
            run = Run(case, call, backend, case.inputs)
            try:
                begin = time.perf_counter()
                got, gradients = run.once()
                if self.machine.cuda:
                    torch.cuda.synchronize()
                result.first_call_s = time.perf_counter() - begin
                result.error, tolerance = self._error(case, dtype, got, gradients, want, want_gradients)
            except Exception as error:
                said = str(error).strip().splitlines()
                result.status, result.reason = "failed", f"{type(error).__name__}: {said[0][:200] if said else ''}"
                continue
            if not result.error <= tolerance:
                result.status = "wrong"
                result.reason = f"differs by {result.error:.1e} from the oracle, {tolerance:.0e} is allowed"
                continue
            self._account(case, result, want, want_gradients)
            runs[name] = (run, result)
        self.time(runs)
        return results

    def _error(
        self, case: Case, dtype: str, got: Any, gradients: list[Tensor], want: Any, want_gradients: list[Tensor]
    ) -> tuple[float, float]:
        if case.agree is not None:
            return float(case.agree(got, want)), DECISIONS[dtype]
        return relative(tensors(got) + gradients, tensors(want) + want_gradients), TOLERANCE[dtype]

    def _account(self, case: Case, result: Result, want: Any, want_gradients: list[Tensor]) -> None:
        """The fewest bytes that must be moved: inputs read once, results and gradients written once."""
        read = nbytes(case.inputs) if case.reads is None else case.reads
        wide = 4 if result.dtype != "fp64" else 8
        out = sum(t.numel() * (wide if t.is_floating_point() else t.element_size()) for t in tensors(want))
        result.bytes["forward"] = read + out
        if case.gradients:
            written = nbytes([case.inputs[n] for n in case.gradients])
            result.bytes["backward"] = read + out + written
            result.bytes["both"] = read + out + written

    def time(self, runs: dict[str, tuple[Run, Result]]) -> None:
        """Let the runs take turns, and fill in what they took; each has had its first call."""
        turns, hosts = {}, {}
        for name, (run, _) in runs.items():
            # The first call compiled and warmed up; this one tells how long a turn takes.
            begin = time.perf_counter()
            run.once()
            hosts[name] = time.perf_counter() - begin
            if self.machine.cuda:
                torch.cuda.synchronize()
            spent = time.perf_counter() - begin
            hurry = 1.0 if self.clock.used < 0.75 else 0.2
            wanted = int(hurry * self.seconds / max(len(runs), 1) / max(spent, 1e-4))
            least = 1 if spent > self.slow or self.clock.used > 0.95 else 3
            turns[name] = max(least, min(self.rounds, wanted))
        most = max(turns.values(), default=0)
        times: dict[str, list[list[float]]] = {name: [] for name in runs}
        for turn in range(most):
            self.machine.time_log1p()
            for name, (run, _) in runs.items():
                # A slow provider takes fewer turns, spread over the whole run.
                if (turn + 1) * turns[name] // most == turn * turns[name] // most:
                    continue
                run.prepare()
                with torch.set_grad_enabled(bool(run.case.gradients)):
                    times[name].append(self.machine.time(run.steps(), host=min(hosts[name], 0.05)))
        for name, (run, result) in runs.items():
            result.rounds = len(times[name])
            columns = list(zip(*times[name]))
            result.forward = Timing.of(columns[0])
            if run.case.gradients:
                result.backward = Timing.of(columns[1])
                result.both = Timing.of([sum(row) for row in times[name]])
            total = result.total
            moved = result.bytes.get("both" if result.both else "forward")
            if moved and total is not None and total.median > 0:
                result.gb_per_s = moved / total.median / 1e6
                result.floor_share = moved / self.machine.bandwidth / (total.median / 1e3)
            run.results, run.gradients = None, ()
            if self.clock.used > 0.95 or (total is not None and total.median > 1e3 * self.slow):
                continue
            result.memory = self.machine.memory(run.once)
            result.launches = self.machine.launches(run.once)
            run.results, run.gradients, run.leaves = None, (), []
