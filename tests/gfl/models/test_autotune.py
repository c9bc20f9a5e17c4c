# SPDX-License-Identifier: Apache-2.0
"""Choices by the clock, with a clock and a GPU that only exist by name."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gfl.models import autotune
from gfl.models.autotune import CudnnTuning, Fastest
from gfl.models.fused import RELU, FusedConv


@pytest.fixture(autouse=True)
def gpu_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured, and cuDNN's settings are plain attributes, so that none outlives a test."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(benchmark=False, deterministic=False))


class Clock:
    """Tells for each way a time that is given; a way is known by the word that it returns."""

    def __init__(self, patch: pytest.MonkeyPatch, **times: float) -> None:
        self.times = times
        self.read: list[str] = []
        patch.setattr(autotune, "seconds", self)

    def __call__(self, way: Callable[[], Any]) -> float:
        name = way()
        self.read.append(name)
        return self.times[name]


def way(name: str, error: Exception | None = None) -> Any:
    if error is not None:
        raise error
    return name


def ways(*names: str) -> dict[str, Callable[[], Any]]:
    return {name: partial(way, name) for name in names}


def test_the_fastest_is_kept_and_timed_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fastest = Clock(monkeypatch, separate=2.0, fused=1.0), Fastest()
    assert [fastest((1, 3), ways("separate", "fused")) for _ in range(3)] == ["fused"] * 3
    assert clock.read == ["separate", "fused"]
    # A shape for which the fused call is 17 times slower.
    clock.times["fused"] = 34.0
    assert [fastest((1, 7), ways("separate", "fused")) for _ in range(2)] == ["separate"] * 2
    assert fastest((1, 3), ways("separate", "fused")) == "fused" and len(clock.read) == 4


def test_a_call_that_is_not_supported_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, separate=2.0, fused=1.0)
    fastest, broken = Fastest(), partial(way, "fused", RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))
    assert fastest(0, {**ways("separate"), "fused": broken}) == "separate"


def test_out_of_memory_is_no_reason_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, separate=2.0, fused=1.0)
    fastest, full = Fastest(), partial(way, "fused", torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fastest(0, {**ways("separate"), "fused": full})
    # Nothing was decided by it.
    assert fastest(0, ways("separate", "fused")) == "fused"


def test_a_capture_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fastest = Clock(monkeypatch, separate=2.0, fused=1.0), Fastest()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(0, ways("separate", "fused")) == "separate" and clock.read == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest(0, ways("separate", "fused")) == "fused"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest(0, ways("separate", "fused")) == "fused"


def test_beyond_the_limit_the_last_choice_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fastest = Clock(monkeypatch, separate=2.0, fused=1.0), Fastest(limit=2)
    assert [fastest(kind, ways("separate", "fused")) for kind in range(4)] == ["fused"] * 4
    assert len(clock.read) == 4


@pytest.mark.parametrize("summand", [False, True])
@pytest.mark.parametrize("faster", ["separate", "fused"])
def test_a_convolution_takes_the_faster_call(
    faster: str, summand: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """cuDNN's calls by a stand-in, which tells that it was called."""
    calls: list[str] = []

    def relu(x: Tensor, weight: Tensor, bias: Tensor, *where: Any) -> Tensor:
        calls.append("fused")
        stride, padding, dilation, groups = where
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *where: Any) -> Tensor:
        calls.append("fused")
        stride, padding, dilation, groups = where
        return (nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    def seconds(call: Callable[[], Tensor]) -> float:
        before = len(calls)
        call()
        return float(("fused" if len(calls) > before else "separate") != faster)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(autotune, "seconds", seconds)
    conv = nn.Conv2d(3, 8, 7, stride=2, padding=3)
    x = torch.randn(2, 3, 24, 20, generator=generator)
    want = conv(x).detach()
    z = torch.randn(want.shape, generator=generator) if summand else None
    want = (want if z is None else want + z).relu()
    fused = FusedConv.of(conv, act=RELU)
    # Where a GPU is asked for by the device of `x`.
    torch.testing.assert_close(fused._by_the_faster(x, z), want)
    calls.clear()
    torch.testing.assert_close(fused._by_the_faster(x, z), want)
    assert calls == ["fused"] * (faster == "fused")


def on_a_gpu(*shape: int) -> Any:
    return SimpleNamespace(is_cuda=True, shape=torch.Size(shape))


def test_cudnn_times_its_algorithms_within_alone() -> None:
    tuning = CudnnTuning()
    with pytest.raises(KeyError), tuning(on_a_gpu(8, 3, 64, 96)):
        assert torch.backends.cudnn.benchmark
        raise KeyError
    assert not torch.backends.cudnn.benchmark
    with tuning(torch.zeros(1)):
        assert not torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    with tuning(on_a_gpu(8, 3, 64, 96)):
        pass
    assert torch.backends.cudnn.benchmark


def test_cudnn_times_no_more_than_a_few_shapes() -> None:
    tuning, on = CudnnTuning(limit=2), []
    for side in (32, 64, 96, 32, 96, 64):
        with tuning(on_a_gpu(8, 3, side, side)):
            on.append(torch.backends.cudnn.benchmark)
    assert on == [True, True, False, True, False, True]


@pytest.mark.parametrize("of", ["cudnn", "all"])
def test_algorithms_that_must_repeat_themselves_are_not_chosen_by_time(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cudnn.deterministic = of == "cudnn"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: of == "all")
    with CudnnTuning()(on_a_gpu(1, 3, 8, 8)):
        assert not torch.backends.cudnn.benchmark


def test_threads_that_overlap_leave_the_setting_as_it_was() -> None:
    tuning, inside, leave = CudnnTuning(), threading.Event(), threading.Event()

    def other() -> None:
        with tuning(on_a_gpu(1, 3, 8, 8)):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with tuning(on_a_gpu(1, 3, 8, 8)):
        thread.start()
        inside.wait()
    # The other one is still within.
    assert torch.backends.cudnn.benchmark
    leave.set()
    thread.join()
    assert not torch.backends.cudnn.benchmark
