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

from gfl.engine import graphs
from gfl.engine.graphs import Graph, GraphCache, few_shapes

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


def run(cache: GraphCache, *sizes: int) -> None:
    for n in sizes:
        x = torch.full((n,), float(n))
        assert torch.equal(cache.run(double, x), x * 2)


def test_shapes_are_recorded_at_their_second_use(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(8, record=record)
    run(cache, 1, 2, 3, 2, 1, 2, 1)
    assert record.made == [2, 1] and len(cache) == 2


def test_one_that_is_not_used_any_more_makes_room(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(2, record=record)
    run(cache, 1, 1, 2, 2, 1, 3, 1, 3, 1, 3, 2, 1, 3, 2, 2)
    # 3 came twice since the last 2; then neither 1 nor 3 is older than the first 2 of a pair, but the last one.
    assert record.made == [1, 2, 3, 2] and len(cache) == 2


def test_recordings_in_turn_do_not_push_each_other_out(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(4, record=record)
    run(cache, *list(range(1, 7)) * 20)
    assert record.made == [1, 2, 3, 4]


def test_few_uses_are_remembered(recording: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "REMEMBERED", 2)
    record = Counting(recording)
    cache = GraphCache(2, record=record)
    run(cache, 1, 1, *range(2, 100), 1)
    assert record.made == [1] and len(cache) == 0


def test_shapes_and_key_tell_recordings_apart(recording: Callable[..., Any]) -> None:
    record = Counting(recording)
    cache = GraphCache(8, record=record)
    for x in (torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2, 3), torch.zeros(2, 4)):
        cache.run(double, x)
    assert len(cache) == 2
    for _ in range(2):
        assert torch.equal(cache.run(lambda x: x * 3, torch.ones(2, 3), key=("three",)), torch.full((2, 3), 3.0))
    assert len(cache) == 3 and torch.equal(cache.run(double, torch.ones(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("given", [(480, 640), (800, 1333), (801, 1), (800, 1344)])
def test_padding_to_few_shapes(given: tuple[int, int], generator: torch.Generator) -> None:
    images = torch.randint(1, 255, (2, 3, *given), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    padded = few_shapes(images, 1333, 32)
    height, width = padded.shape[2:]
    assert height % 160 == width % 160 == 0 and height - given[0] < 160 and width - given[1] < 160
    assert padded.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(padded[:, :, : given[0], : given[1]], images)
    assert int(padded.count_nonzero()) == images.numel()
    # Small images are padded as they are without graphs.
    assert few_shapes(torch.ones(1, 3, 64, 96), 64, 32).shape == (1, 3, 64, 96)


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
