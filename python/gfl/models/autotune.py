# SPDX-License-Identifier: Apache-2.0
"""Choices by the clock, made once per shape on a GPU: cuDNN's algorithms, and which of several calls to make."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

# Shapes of input for which anything is timed: it takes a second or so per shape and network.
TUNED_SHAPES = 32
# Calls that are timed together, after one that loads what it needs.
TIMED_CALLS = 5


class CudnnTuning:
    """Has cuDNN time its algorithms while the first `limit` shapes of input are computed, and never for further ones.

    cuDNN keeps what it chose per shape of a convolution, so the setting must be on when a shape is first met.
    """

    def __init__(self, limit: int = TUNED_SHAPES) -> None:
        self._limit = limit
        self._shapes: set[torch.Size] = set()

    def __call__(self, x: Tensor) -> AbstractContextManager[None]:
        """The context to compute in for the input `x`; nothing on a CPU, or where algorithms must repeat themselves."""
        if not x.is_cuda or torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
            return nullcontext()
        if len(self._shapes) < self._limit:
            self._shapes.add(x.shape)
        return _cudnn_benchmark() if x.shape in self._shapes else nullcontext()


_lock = threading.Lock()
_users, _before = 0, False


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """`torch.backends.cudnn.benchmark` is on; as before once the last of several threads leaves."""
    global _users, _before
    with _lock:
        if _users == 0:
            _before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                torch.backends.cudnn.benchmark = _before


class Fastest:
    """Chooses among calls with the same result: each is timed at the first input of a kind, the fastest is kept.

    A call that raises is not supported there, and is not chosen; out of memory is not such a reason, and is raised.
    Beyond `limit` kinds the last choice is used.
    """

    def __init__(self, limit: int = TUNED_SHAPES) -> None:
        self._limit = limit
        self._chosen: dict[Hashable, str] = {}

    def __call__(self, kind: Hashable, ways: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """The result of the way that is the fastest for inputs of a `kind`; the first one always works.

        While a CUDA graph is captured, which allows no timing, an unknown kind goes the first way.
        """
        chosen = self._chosen.get(kind)
        if chosen is None and len(self._chosen) >= self._limit:
            chosen = next(reversed(self._chosen.values()))
        elif chosen is None:
            chosen = next(iter(ways))
            if not torch.cuda.is_current_stream_capturing():
                times = {name: time for name, way in ways.items() if (time := _seconds_if_supported(way)) is not None}
                chosen = self._chosen[kind] = min(times, key=times.__getitem__, default=chosen)
        return ways[chosen]()


def _seconds_if_supported(way: Callable[[], Tensor]) -> float | None:
    try:
        return seconds(way)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def seconds(call: Callable[[], Tensor]) -> float:
    """Time of a few calls on the current GPU, after one that does not count."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(TIMED_CALLS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
