# SPDX-License-Identifier: Apache-2.0
"""Work beside the thread that feeds the device: reading files ahead of it, writing pictures behind it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Threads at most: those of a process share the interpreter, which decoding an image needs now and then.
MOST = 8


def cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """``map(function, items)`` by so many threads, in order; without any, in this one and not before it is asked for.

    `items` is iterated in this thread, at most twice as many items ahead as there are threads. An error that `function`
    raises comes in the place of its result.
    """
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
