# SPDX-License-Identifier: Apache-2.0
"""Check, then time: providers of one computation side by side, on the same inputs, in one interleaved run.

A provider is first compared with an oracle: the reference in fp64 on the same rounded inputs, or, for decisions (which
box, which location), the reference itself or a quicker form of it. One that disagrees is reported as wrong and not
timed. The others take turns, so that a disturbance of the machine hits all of them; the caches are flushed before each
turn. A plain log1p is timed between them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import gfl_ops
from clock import Budget, Machine, nbytes, tensors
from gfl_ops.core import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
BACKENDS = tuple(b for b in backends.BACKENDS if b != "auto")
# ‖got − want‖ / ‖want‖. fp32: sums of millions of terms of one sign, and boxes of a thousand pixels a few pixels wide.
# 16 bits: a gradient is rounded once to its dtype, which is half an ulp of each element, and may be summed in it.
TOLERANCE = {"fp64": 1e-10, "fp32": 1e-4, "fp16": 4e-3, "bf16": 1e-2}
SLOW = 1.0  # seconds: a slower turn runs once, and its memory is not measured
# Share of decisions that may differ: exact ties, and IoUs within a rounding of the threshold. 16-bit coordinates are
# whole pixels, so that many an IoU equals the threshold, which peers hold in double precision.
DECISIONS = {"fp64": 2e-3, "fp32": 2e-3, "fp16": 2e-2, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """One computation, its inputs, and who else can do it.

    Attributes:
        stem: the operator in `gfl_ops.core.registry.SPECS`.
        name: what is timed; a stem may have several cases.
        what: the sizes, for the table.
        inputs: keyword arguments of `ours` and of every peer: tensors, lists or tuples of tensors, or anything else.
        ours: calls the public function, on whichever backend is set.
        peers: name -> the same computation by somebody else; None where that package is not installed. Without a peer
            "eager", the operator's own reference is the eager provider.
        dense: the form that torch.compile makes the most of; without one the eager provider, if that is the reference.
        gradients: names of the inputs that need a gradient; none means forward only.
        agree: for decisions: (got, want) -> share of them that differ.
        oracle: for decisions: what they are compared with, where the reference would take long.
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
    oracle: Callable[..., Any] | None = None
    reads: int | None = None

    @property
    def eager_is_reference(self) -> bool:
        return "eager" not in self.peers


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
    """The outcome of one provider on one case; `status` is "timed", "wrong", "failed" or "skipped".

    `device_ms` is the device's own time of both directions, in a CUDA graph, or `not_in_graph` the reason why it was
    not measured.
    """

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
    device_ms: float | None = None
    not_in_graph: str = ""
    memory: int | None = None
    launches: int | None = None

    @property
    def total(self) -> Timing | None:
        return self.both or self.forward

    def check(self, error: float, tolerance: float, oracle: str) -> bool:
        """Note the error; True if it is within the tolerance, else the result is marked wrong."""
        self.error = error
        if error <= tolerance:
            return True
        self.status, self.reason = "wrong", f"differs by {error:.1e} from {oracle}, {tolerance:.0e} is allowed"
        return False


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours, of sorted values."""
    position = share * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


class Run:
    """One provider running one case: fresh leaves, forward, backward."""

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
        outputs = [t for t in tensors(self.results) if t.requires_grad]
        if self._grads is None:
            # 1 for a loss; random numbers, the same for every provider, for a tensor.
            draw = torch.Generator().manual_seed(1)
            self._grads = [
                torch.ones_like(t) if t.dim() == 0 else torch.randn(t.shape, generator=draw).to(t) for t in outputs
            ]
        self.gradients = torch.autograd.grad(outputs, self.leaves, self._grads, allow_unused=True)

    def steps(self) -> list[Callable[[], None]]:
        return [self.forward, self.backward] if self.case.gradients else [self.forward]

    def all_steps(self) -> None:
        self.prepare()
        with torch.set_grad_enabled(bool(self.case.gradients)):
            for step in self.steps():
                step()

    def copy(self) -> Run:
        """The same on other memory."""
        inputs = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, self.inputs)
        return Run(self.case, self.call, self.backend, inputs)

    def once(self) -> tuple[Any, list[Tensor]]:
        """Results and gradients."""
        self.all_steps()
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
    """Runs cases one after another.

    Args:
        machine: to time on.
        budget: for all cases together.
        rounds: turns per provider at most.
        seconds: aimed at per case.
        slow: a turn that takes more seconds runs once.
        host_ahead: on a GPU, hide the host's launches behind the device's work; False times from call to result.
        graphs: on a GPU, also time each provider in a CUDA graph, where it can be captured.
        counts: also count memory and launches, which takes two more turns under the profiler.
    """

    def __init__(
        self,
        machine: Machine,
        budget: Budget,
        rounds: int = 30,
        seconds: float = 1.0,
        slow: float = SLOW,
        host_ahead: bool = True,
        graphs: bool = False,
        counts: bool = True,
    ) -> None:
        self.machine, self.budget, self.rounds, self.seconds, self.slow = machine, budget, rounds, seconds, slow
        self.host_ahead, self.graphs, self.counts = host_ahead, graphs and machine.cuda, counts

    def providers(self, case: Case, compiled: bool) -> Iterator[tuple[str, Callable[..., Any] | None, str, str]]:
        """(name, call or None, backend, why it does not run)."""
        eager = "reference" if case.eager_is_reference else "auto"
        if case.eager_is_reference:
            yield "eager", case.ours, eager, ""
        for name, call in case.peers.items():
            yield name, call, "auto", "" if call else f"{name} is not installed for this torch"
        dense = case.dense or (case.ours if case.eager_is_reference and case.gradients else None)
        if dense is not None:
            if not compiled:
                yield "compiled", None, eager, "left out by default for this size (--full)"
            elif self.budget.used > 0.8:
                yield "compiled", None, eager, "no time left to compile (--limit)"
            else:
                torch._dynamo.reset()
                mode = "max-autotune-no-cudagraphs" if self.machine.cuda else "default"
                yield "compiled", torch.compile(dense, dynamic=False, mode=mode), eager, ""
        for backend in BACKENDS:
            why = backends.unavailable(backend, case.stem, self.machine.device.type)
            if backend == "triton" and not self.machine.cuda and why is None:
                why = "Triton's interpreter is not worth timing"
            if backend == "reference" and case.eager_is_reference:
                why = "the reference is the eager provider here"
            yield backend, None if why else case.ours, backend, why or ""

    def run(self, case: Case, dtype: str, batch: int, only: Sequence[str] = (), compiled: bool = True) -> list[Result]:
        """Check and time every provider of a case."""
        with gfl_ops.set_backend(gfl_ops.get_backend()):  # back to it at the end
            return self._run(case, dtype, batch, only, compiled)

    def _run(self, case: Case, dtype: str, batch: int, only: Sequence[str], compiled: bool) -> list[Result]:
        inputs = case.inputs if case.agree else double(case.inputs)
        oracle = Run(case, case.oracle or case.ours, "reference", inputs)
        want, want_gradients = oracle.once()
        results, runs = [], {}
        for name, call, backend, why in self.providers(case, compiled):
            if only and name not in only:
                continue
            result = Result(case.stem, case.name, case.what, batch, dtype, name)
            results.append(result)
            if call is None or self.budget.used > 1.0:
                result.status, result.reason = "skipped", why or "no time left (--limit)"
                continue
            run = Run(case, call, backend, case.inputs)
            found = self.first(run, result)
            if found is None:
                continue
            error, tolerance = self._error(case, dtype, *found, want, want_gradients)
            if result.check(error, tolerance, "the oracle"):
                self._count_bytes(case, result, want)
                runs[name] = (run, result)
        self.time(runs)
        for run, result in runs.values() if self.graphs else ():
            self.time_in_graph(run, result)
        return results

    def time_in_graph(self, run: Run, result: Result) -> None:
        """Note the device's own time, of copies of the run that evict each other's inputs, or why there is none."""
        total = result.total
        if self.budget.used > 1.0 or (total is not None and total.median > 1e3 * self.slow):
            result.not_in_graph = "no time left (--limit)" if self.budget.used > 1.0 else "too slow"
            return
        moved = result.bytes["both" if run.case.gradients else "forward"]
        runs = [run.copy() for _ in range(self.machine.copies(moved))]
        try:
            steps = [one.all_steps for one in runs]
            result.device_ms = 1e3 * self.machine.device_time(steps, self.budget, self.rounds)
        except RuntimeError as error:
            self.machine.synchronize()
            result.not_in_graph = str(error).splitlines()[0][:120]

    def first(self, run: Run, result: Result) -> tuple[Any, list[Tensor]] | None:
        """Results and gradients of the first call; None if it fails, with the reason in `result`."""
        try:
            begin = time.perf_counter()
            found = run.once()
            self.machine.synchronize()
            result.first_call_s = time.perf_counter() - begin
        except Exception as error:
            lines = str(error).strip().splitlines()
            result.status, result.reason = "failed", f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
            return None
        return found

    def _error(
        self, case: Case, dtype: str, got: Any, gradients: list[Tensor], want: Any, want_gradients: list[Tensor]
    ) -> tuple[float, float]:
        if case.agree is not None:
            return float(case.agree(got, want)), DECISIONS[dtype]
        return relative(tensors(got) + gradients, tensors(want) + want_gradients), TOLERANCE[dtype]

    def _count_bytes(self, case: Case, result: Result, want: Any) -> None:
        """The fewest bytes that must move: inputs read once, results and gradients written once.

        Backward reads the inputs again, and what arrives for each result, except where all results are numbers: then
        forward can write the gradient.
        """
        read = nbytes(case.inputs) if case.reads is None else case.reads
        wide = 4 if result.dtype != "fp64" else 8
        results = tensors(want)
        out = sum(t.numel() * (wide if t.is_floating_point() else t.element_size()) for t in results)
        result.bytes["forward"] = read + out
        if case.gradients:
            backward = read + out + nbytes([case.inputs[n] for n in case.gradients])
            again = any(t.dim() for t in results)
            result.bytes |= {"backward": backward, "both": backward + (read + out if again else 0)}

    def time(self, runs: dict[str, tuple[Run, Result]]) -> None:
        """Time the runs in turn and fill in their results; each has had its first call."""
        turns, hosts = {}, {}
        for name, (run, _) in runs.items():
            # The first call compiled and warmed up; this one shows how long a turn takes.
            begin = time.perf_counter()
            run.once()
            hosts[name] = time.perf_counter() - begin
            self.machine.synchronize()
            spent = time.perf_counter() - begin
            hurry = 1.0 if self.budget.used < 0.75 else 0.2
            wanted = int(hurry * self.seconds / max(len(runs), 1) / max(spent, 1e-4))
            least = 1 if spent > self.slow or self.budget.used > 0.95 else 3
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
                    host = min(hosts[name], 0.05) if self.host_ahead else 0.0
                    times[name].append(self.machine.time(run.steps(), host=host))
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
            if not self.counts or self.budget.used > 0.95 or (total is not None and total.median > 1e3 * self.slow):
                continue
            result.memory = self.machine.memory(run.once)
            result.launches = self.machine.launches(run.once)
            run.results, run.gradients, run.leaves = None, (), []
