# SPDX-License-Identifier: Apache-2.0
"""The benchmarks on tiny inputs: everything agrees, nothing that is wrong is timed, and the report says what happened.

No time is asserted.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_modules
import pytest
import torch

import gfl_ops
from gfl_ops.core.registry import SPECS

BENCH = benchmark_modules.FOLDER / "bench.py"
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


@pytest.mark.parametrize("stem", SPECS)
def test_every_provider_of_every_operator_agrees(parts: Any, scene: Any, machine: Any, stem: str) -> None:
    for name in ("fp32", "bf16"):
        dtype = parts.harness.DTYPES[name]
        if dtype not in SPECS[stem].dtypes:
            continue
        for case in parts.cases.make(stem, scene, dtype, "cpu"):
            results = bench(parts, machine).run(case, name, 2, compiled=False)
            assert {r.provider for r in results} >= {"eager", "native", "triton", "reference"}
            for r in results:
                assert r.status in ("timed", "skipped"), f"{case.name} {name} {r.provider}: {r.status}: {r.reason}"
                assert r.status == "timed" or r.reason
                if r.status == "timed":
                    assert r.total.p20 <= r.total.median <= r.total.p80
                    assert r.bytes["forward"] > 0 and r.memory is not None


@pytest.mark.parametrize("stem", [s for s in SPECS if SPECS[s].differentiable])
def test_the_formulas_of_others_are_the_references_in_fp64(parts: Any, scene: Any, machine: Any, stem: str) -> None:
    """Written independently of each other: agreement to 1e-10 leaves no room for another meaning."""
    if torch.float64 not in SPECS[stem].dtypes:
        pytest.skip(f"{stem} has no fp64")
    if stem == "yolo_loss":
        pytest.skip("its assignment is in fp32 for maps of any dtype, as ultralytics' is")
    for case in parts.cases.make(stem, scene, torch.float64, "cpu"):
        case = replace(case, peers=case.peers | ({"dense": case.dense} if case.dense else {}))
        peers = [name for name, call in case.peers.items() if call]
        # Without a form of others there is nothing to compare.
        for r in bench(parts, machine).run(case, "fp64", 2, only=peers, compiled=False) if peers else []:
            assert r.status == "timed", f"{case.name} {r.provider}: {r.reason}"
            assert r.error < 1e-10


def test_every_operator_is_timed_on_real_shapes(parts: Any, scene: Any) -> None:
    assert sorted(parts.cases.order()) == sorted(SPECS)
    for stem, spec in SPECS.items():
        for case in parts.cases.make(stem, scene, spec.dtypes[0], "cpu"):
            assert not case.what.startswith("sample"), f"benchmarks/cases/ has no inputs for {stem}"


def test_every_form_is_an_operator_s(parts: Any) -> None:
    for name in parts.cases.FAMILIES:
        module = importlib.import_module(f"cases.{name}")
        assert set(module.MAKERS) <= set(SPECS), f"benchmarks/cases/{name}.py has cases of operators that are gone"


def renamed(parts: Any, monkeypatch: pytest.MonkeyPatch, stem: str, public: str) -> None:
    """Register the operator `stem` under another name, which benchmarks/ has never seen."""
    new = object.__new__(type(SPECS[stem]))
    fields = {f.name: getattr(SPECS[stem], f.name) for f in dataclasses.fields(SPECS[stem])}
    for name, value in (fields | {"stem": "toy", "public": (public,)}).items():
        object.__setattr__(new, name, value)
    monkeypatch.setitem(SPECS, "toy", new)
    monkeypatch.setattr(parts.harness.backends, "unavailable", lambda backend, stem, device: None)


@pytest.mark.parametrize(
    ("stem", "public"), [("qfl", "quality_focal_loss"), ("vfl", "varifocal_loss"), ("dfl", "distribution_focal_loss")]
)
def test_a_new_loss_is_timed_against_its_reference_without_an_edit(
    parts: Any, scene: Any, machine: Any, monkeypatch: pytest.MonkeyPatch, stem: str, public: str
) -> None:
    renamed(parts, monkeypatch, stem, public)
    (case,) = parts.cases.make("toy", scene, torch.float32, "cpu")
    assert case.gradients == ("pred",) and "logits" in case.what and case.inputs["pred"].shape[0] > 80
    results = {r.provider: r for r in bench(parts, machine).run(case, "fp32", 2, compiled=False)}
    assert results["eager"].status == "timed" and results["native"].status == "timed"
    assert results["reference"].status == "skipped" and "eager" in results["reference"].reason


def test_a_new_iou_kind_is_timed(parts: Any, scene: Any) -> None:
    found = [case.name for case in parts.cases.make("iou", scene, torch.float32, "cpu")]
    assert found == list(gfl_ops.ops.boxes.iou.KINDS)


def test_an_operator_that_no_family_knows_is_timed_on_a_sample(
    parts: Any, scene: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.cases, "family", lambda spec: "unheard_of")
    (case,) = parts.cases.make("qfl", scene, torch.float32, "cpu")
    assert "sample" in case.what
    results = bench(parts, machine).run(case, "fp32", 1, compiled=False)
    assert {r.provider for r in results if r.status == "timed"} >= {"eager", "native"}


def test_a_wrong_provider_is_named_and_not_timed(parts: Any, scene: Any, machine: Any) -> None:
    case = parts.cases.make("qfl", scene, torch.float32, "cpu")[0]

    def value(**inputs: Any) -> torch.Tensor:
        return parts.formulas.score.qfl(**inputs) * 1.001

    def gradient(**inputs: Any) -> torch.Tensor:
        pred = inputs["pred"]
        return parts.formulas.score.qfl(**inputs) + 1e-3 * (pred - pred.detach())[:, 3].sum()

    def broken(**inputs: Any) -> torch.Tensor:
        raise RuntimeError("no such luck")

    def nothing(**inputs: Any) -> torch.Tensor:
        return inputs["pred"].sum() * float("nan")

    case = replace(case, peers={"value": value, "gradient": gradient, "broken": broken, "nan": nothing}, dense=None)
    results = {r.provider: r for r in bench(parts, machine).run(case, "fp32", 2, compiled=False)}
    assert [results[n].status for n in ("value", "gradient", "broken", "nan")] == ["wrong", "wrong", "failed", "wrong"]
    assert all(results[n].total is None for n in ("value", "gradient", "broken", "nan"))
    assert results["eager"].status == "timed"
    text = parts.report.block(list(results.values()))
    assert "WRONG" in text and "no such luck" in text
    summary = parts.report.summary(list(results.values()), machine)
    assert "wrong or failed" in summary
    assert max(map(len, (text + "\n" + summary).splitlines())) <= 80


def test_wrong_decisions_are_seen(parts: Any, scene: Any, machine: Any) -> None:
    case = parts.cases.make("nms", scene, torch.float32, "cpu")[0]
    case = replace(case, peers={"all": lambda boxes, scores, iou_threshold: torch.arange(len(boxes))})
    assert bench(parts, machine).run(case, "fp32", 2, only=["all"])[0].status == "wrong"


def test_a_losing_case_stays_in_the_table(parts: Any, machine: Any) -> None:
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


def test_three_significant_digits(parts: Any) -> None:
    values = (0.00012, 0.0123, 1.234, 98.76, 1234.5, None)
    assert [parts.report.ms(v) for v in values] == ["0.0001", "0.0123", "1.23", "98.8", "1234", "-"]


def test_random_scenes_look_like_coco(parts: Any) -> None:
    images = parts.inputs.random_boxes(400, (800, 1344), torch.Generator().manual_seed(0))
    count = torch.tensor([float(len(labels)) for _, labels in images])
    boxes = torch.cat([b for b, _ in images]) * 480 / 800
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


def test_the_command_that_users_type_writes_table_json_and_plot(tmp_path: Path) -> None:
    words = ["--ops", "qfl", "--dtypes", "fp32", "--size", "96x160", "--providers", "eager", "native", "reference"]
    script = BENCH.with_name("bench_losses.py")
    out, record = benchmark_modules.run_command(*words, folder=tmp_path, script=script)
    assert record["stamp"]["versions"]["torch"] and "bench_losses.py --ops qfl" in record["stamp"]["command"]
    assert {r["provider"] for r in record["results"]} == {"eager", "native", "reference"}
    assert record["copy_bytes_per_s"] > 0 and record["log1p_ms"]
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        assert "matplotlib is not installed" in out
    else:
        assert (tmp_path / "bench_losses.png").read_bytes().startswith(b"\x89PNG")


def test_every_command_has_help(parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parts.bench.parse(["--help"])
    out = capsys.readouterr().out
    for name in ("losses", "cpu", "gpu", "peers", "detectors", "files"):
        assert f"    {name} " in out or f"    {name}\n" in out
        with pytest.raises(SystemExit):
            parts.bench.parse([name, "--help"])
        assert "default" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_plot_but_a_reason(
    parts: Any, machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    why = parts.report.draw(tmp_path / "x.png", [], machine)
    assert why and "matplotlib" in why and not (tmp_path / "x.png").exists()


def test_the_time_limit_leaves_out_and_says_so(parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "64x64", "--limit", "0.001", "--device", "cpu", "--out", str(tmp_path), "--data", str(NOWHERE)]
    results, machine = parts.command("losses").measure(parts.bench.parse(["losses", *words]))
    assert results and all(r.status == "skipped" for r in results)
    assert "no time left" in parts.report.summary(results, machine)
    assert "floor" in capsys.readouterr().out


@pytest.mark.parametrize("full", [False, True])
def test_without_arguments_the_operators_asked_about_first_in_all_dtypes(
    parts: Any, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, ran = parts.command("losses"), []

    def run(self: Any, case: Any, dtype: str, batch: int, only: Any = (), compiled: bool = True) -> list[Any]:
        ran.append((case.stem, dtype, compiled))
        return []

    monkeypatch.setattr(parts.harness.Bench, "run", run)
    words = ["losses", "--size", "64x64", "--device", "cpu", "--data", str(NOWHERE), "--limit", "1e9"]
    losses.measure(parts.bench.parse(words + ["--full"] * full))
    stems = {stem for stem, _, _ in ran}
    assert stems == set(parts.cases.order()) if full else stems == set(losses.FIRST) < set(parts.cases.order())
    for stem in losses.FIRST:
        dtypes = {dtype for name, dtype, compiled in ran if name == stem and compiled}
        assert dtypes >= {"fp32", "bf16", "fp16"} and ("fp64" in dtypes) == full


def test_the_stamp_says_where_it_was_made(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.stamp, "gpu", lambda: "a GPU")
    record = parts.stamp.stamp()
    assert record["gpu"] == "a GPU" and record["cores"] >= 1
    assert any("torch" in line for line in parts.stamp.lines(record))
