# SPDX-License-Identifier: Apache-2.0
"""The only clock of the benchmarks: time per step, per call and per graph replay; memory and launches of a run."""

from __future__ import annotations

import contextlib
import ctypes
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

# Copies of a step at most, which bounds the nodes of a graph. What moves less than a megabyte or two is evicted by the
# read before each replay.
COPIES = 64


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


def evicting_bytes(device: torch.device) -> int:
    """How much has to be read so that nothing read before is left in the last-level cache: more than twice its size."""
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).L2_cache_size + 2**20
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return min(max(2 * max(sizes) + 2**20, 64 * 2**20), 256 * 2**20)


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
        self.evicting_bytes = evicting_bytes(self.device)
        self._evicting = torch.ones(self.evicting_bytes // 4, device=self.device)
        self._plain = torch.rand(2**20, device=self.device)
        self.log1p: list[float] = []
        self._ticks_per_s = 0.0
        self.bandwidth = self._bandwidth()

    def _bandwidth(self) -> float:
        """Bytes per second of a large copy, counting both the read and the write."""
        count = 2**28 if self.cuda else 2**25
        source = torch.rand(count, device=self.device)
        target = torch.empty_like(source)
        times = [self.time([lambda: target.copy_(source)], flush=False)[0] for _ in range(9)]
        return 2 * nbytes(source) / statistics.median(times[2:])

    def flush(self) -> None:
        """Evict the caches by reading: lines that were written would have to be written back while others are timed."""
        self._evicting.sum()

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

    def copies(self, moved: int) -> int:
        """How many copies of a step that moves so many bytes evict each other from the cache, within reason."""
        return max(2, min(COPIES, -(-self.evicting_bytes // max(moved, 1)) + 1))

    def device_time(self, steps: Sequence[Callable[[], object]], budget: Budget, rounds: int = 30) -> float:
        """Seconds per step without launch overhead: all of them are replayed from one CUDA graph.

        The steps are copies of one, each on memory of its own, so that none finds its inputs in the cache.

        Raises:
            RuntimeError: the steps can't be captured.
        """

        def all_steps() -> None:
            for step in steps:
                step()

        self._require_capturable(steps[0])
        replay = Graph(all_steps, device=self.device)
        # Several replays between two events, since the gaps around a single short one would count too. Where the
        # copies are fewer than ten, each moves so much that they are cold in every replay.
        repeats = max(1, 10 // len(steps))
        times: list[float] = []
        for _ in range(max(rounds, 3)):
            if budget.used > 0.97 and len(times) >= 3:
                break
            times += self.time([lambda: [replay() for _ in range(repeats)]])
        return statistics.median(times) / (repeats * len(steps))

    def _require_capturable(self, step: Callable[[], object]) -> None:
        """Raise RuntimeError if the step makes the host wait. A capture would find out too, but not end cleanly."""
        step()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            self.synchronize()

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


def peak_resident(run: Callable[[], object]) -> int | None:
    """By how many bytes the process grows at its peak while it runs; None where the system does not say.

    Unlike a profiler it counts what libraries allocate by themselves.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None

    def kilobytes(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would be used again and not be seen
    reset.write_text("5")
    before = kilobytes("VmRSS")
    run()
    return 1024 * max(kilobytes("VmHWM") - before, 0)


def profiled(run: Callable[[], object], memory: bool = False) -> list[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profile:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return list(profile.profiler.kineto_results.events())
