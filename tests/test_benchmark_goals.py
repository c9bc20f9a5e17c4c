# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' goals: what they count, and how a GPU is timed, on stand-ins for one. No time is asserted."""

from __future__ import annotations

import time
import types
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import benchmark_modules
import pytest
import torch

import gfl_ops

SIZE = (96, 160)
NOWHERE = Path("/nowhere/at/all")


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    with benchmark_modules.imported() as modules:
        yield modules


@pytest.fixture(scope="module")
def scene(parts: Any) -> Any:
    return parts.inputs.make_scene(2, SIZE, NOWHERE, seed=3)


@pytest.fixture(scope="module")
def machine(parts: Any) -> Any:
    return parts.clock.Machine("cpu")


def bench(parts: Any, machine: Any) -> Any:
    return parts.harness.Bench(machine, parts.clock.Budget(1000.0), rounds=1, seconds=0.01)


VERDICTS = ("reached", "MISSED")


def test_the_cpu_goals_are_measured_and_reported(tmp_path: Path) -> None:
    words = ["--goals", "qfl", "head", "atss 60", "one", "--size", "96x160", "--threads", "1", "--no-compile"]
    _, record = benchmark_modules.run_command("cpu", *words, folder=tmp_path)
    found = {(g["goal"], g["provider"]): g for g in record["goals"]}
    assert found["qfl", "compiled"]["verdict"] == "not measured"
    for key in (("qfl", "eager"), ("head loss", "eager"), ("atss 60", "eager"), ("one call: integral", "")):
        assert found[key]["got"] > 0 and found[key]["verdict"] in VERDICTS


def test_the_goals_of_the_gpu_run_off_it_too(tmp_path: Path) -> None:
    words = ["--goals", "qfl", "head", "post-process", "decode", "one", "--size", "64x96", "--no-compile"]
    _, record = benchmark_modules.run_command("gpu", "--scale", "0.01", *words, folder=tmp_path)
    found = {(g["goal"], g["provider"]): g for g in record["goals"]}
    assert found["qfl bf16", "compiled"]["verdict"] == "not measured"
    keys = [("qfl fp32", ""), ("qfl recomputed bf16", ""), ("head loss", "eager"), ("head loss", ""), ("decode", "")]
    for key in (*keys, ("one call: forward+backward", "")):
        assert found[key]["got"] > 0 and found[key]["want"] > 0 and found[key]["verdict"] in VERDICTS


def test_limits_count_the_bytes_that_have_to_move(parts: Any, scene: Any, machine: Any) -> None:
    goals, timing = parts.goals, parts.harness.Timing
    result = parts.harness.Result("qfl", "qfl", "", 2, "bf16", "native", bytes={"forward": 10**6, "both": 2 * 10**6})
    slow = replace(result, provider="eager", forward=timing(30.0, 30.0, 30.0), bytes={})
    result.forward = timing(10.0, 10.0, 10.0)
    goal = goals.Goal("qfl", lambda: None, {"eager": 2.0}, 2, "bf16", 1.5, 10.0)
    limit, ratio = goals.judge(goal, [result, slow], machine)
    assert limit.want == pytest.approx(1.5 * 2e12 / machine.bandwidth + 10.0)
    assert limit.got == 1e4 and ratio.got == 3.0 and ratio.verdict == "reached"
    # The device's own times are what is compared where they were measured.
    result.device_ms, slow.not_in_graph = 5.0, "it asks the host"
    limit, ratio = goals.judge(goal, [result, slow], machine)
    assert limit.got == 5e3 and ratio.got == 6.0 and "eager outside a graph: it asks the host" in ratio.why
    text = goals.table([limit, ratio, goals.Reached("x", "compiled", 2.0, None, why="no compiler")])
    assert "no compiler" in text and "of 3 reached" in text


def bytes_of(parts: Any, machine: Any, case: Any, dtype: str) -> dict[str, int]:
    (result,) = bench(parts, machine).run(case, dtype, 2, only=["native"])
    assert result.status == "timed", result.reason
    return result.bytes


def test_a_loss_moves_logits_and_gradient_once(parts: Any, scene: Any, machine: Any) -> None:
    rows, classes = scene.pred.shape
    moved = bytes_of(parts, machine, parts.command("gpu").quality(scene, "bf16"), "bf16")
    assert moved["both"] == rows * (2 * 2 * classes + 8 + 4 + 4) + 4 + 4


def test_distances_and_their_loss_move_the_logits_twice(parts: Any, scene: Any, machine: Any) -> None:
    """What arrives for the distance is known after forward only: backward reads everything again."""
    moved = bytes_of(parts, machine, parts.goals.many_rows(scene, 1000), "fp32")
    logits, row = 17 * 4, 4
    read, out = 1000 * (logits + 2 * row) + 4, 1000 * row + 4
    assert moved == {
        "forward": read + out,
        "backward": read + out + 1000 * logits,
        "both": 2 * (read + out) + 1000 * logits,
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_head_moves_class_maps_and_the_gradients(parts: Any, scene: Any, machine: Any, dtype: str) -> None:
    kind, last = parts.harness.DTYPES[dtype], dtype == "bf16"
    case = parts.goals.head_with_assignment(scene, 20, 0, kind, channels_last=last)
    maps = [*case.inputs["cls_scores"], *case.inputs["reg_preds"]]
    assert all(m.dtype == kind for m in maps)
    assert all(m.is_contiguous(memory_format=torch.channels_last) == last for m in maps if min(m.shape[2:]) > 1)
    rows, size = scene.pred.shape[0], kind.itemsize
    moved = bytes_of(parts, machine, case, dtype)["both"]
    want = rows * size * (2 * 80 + 4 * (parts.inputs.REG_MAX + 1))
    assert want < moved < want + 4000


# --- A GPU's clock, on stand-ins for its device ---------------------------------------------------------------------


class FakeEvent:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def fake_gpu(parts: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that takes the CPU for a GPU with a last-level cache of 1 MB. `captured` holds what graphs recorded."""
    properties = types.SimpleNamespace(L2_cache_size=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for name in ("synchronize", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    captured: list[Any] = []

    def graph(function: Any, device: Any) -> Any:
        captured.append(function)
        return function

    monkeypatch.setattr(parts.clock, "Graph", graph)
    machine = parts.clock.Machine("cpu")
    machine.cuda, machine.captured = True, captured
    machine.evicting_bytes = parts.clock.evicting_bytes(torch.device("cuda"))
    machine._evicting = torch.ones(machine.evicting_bytes // 4)
    return machine


def test_the_cache_is_evicted_by_reading_more_than_twice_its_size(parts: Any, fake_gpu: Any) -> None:
    assert 2 * 10**6 < fake_gpu.evicting_bytes == fake_gpu._evicting.nbytes
    before = fake_gpu._evicting._version
    fake_gpu.flush()
    assert fake_gpu._evicting._version == before, "lines that were written are written back while others are timed"


@pytest.mark.parametrize("rows", [100, 7000])
def test_a_graph_rotates_over_inputs_that_the_cache_does_not_hold(
    parts: Any, scene: Any, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    case = parts.cases.make("qfl", scene, torch.float32, "cpu")[0]
    cut = {n: v[:rows] if isinstance(v, torch.Tensor) and v.dim() else v for n, v in case.inputs.items()}
    cut["target"] = tuple(t[:rows] for t in case.inputs["target"])
    seen: list[torch.Tensor] = []

    def call(pred: torch.Tensor, **rest: Any) -> Any:
        seen.append(pred)
        return case.ours(pred=pred, **rest)

    timed = parts.harness.Bench(fake_gpu, parts.clock.Budget(1000.0), 3, 0.01, host_ahead=False, graphs=True)
    monkeypatch.setattr(fake_gpu, "memory", lambda run: None)
    monkeypatch.setattr(fake_gpu, "launches", lambda run: None)
    (result,) = timed.run(replace(case, inputs=cut, ours=call), "fp32", 2, only=["native"])
    assert result.device_ms > 0 and not result.not_in_graph
    (replay,) = fake_gpu.captured
    seen.clear()
    with gfl_ops.set_backend("native"):
        replay()
    assert len({pred.data_ptr() for pred in seen}) == len(seen) >= 2
    if len(seen) < parts.clock.COPIES:
        assert len(seen) * result.bytes["both"] > 2 * 10**6
    # However little a step moves, the read before a replay evicts what the last one left.
    evictions: list[int] = []
    monkeypatch.setattr(fake_gpu, "flush", lambda: evictions.append(len(seen)))
    seen.clear()
    fake_gpu.device_time([lambda: seen.append(cut["pred"])] * parts.clock.COPIES, parts.clock.Budget(1000.0), 3)
    assert [b - a for a, b in pairwise(evictions)] == [parts.clock.COPIES] * 2


def test_who_makes_the_host_wait_is_timed_outside_a_graph(
    parts: Any, scene: Any, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict: list[Any] = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", strict.append)
    monkeypatch.setattr(fake_gpu, "memory", lambda run: None)
    monkeypatch.setattr(fake_gpu, "launches", lambda run: None)
    case = parts.cases.make("qfl", scene, torch.float32, "cpu")[0]

    def waits(**inputs: Any) -> Any:
        if strict[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return parts.formulas.score.qfl(**inputs)

    timed = parts.harness.Bench(fake_gpu, parts.clock.Budget(1000.0), 3, 0.01, host_ahead=False, graphs=True)
    case = replace(case, peers={"waits": waits, "eager": parts.formulas.score.qfl})
    found = {r.provider: r for r in timed.run(case, "fp32", 2, only=["waits", "eager"], compiled=False)}
    assert found["waits"].total and found["waits"].device_ms is None and "synchronizing" in found["waits"].not_in_graph
    assert found["eager"].device_ms > 0
    assert len(fake_gpu.captured) == 1 and strict[-1] == 0


@pytest.mark.parametrize("clustered", [False, True])
def test_the_quick_oracle_of_nms_is_the_definition(parts: Any, clustered: bool) -> None:
    drawn = parts.inputs.boxes_for_nms(2000, clustered, (300, 400), 1)
    # In doubles a class's offset costs the boxes no bit that decides.
    drawn["boxes"] = drawn["boxes"].double()
    want = parts.formulas.select.batched_nms(**drawn, iou_threshold=0.5)
    chain = torch.stack([torch.arange(300.0), torch.zeros(300), torch.arange(300.0) + 3, torch.ones(300)], 1)
    calls = [(drawn | {"iou_threshold": 0.5}, want.tolist())]
    # Each overlaps the next: every second one is kept, decided one after another.
    one = {"boxes": chain, "scores": -torch.arange(300.0), "idxs": torch.zeros(300, dtype=torch.long)}
    calls.append((one | {"iou_threshold": 0.4}, list(range(0, 300, 2))))
    for given, kept in calls:
        assert parts.formulas.select.nms_by_class(**given).tolist() == kept


def test_the_oracle_of_many_boxes_takes_no_turn_per_box(parts: Any, machine: Any) -> None:
    case = parts.cases.select.suppression(20_000, False, (800, 1344), 0)
    with gfl_ops.set_backend("native"):
        found = case.ours(**case.inputs)
    assert case.agree(found, case.oracle(**case.inputs)) < parts.harness.DECISIONS["fp32"]
    assert case.agree(found[1:], case.oracle(**case.inputs)) > 0


def test_a_missed_goal_is_reported(parts: Any) -> None:
    reached = parts.goals.Reached
    lines = [reached("a", "eager", 4.0, 4.0, 1.0, 4.0), reached("b", "eager", 4.0, 3.9, 1.0, 3.9)]
    lines += [reached("c", "", 15.0, 16.0), reached("d", "torchvision", 5.0, None, why="not installed")]
    assert [r.verdict for r in lines] == ["reached", "MISSED", "MISSED", "not measured"]
    text = parts.goals.table(lines)
    assert "1 of 4 reached" in text and "not installed" in text


@pytest.mark.parametrize("clustered", [False, True])
def test_boxes_for_nms_are_of_many_classes(parts: Any, clustered: bool) -> None:
    drawn = parts.inputs.boxes_for_nms(1000, clustered, (800, 1344), 0)
    assert drawn["boxes"].shape == (1000, 4) and (drawn["boxes"][:, 2:] > drawn["boxes"][:, :2]).all()
    assert len(drawn["idxs"].unique()) > 20
    kept = gfl_ops.batched_nms(**drawn, iou_threshold=0.6)
    assert (len(kept) < 700) == clustered
