# SPDX-License-Identifier: Apache-2.0
"""Stopping a training by a signal: after the step, with a checkpoint, all processes after the same one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from ..signals import REPEAT, end_at_once
from .distributed import Process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a training shall stop; within its context SIGINT and SIGTERM ask for that.

    A second signal ends the process at once: files are written so that this is safe at any moment. In another thread
    than the main one, where Python has no signals, nothing stops it.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.asked = threading.Event()
        self._since = 0.0
        self._interruptible = False
        self._flag = torch.zeros(1)
        self._pending: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.asked.is_set():
            self._since = now
            self.asked.set()
            if self._interruptible:
                raise KeyboardInterrupt
        elif now - self._since > REPEAT:
            end_at_once(number)

    def now(self) -> bool:
        """Whether to stop after this step; each of several processes calls it after each step and gets one answer.

        They exchange their flags while the next step is computed, on the CPU, so that none waits for another.
        """
        if self.process.world == 1:
            return self.asked.is_set()
        answer = False
        if self._pending is not None:
            self._pending.wait()
            answer = bool(self._flag.item())
        self._flag = torch.tensor([float(self.asked.is_set())])
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self.process.host, async_op=True)
        return answer

    def finish(self) -> None:
        """Waits for the exchange that is under way, after which processes may leave."""
        if self._pending is not None:
            with suppress(RuntimeError):
                self._pending.wait()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a stop need not wait, since it is repeated after resuming; one of several processes does,
        since the others would wait for it."""
        self._interruptible = self.process.world == 1
        try:
            if self._interruptible and self.asked.is_set():
                raise KeyboardInterrupt
            yield
        finally:
            self._interruptible = False
