# SPDX-License-Identifier: Apache-2.0
"""Devices of processes, on GPUs that only exist by name: which one is current, and which one collectives would use."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gfl.commands import bench
from gfl.config import Config
from gfl.engine import evaluate
from gfl.engine.distributed import choose_device, processes

GPUS = 4


class FakeCuda:
    """Four GPUs, of which `current` is torch's."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current = 0
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: GPUS)
        patch.setattr(torch.cuda, "current_device", lambda: self.current)
        patch.setattr(torch.cuda, "set_device", self.set_device)
        patch.setattr(torch.cuda, "device", self.device)

    def set_device(self, device: Any) -> None:
        self.current = torch.device(device).index

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> list[tuple[Any, ...]]:
    """The groups that were joined: backend, device of the group, current device."""
    found: list[tuple[Any, ...]] = []

    def init(backend: str, device_id: torch.device | None = None, **_: Any) -> None:
        found.append((backend, device_id, cuda.current))

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.append(("left", None, cuda.current)))
    return found


def set_rank(patch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank % GPUS)):
        patch.setenv(name, str(value))


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_rank_joins_with_its_own_gpu(
    device: str | None, cuda: FakeCuda, joined: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rank(monkeypatch, 6, 8)
    with processes(device) as process:
        assert process.device == torch.device("cuda", 2) and cuda.current == 2
        # Before the group: its communicator is made on the device that is current then.
        assert joined == [("nccl", torch.device("cuda", 2), 2)]
    assert joined[1:] == [("left", None, 2)] and cuda.current == 0


def test_a_cpu_s_rank_names_no_device(
    cuda: FakeCuda, joined: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rank(monkeypatch, 1, 2)
    with processes("cpu") as process:
        assert process.device == torch.device("cpu") and joined == [("gloo", None, 0)]


def test_a_single_process_computes_on_its_device_and_leaves_the_current_one(cuda: FakeCuda) -> None:
    with pytest.raises(KeyError), processes("cuda:3"):
        assert cuda.current == 3
        raise KeyError
    cuda.current = 1
    assert choose_device("cuda:2") == torch.device("cuda", 2) and choose_device(None, 3) == torch.device("cuda", 3)
    assert cuda.current == 1
    for name, rank in (("cuda:4", 0), (None, 4), ("cuda", 4)):
        with pytest.raises(ValueError, match="`device` is cuda:4, but there are 4 GPUs"):
            choose_device(name, rank)


def test_an_evaluation_s_collectives_are_on_the_model_s_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: used.append(cuda.current))

    def broadcast(outcome: list[Any], source: int) -> None:
        used.append(cuda.current)
        outcome[0] = {"AP": 0.5}

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    monkeypatch.setattr(evaluate, "test_loader", lambda *_: [])
    monkeypatch.setattr(evaluate, "_detect", lambda *_: used.append(cuda.current) or [])
    dataset: Any = SimpleNamespace(classes=["a"], category_ids=[1], unreadable={}, image_ids=[])
    metrics, _ = evaluate.evaluate(torch.nn.Identity(), dataset, Config(), "cuda:3", progress=False)
    assert metrics == {"AP": 0.5} and used == [3, 3, 3] and cuda.current == 0


def test_a_benchmark_runs_with_its_gpu_current(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    parser, used = argparse.ArgumentParser(), []
    bench.configure(parser)

    def times(*_: Any, **case: Any) -> list[float]:
        used.append((cuda.current, case["device"]))
        return [0.1] * 3

    monkeypatch.setattr(bench, "_times", times)
    monkeypatch.setattr(bench, "check_kernels", lambda device: None)
    assert bench.run(parser.parse_args(["--device", "cuda:2", "--batch", "1"])) == 0
    assert used == [(2, torch.device("cuda", 2))] and cuda.current == 0
