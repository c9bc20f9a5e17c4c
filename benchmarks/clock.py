# SPDX-License-Identifier: Apache-2.0
"""The only clock of the benchmarks: time per step, per call and per graph replay; memory and launches of a run."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from gfl.engine.graphs import Graph


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def nbytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors(value))


class Budget:
    """The time a whole benchmark may take; what does not fit is skipped and reported."""

    def __init__(self, limit: float) -> None:
        self.limit, self.start = limit, time.monotonic()

    @property
    def used(self) -> float:
        """Share of the limit, above 1 when it is exceeded."""
        return (time.monotonic() - self.start) / self.limit


class Machine:
    """A device, its copy bandwidth, and how to time on it.

    Args:
        device: "cpu" or "cuda".
        cpu_time: count the processor time of this process's threads, which other processes disturb less; CPU only.
    """

    def __init__(self, device: str, cpu_time: bool = False) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.now = time.process_time if cpu_time else time.perf_counter
        self._flush = torch.empty(self._cache_bytes() // 4, dtype=torch.float32, device=self.device)
        self._plain = torch.rand(2**20, device=self.device)
        self.log1p: list[float] = []
        self._ticks_per_s = 0.0
        self.bandwidth = self._bandwidth()

    def _cache_bytes(self) -> int:
        """Twice the last-level cache, within reason."""
        if self.cuda:
            return max(2 * torch.cuda.get_device_properties(self.device).L2_cache_size, 128 * 2**20)
        sizes = [0]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            with contextlib.suppress(OSError, ValueError):
                sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
        return min(max(2 * max(sizes), 64 * 2**20), 256 * 2**20)

    def _bandwidth(self) -> float:
        """Bytes per second of a large copy, counting both the read and the write."""
        count = 2**28 if self.cuda else 2**25
        source = torch.rand(count, device=self.device)
        target = torch.empty_like(source)
        times = [self.time([lambda: target.copy_(source)], flush=False)[0] for _ in range(9)]
        return 2 * nbytes(source) / statistics.median(times[2:])

    def flush(self) -> None:
        """Evict the caches."""
        self._flush.fill_(1.0)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def time(self, steps: Sequence[Callable[[], object]], flush: bool = True, host: float = 0.0) -> list[float]:
        """Seconds of each step, run one after another.

        On a GPU, `host` is how long the host takes to launch the steps: the device waits for as long first, so that
        launches hide behind the work as they do in training. With 0 the host's time counts.
        """
        if flush:
            self.flush()
        if not self.cuda:
            times = [self.now()]
            for step in steps:
                step()
                times.append(self.now())
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
        """Ticks of `torch.cuda._sleep` per second."""
        if not self._ticks_per_s:
            for _ in range(2):
                seconds = self.time([lambda: torch.cuda._sleep(10_000_000)], flush=False)[0]
            self._ticks_per_s = 10_000_000 / seconds
        return self._ticks_per_s

    def time_log1p(self) -> None:
        """Time a plain operation between the others: its spread shows how steady the machine was."""
        self.log1p += self.time([lambda: torch.log1p(self._plain)])

    def host_time(self, calls: dict[str, Callable[[], object]], budget: Budget, turns: int = 12) -> dict[str, float]:
        """Microseconds of host time per call: the median over batches of 100 calls, the functions in turn."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(turns):
            if turn > 2 and budget.used > 0.98:
                break
            for name, call in calls.items():
                begin = self.now()
                for _ in range(100):
                    call()
                if turn > 0:
                    times[name].append((self.now() - begin) * 1e4)
                self.synchronize()
        return {name: statistics.median(values) for name, values in times.items()}

    def device_time(self, step: Callable[[], object], budget: Budget, rounds: int = 30) -> float:
        """Microseconds of a step without launch overhead: replayed from a CUDA graph on a GPU, timed as it is on a CPU.

        Raises:
            RuntimeError: the step can't be captured.
        """
        if not self.cuda:
            return 1e6 * statistics.median([self.time([step])[0] for _ in range(3)])
        replay = Graph(step, device=self.device)
        times: list[float] = []
        for _ in range(max(rounds, 3)):
            if budget.used > 0.97 and len(times) >= 3:
                break
            # Ten replays between two events: the gaps around a single one would count too.
            times += self.time([lambda: [replay() for _ in range(10)]])
        return 1e5 * statistics.median(times)

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
