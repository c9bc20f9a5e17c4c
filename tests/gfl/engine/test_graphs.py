# SPDX-License-Identifier: Apache-2.0
"""Recordings of functions: which are kept, what tells them apart, and on a GPU that they are the function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from gfl.engine.graphs import Graph, GraphCache

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs need one")


def double(x: Tensor) -> Tensor:
    return x * 2


class Counting:
    """Records by the stand-in, and remembers for which inputs."""

    def __init__(self, record: Callable[..., Any]) -> None:
        self.record = record
        self.made: list[int] = []

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
        self.made.append(len(inputs[0]))
        return self.record(function, inputs)


def test_the_last_used_recordings_are_kept(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(2, record=record)
    for n in (1, 2, 1, 3, 1, 2):
        x = torch.full((n,), float(n))
        assert torch.equal(cache.run(double, x), x * 2)
    # 3 evicted 2, which had not been used for longer than 1, and 2 then evicted 3.
    assert record.made == [1, 2, 3, 2] and len(cache) == 2


def test_without_eviction_further_shapes_run_the_function(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(2, evict=False, record=record)
    for n in (1, 2, 3, 1, 3, 2):
        x = torch.full((n,), float(n))
        assert torch.equal(cache.run(double, x), x * 2)
    assert record.made == [1, 2] and len(cache) == 2


def test_shapes_and_key_tell_recordings_apart(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(8, record=record)
    for x in (torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2, 3)):
        cache.run(double, x)
    assert len(cache) == 2
    cache.run(lambda x: x * 3, torch.ones(2, 3), key=("three",))
    assert len(cache) == 3 and torch.equal(cache.run(double, torch.ones(2, 3)), torch.full((2, 3), 2.0))


@GPU
def test_a_graph_is_the_function_cuda() -> None:
    graph = Graph(double, [torch.ones(5, device="cuda")])
    for value in (1.0, 7.0):
        assert graph(torch.full((5,), value, device="cuda")).tolist() == [2 * value] * 5


@GPU
def test_a_warm_up_is_undone_and_another_thread_may_pin_memory_cuda() -> None:
    total = torch.zeros(3, device="cuda")

    @contextmanager
    def undone() -> Iterator[None]:
        before = total.clone()
        yield
        total.copy_(before)

    done = threading.Event()

    def pin() -> None:
        while not done.is_set():
            torch.zeros(1 << 16).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        graph = Graph(total.add_, [torch.ones(3, device="cuda")], warm_up=undone)
    finally:
        done.set()
        thread.join()
    assert total.tolist() == [0.0] * 3
    graph(torch.full((3,), 2.0, device="cuda"))
    assert total.tolist() == [2.0] * 3
