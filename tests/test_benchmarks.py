# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on tiny inputs: everything agrees, nothing that is wrong is timed, and the report says what happened.

No time is asserted.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfl_ops.core.registry import SPECS

ROOT = Path(__file__).resolve().parents[1]
SIZE = (96, 160)
NOWHERE = Path("/nowhere/at/all")


@pytest.fixture(scope="module")
def parts() -> Any:
    """The benchmarks' modules, which import each other by their bare names."""
    names = ("cases", "formulas", "formulas_head", "harness", "inputs", "report", "stamp", "bench_losses", "bench_cpu")
    names += ("bench_gpu", "detectors", "bench_peers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield type("Parts", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def scene(parts: Any) -> Any:
    return parts.inputs.make_scene(2, SIZE, NOWHERE, seed=3)


@pytest.fixture(scope="module")
def machine(parts: Any) -> Any:
    return parts.harness.Machine("cpu")


def bench(parts: Any, machine: Any) -> Any:
    return parts.harness.Bench(machine, parts.harness.Clock(1000.0), rounds=1, seconds=0.01)


@pytest.mark.parametrize("stem", SPECS)
def test_every_provider_of_every_operator_agrees(parts: Any, scene: Any, machine: Any, stem: str) -> None:
    if stem not in parts.cases.CASES:
        pytest.skip(f"{stem} has no case in benchmarks/cases.py: it is timed on its largest sample, against no one")
    for name in ("fp32", "bf16"):
        dtype = parts.harness.DTYPES[name]
        if dtype not in SPECS[stem].dtypes:
            continue
        for case in parts.cases.make(stem, scene, dtype, "cpu"):
            results = bench(parts, machine).run(case, name, 2, compiled=False)
            assert {r.provider for r in results} >= {"native", "triton", "reference"}
            for r in results:
                assert r.status in ("timed", "skipped"), f"{case.name} {name} {r.provider}: {r.status}: {r.reason}"
                assert r.status == "timed" or r.reason
                if r.status == "timed":
                    assert r.total.p20 <= r.total.median <= r.total.p80
                    assert r.bytes["forward"] > 0 and r.memory is not None


@pytest.mark.parametrize("stem", [s for s in SPECS if SPECS[s].differentiable])
def test_the_formulas_of_others_are_the_references_in_fp64(parts: Any, scene: Any, machine: Any, stem: str) -> None:
    """Written independently of each other: agreement to 1e-10 leaves no room for another meaning."""
    if stem not in parts.cases.CASES or torch.float64 not in SPECS[stem].dtypes:
        pytest.skip(f"{stem} has no case in benchmarks/cases.py, or no fp64")
    for case in parts.cases.make(stem, scene, torch.float64, "cpu"):
        case = replace(case, peers=case.peers | ({"dense": case.dense} if case.dense else {}))
        for r in bench(parts, machine).run(
            case, "fp64", 2, only=[n for n, call in case.peers.items() if call], compiled=False
        ):
            assert r.status == "timed", f"{case.name} {r.provider}: {r.reason}"
            assert r.error < 1e-10


def test_every_operator_is_timed(parts: Any) -> None:
    assert sorted(parts.cases.order()) == sorted(SPECS)
    assert set(parts.cases.CASES) <= set(SPECS), "benchmarks/cases.py has cases of operators that are gone"


def test_an_operator_without_a_case_is_timed_on_a_sample(parts: Any, machine: Any) -> None:
    case = parts.cases.from_sample("qfl", torch.float32)
    results = bench(parts, machine).run(case, "fp32", 1)
    assert {r.provider for r in results if r.status == "timed"} >= {"reference"}
    assert "sample" in results[0].what


def test_a_wrong_provider_is_named_and_not_timed(parts: Any, scene: Any, machine: Any) -> None:
    case = parts.cases.make("qfl", scene, torch.float32, "cpu")[0]

    def value(**inputs: Any) -> torch.Tensor:
        return parts.formulas.qfl(**inputs) * 1.001

    def gradient(**inputs: Any) -> torch.Tensor:
        pred = inputs["pred"]
        return parts.formulas.qfl(**inputs) + 1e-3 * (pred - pred.detach())[:, 3].sum()

    def broken(**inputs: Any) -> torch.Tensor:
        raise RuntimeError("no such luck")

    def nothing(**inputs: Any) -> torch.Tensor:
        return inputs["pred"].sum() * float("nan")

    case = replace(case, peers={"value": value, "gradient": gradient, "broken": broken, "nan": nothing}, dense=None)
    results = {r.provider: r for r in bench(parts, machine).run(case, "fp32", 2)}
    assert [results[n].status for n in ("value", "gradient", "broken", "nan")] == ["wrong", "wrong", "failed", "wrong"]
    assert all(results[n].total is None for n in ("value", "gradient", "broken", "nan"))
    assert results["reference"].status == "timed"
    text = parts.report.block(list(results.values()))
    assert "WRONG" in text and "no such luck" in text
    summary = parts.report.summary(list(results.values()), machine)
    assert "wrong or failed" in summary
    assert max(map(len, (text + "\n" + summary).splitlines())) <= 80


def test_wrong_decisions_are_seen(parts: Any, scene: Any, machine: Any) -> None:
    case = parts.cases.make("nms", scene, torch.float32, "cpu")[0]
    case = replace(case, peers={"all": lambda boxes, scores, iou_threshold: torch.arange(len(boxes))})
    assert bench(parts, machine).run(case, "fp32", 2, only=["all"])[0].status == "wrong"


def test_losing_stays_in_the_table(parts: Any, machine: Any) -> None:
    timing = parts.harness.Timing
    row = parts.harness.Result("qfl", "qfl", "10×80 logits", 2, "fp32", "eager", forward=timing(1.0, 0.9, 1.2))
    mine = replace(row, provider="native", forward=timing(4.0, 3.9, 4.1))
    assert "4.0× SLOWER" in parts.report.summary([row, mine], machine)
    assert "4.0× faster" in parts.report.summary([replace(row, forward=timing(16.0, 15, 17)), mine], machine)


def test_bytes_are_counted_from_inputs_and_results(parts: Any, scene: Any, machine: Any) -> None:
    case = parts.cases.make("qfl", scene, torch.bfloat16, "cpu")[0]
    result = bench(parts, machine).run(case, "bf16", 2, only=["reference"])[0]
    rows = scene.pred.shape[0]
    read = rows * 80 * 2 + rows * (8 + 4 + 4) + 4  # logits, label, score, weight, factor
    assert result.bytes["forward"] == read + 4
    assert result.bytes["both"] == read + 4 + rows * 80 * 2


def test_quantiles(parts: Any) -> None:
    assert parts.harness.quantile([1.0], 0.8) == 1.0
    assert parts.harness.quantile([0.0, 10.0], 0.2) == 2.0
    timing = parts.harness.Timing.of([0.003, 0.001, 0.002])
    assert (timing.median, timing.p20) == (2.0, pytest.approx(1.4))


def test_three_digits_that_count(parts: Any) -> None:
    values = (0.00012, 0.0123, 1.234, 98.76, 1234.5, None)
    assert [parts.report.ms(v) for v in values] == ["0.0001", "0.0123", "1.23", "98.8", "1234", "-"]


def test_drawn_scenes_look_like_coco(parts: Any) -> None:
    photos = parts.inputs.drawn_boxes(400, (800, 1344), torch.Generator().manual_seed(0))
    count = torch.tensor([float(len(labels)) for _, labels in photos])
    boxes = torch.cat([b for b, _ in photos]) * 480 / 800
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    assert 5.5 < count.mean() < 9.5
    assert 0.25 < (side < 32).float().mean() < 0.5
    assert 0.1 < (side > 96).float().mean() < 0.4
    assert (boxes >= 0).all()


def test_a_scene_repeats_itself_and_has_what_training_has(parts: Any, scene: Any) -> None:
    again = parts.inputs.make_scene(2, SIZE, NOWHERE, seed=3)
    assert torch.equal(scene.pred, again.pred) and not torch.equal(
        scene.pred, parts.inputs.make_scene(2, SIZE, NOWHERE, seed=4).pred
    )
    assert scene.positives == int((scene.label < 80).sum()) > 0
    assert scene.rows.shape == (4 * scene.positives, 17)
    assert ((scene.target >= 0) & (scene.target <= 15.9)).all()
    assert scene.pred.sigmoid().mean() < 0.02
    assert torch.equal(parts.inputs.flatten(scene.head.cls_scores).flatten(0, 1), scene.pred)


def test_real_data_is_used_where_it_is(parts: Any, data: Path) -> None:
    scene = parts.inputs.make_scene(2, (800, 1344), data)
    assert "COCO val2017" in scene.boxes_from and "trained head" in scene.trained.source
    assert scene.labels.shape == (2, 22400)
    assert 50 < scene.positives < 600
    assert 2000 < len(scene.candidates.boxes) <= 2 * 4000


def test_the_command_writes_table_json_and_plot(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_losses.py"), "--ops", "qfl", "--dtypes", "fp32"]
    command += ["--size", "96x160", "--rounds", "1", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--providers", "eager", "native", "reference", "--data", str(NOWHERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 or "written" in done.stdout.splitlines()[-1]
    record = json.loads((tmp_path / "bench_losses.json").read_text())
    assert record["stamp"]["versions"]["torch"] and record["stamp"]["command"].startswith("python")
    assert {r["provider"] for r in record["results"]} == {"eager", "native", "reference"}
    assert record["copy_bytes_per_s"] > 0 and record["log1p_ms"]
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        assert "matplotlib is not installed" in done.stdout
    else:
        assert (tmp_path / "bench_losses.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot_but_a_reason(
    parts: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    why = parts.report.plot(tmp_path / "x.png", [], machine)
    assert why and "matplotlib" in why and not (tmp_path / "x.png").exists()


def test_the_time_limit_leaves_out_and_says_so(parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "64x64", "--limit", "0.001", "--device", "cpu", "--out", str(tmp_path), "--data", str(NOWHERE)]
    results, machine = parts.bench_losses.run(parts.bench_losses.arguments(words))
    assert results and all(r.status == "skipped" for r in results)
    assert "no time left" in parts.report.summary(results, machine)
    assert "floor" in capsys.readouterr().out


def test_the_stamp_says_where_it_was_made(parts: Any) -> None:
    record = parts.stamp.stamp("a GPU")
    assert record["gpu"] == "a GPU" and record["cores"] >= 1
    assert any("torch" in line for line in parts.stamp.lines(record))


def test_the_cpu_goals_are_measured_and_told(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_cpu.py"), "--goals", "qfl", "head", "atss 60", "one"]
    command += ["--size", "96x160", "--rounds", "1", "--seconds", "0.01", "--threads", "1", "--no-compile"]
    command += ["--out", str(tmp_path), "--data", str(NOWHERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    goals = json.loads((tmp_path / "bench_cpu.json").read_text())["goals"]
    found = {(g["goal"], g["provider"]): g for g in goals}
    assert found["qfl", "compiled"]["verdict"] == "not measured"
    for key in (("qfl", "eager"), ("head loss", "eager"), ("atss 60", "eager"), ("one call: integral", "")):
        assert found[key]["got"] > 0 and found[key]["verdict"] in ("reached", "MISSED")


def test_the_goals_of_the_gpu_run_off_it_too(parts: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py"), "--device", "cpu", "--scale", "0.01"]
    command += ["--goals", "qfl", "head", "post-process", "decode", "one", "--size", "64x96", "--rounds", "1"]
    command += ["--seconds", "0.01", "--no-compile", "--out", str(tmp_path), "--data", str(NOWHERE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80
    goals = json.loads((tmp_path / "bench_gpu.json").read_text())["goals"]
    found = {(g["goal"], g["provider"]): g for g in goals}
    assert found["qfl bf16", "compiled"]["verdict"] == "not measured"
    keys = [("qfl fp32", ""), ("qfl recomputed bf16", ""), ("head loss", "eager"), ("head loss", ""), ("decode", "")]
    for key in (*keys, ("one call: forward+backward", "")):
        assert found[key]["got"] > 0 and found[key]["want"] > 0 and found[key]["verdict"] in ("reached", "MISSED")


def test_limits_count_the_bytes_that_have_to_move(parts: Any, scene: Any, machine: Any) -> None:
    """Logits read and gradients written once; of distributions, the gradient alone."""
    gpu = parts.bench_gpu
    rows, classes = scene.pred.shape
    case = gpu.quality(scene, "bf16", "cpu")
    assert gpu.both_ways(case) == rows * (2 * 2 * classes + 8 + 4 + 4) + 4
    head = gpu.head_with_assignment(scene, 20, 0)
    assert gpu.maps_of(head) == rows * 4 * (2 * classes + 4 * (parts.inputs.REG_MAX + 1))
    result = parts.harness.Result("qfl", "qfl", "", 2, "bf16", "native")
    slow = replace(result, provider="eager", forward=parts.harness.Timing(1e6, 1e6, 1e6))
    result.forward = parts.harness.Timing(1.0, 1.0, 1.0)
    goal = gpu.Goal("qfl", lambda: case, "bf16", 2, gpu.both_ways, 1.5, 10.0, {"eager": 2.0})
    limit, ratio = gpu.judge(goal, case, [result, slow], machine, parts.harness.Clock(100.0), 1)
    assert limit.want == pytest.approx(1.5e6 * gpu.both_ways(case) / machine.bandwidth + 10.0)
    assert limit.got > 0 and ratio.got == pytest.approx(1e9 / limit.got) and ratio.verdict == "reached"
    said = gpu.table([limit, ratio, gpu.Reached("x", "compiled", 2.0, None, "no compiler")])
    assert "no compiler" in said and "of 3 reached" in said


def test_a_missed_goal_is_said(parts: Any) -> None:
    reached = parts.bench_cpu.Reached
    lines = [reached("a", "eager", 4.0, 4.0, 1.0, 4.0), reached("b", "eager", 4.0, 3.9, 1.0, 3.9)]
    lines += [reached("c", "", 15.0, 16.0), reached("d", "torchvision", 5.0, None, why="not installed")]
    assert [r.verdict for r in lines] == ["reached", "MISSED", "MISSED", "not measured"]
    text = parts.bench_cpu.table(lines)
    assert "1 of 4 reached" in text and "not installed" in text


@pytest.mark.parametrize("clustered", [False, True])
def test_boxes_for_nms_are_of_many_classes(parts: Any, clustered: bool) -> None:
    drawn = parts.inputs.boxes_for_nms(1000, clustered, (800, 1344), 0)
    assert drawn["boxes"].shape == (1000, 4) and (drawn["boxes"][:, 2:] > drawn["boxes"][:, :2]).all()
    assert len(drawn["idxs"].unique()) > 20
    kept = parts.cases.gfl_ops.batched_nms(**drawn, iou_threshold=0.6)
    assert (len(kept) < 700) == clustered


def pretended(parts: Any, error: float) -> Any:
    """A detector of somebody's whose losses and boxes go wrong by `error` when it is patched."""
    model = torch.nn.Conv2d(3, 6, 1)
    images, inside = torch.rand(2, 3, 8, 8), [0.0]

    def losses(given: torch.Tensor) -> list[torch.Tensor]:
        return [given.square().mean() * (1 + inside[0])]

    def boxes(given: torch.Tensor) -> list[torch.Tensor]:
        rows = given.flatten(2).transpose(1, 2)
        return [x for row in rows for x in (row[:, :4] + inside[0], row[:, 4], row[:, 5])]

    return parts.detectors.Detector(
        train=lambda: losses(model(images)), loss=losses, detect=lambda: boxes(model(images)), read=boxes, model=model,
        maps=model(images).detach(), test_maps=model(images).detach(),
        patch=lambda: inside.__setitem__(0, error), unpatch=lambda: inside.__setitem__(0, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_a_detector_is_timed_with_ours_and_without_if_they_agree(parts: Any, machine: Any, error: float) -> None:
    peer = parts.detectors.Peer("somebody's", (), lambda batch: None)
    results = parts.bench_peers.measure(bench(parts, machine), peer, pretended(parts, error), 2)
    assert len(results) == 8 and len({r.name for r in results}) == 4
    for r in results:
        wrong = error and r.provider == "patched"
        assert r.status == ("wrong" if wrong else "timed"), (r.name, r.provider, r.reason)
        assert (r.total is None) == bool(wrong) and (r.memory is None) == bool(wrong)
    text = parts.bench_peers.table(results)
    assert ("WRONG" in text) == bool(error)
    assert max(map(len, [parts.bench_peers.HEADER, *text.splitlines()])) <= 80


def test_boxes_that_only_one_side_has_are_counted(parts: Any) -> None:
    one = [torch.rand(5, 4) * 9, torch.rand(5), torch.arange(5)]
    assert parts.bench_peers.unlike(one, [x.flip(0) for x in one]) == 0
    # One of five without a twin, of nine in all.
    assert parts.bench_peers.unlike([x[:4] for x in one], one) == pytest.approx(1 / 9)
    none = [torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)]
    assert parts.bench_peers.unlike(none, none) == 0 and parts.bench_peers.unlike(none, one) == 1


def test_a_detector_that_is_not_installed_is_said(
    parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = parts.detectors.Peer("somebody's", ("a_package_that_nobody_has",), lambda batch: None)
    monkeypatch.setitem(parts.detectors.PEERS, "mmdet", absent)
    words = ["--peers", "mmdet", "--device", "cpu", "--out", str(tmp_path)]
    results, _ = parts.bench_peers.run(parts.bench_peers.arguments(words))
    assert [r.status for r in results] == ["skipped"]
    assert "not installed: a_package_that_nobody_has" in capsys.readouterr().out


@pytest.mark.peers
def test_real_detectors_are_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_peers.py"), "--size", "64x96", "--rounds", "1"]
    command += ["--seconds", "0.01", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench_peers.json").read_text())["results"]
    # What is not installed is one line, and said.
    assert [r for r in found if r["status"] not in ("timed", "skipped")] == []
    assert all(r["memory"] for r in found if r["status"] == "timed")
    for needs, name in (("mmdet", "mmdet GFL"), ("torchvision", "FCOS"), ("ultralytics", "YOLOv8")):
        timed = [r for r in found if name in r["stem"] and r["status"] == "timed"]
        assert len(timed) == (8 if importlib.util.find_spec(needs) else 0)
