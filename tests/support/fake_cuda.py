# SPDX-License-Identifier: Apache-2.0
"""Two GPUs where there is none: tensors are the CPU's; devices, streams, events, pinned memory and graphs as CUDA's.

Copies into pinned memory are done when an event after them on their stream is waited for. A graph holds the operators
of its capture and replays them into the same memory; what makes the host wait is refused while it is captured.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gfl_ops.core import backends

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
UNWRITTEN = 77


class Action(NamedTuple):
    """What was done, on which current device, and on which stream."""

    what: str
    device: int
    stream: FakeStream


class FakeStream:
    def __init__(self, cuda: FakeCuda, index: int) -> None:
        self.cuda, self.device = cuda, torch.device("cuda", index)
        self.queued = self.done = 0
        self.pending: deque[Callable[[], object]] = deque()

    def queue(self, copy: Callable[[], object]) -> None:
        self.queued += 1
        self.pending.append(copy)

    def record_event(self) -> FakeEvent:
        self.cuda.note("event", self)
        return FakeEvent(self, self.queued)

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.note("wait_event", self)

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.note("wait_stream", self)


class FakeEvent:
    def __init__(self, stream: FakeStream, after: int) -> None:
        self.stream, self.after = stream, after

    def synchronize(self) -> None:
        while self.stream.done < self.after:
            self.stream.done += 1
            self.stream.pending.popleft()()


class _Capture(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function.name().split("::")
        if name.split(".")[0] in WAITING or namespace == "gfl_reference":
            raise RuntimeError(f"{function.name()}: operation not permitted when stream is capturing")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class FakeGraph:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            for place, value in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place.numel() and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class FakeCuda:
    """Takes the place of `torch.cuda` while a test runs; `actions` tells what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actions: list[Action] = []
        self.captures: list[dict[str, Any]] = []
        self.chosen: list[Any] = []  # by set_device
        self._now = threading.local()
        self._defaults = [FakeStream(self, index) for index in range(2)]
        self.pinned: set[int] = set()
        for name in ("device", "stream", "current_stream", "graph", "set_device", "current_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(self, self._index(device)))
        self._patch_tensors(monkeypatch)
        monkeypatch.setattr(backends, "_gpu_is_new", False)
        for stem in ("postprocess", "atss", "gfl_loss"):
            monkeypatch.setitem(backends._AUTOMATIC, (stem, "cuda"), "native")

    def note(self, what: str, stream: FakeStream | None = None) -> None:
        self.actions.append(Action(what, self.current_device(), stream or self.current_stream()))

    def current_device(self) -> int:
        return getattr(self._now, "device", 0)

    def set_device(self, device: Any) -> None:
        self.chosen.append(device)
        self._now.device = self._index(device)

    def _index(self, device: Any) -> int:
        if device is None or isinstance(device, int):
            return self.current_device() if device is None else device
        index = torch.device(device).index
        return self.current_device() if index is None else index

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._now.device = self.current_device(), self._index(device)
        try:
            yield
        finally:
            self._now.device = before

    def _streams(self) -> list[FakeStream]:
        if not hasattr(self._now, "streams"):
            self._now.streams = list(self._defaults)
        return self._now.streams

    def current_stream(self, device: Any = None) -> FakeStream:
        return self._streams()[self._index(device)]

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        index = stream.device.index
        with self.device(index):
            before, self._streams()[index] = self._streams()[index], stream
            try:
                yield
            finally:
                self._streams()[index] = before

    @contextlib.contextmanager
    def graph(
        self, graph: FakeGraph, pool: Any = None, stream: FakeStream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        # Without a stream torch takes one of the device that was current at the process's first capture.
        stream = self._defaults[0] if stream is None else stream
        with self.stream(stream):
            self.captures.append({"device": self.current_device(), "stream": stream, "mode": capture_error_mode})
            capture = _Capture()
            with capture:
                yield
            graph.calls = capture.calls if stream is not self._defaults[0] else []

    def _patch_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        to, copy, empty_like = Tensor.to, Tensor.copy_, torch.empty_like

        def fake_to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if any(isinstance(a, torch.device) and a.type == "cuda" for a in args):
                self.note("to")
                args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
            return to(x, *args, **kwargs)

        def fake_copy(x: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
            if not (non_blocking and x.data_ptr() in self.pinned):
                return copy(x, other, non_blocking)
            self.note("fetch")
            value = other.clone()
            self.current_stream().queue(lambda: copy(x, value))
            return x

        def fake_empty_like(x: Tensor, *, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            found = empty_like(x, **kwargs)
            if pin_memory:
                self.note("pinned")
                found.fill_(UNWRITTEN)
                self.pinned.add(found.data_ptr())
            return found

        def fake_pin(x: Tensor) -> Tensor:
            return x.clone()

        monkeypatch.setattr(Tensor, "to", fake_to)
        monkeypatch.setattr(Tensor, "copy_", fake_copy)
        monkeypatch.setattr(Tensor, "pin_memory", fake_pin)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: self.note("record_stream", stream))
        monkeypatch.setattr(torch, "empty_like", fake_empty_like)
