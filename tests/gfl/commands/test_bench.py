# SPDX-License-Identifier: Apache-2.0
"""`gfl bench` by its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import gfl.detector
from gfl.cli import main

QUICK = ["bench", "--device", "cpu", "--models", "gfl_tiny", "--size", "64x64", "--seconds", "0.01"]


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    more = ["--batch", "1", "2", "--threads", "1", "--clock", "cpu"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        files = files[:2]
    try:
        assert main([*QUICK, *more, *files]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("gfl_tiny 64x64 cpu fp32 batch") == 2 and "images/s" in out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["threads"] == 1 and record["clock"] == "cpu" and record["torch"] == torch.__version__
    for batch, timing in zip((1, 2), record["timings"], strict=True):
        assert timing["batch"] == batch and timing["runs"] >= 3
        assert 0 < timing["p20"] <= timing["p50"] <= timing["p80"]
        assert timing["images_per_second"] == pytest.approx(batch / timing["p50"])
    if len(files) > 2:
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size", "100x64"], "multiples of 32"),
        (["--size", "64"], "HEIGHTxWIDTH"),
        (["--batch", "33"], r"[1, 32]"),
        (["--models", "gfl_r5"], "must be of gfl_r50_1x"),
        (["--seconds", "0"], "`--seconds` must be positive"),
        (["--threads", "0"], "`--threads` must be at least 1"),
        (["--json", "nowhere/out.json"], "the folder of nowhere/out.json"),
    ],
)
def test_what_it_refuses(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, *arguments]) == 1
    assert text in capsys.readouterr().err


def test_a_failing_case_is_reported_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gfl.detector.Detector

    def sometimes(*arguments, batch_size: int, **more):
        if batch_size == 1:
            raise RuntimeError("out of memory\nat length")
        return real(*arguments, batch_size=batch_size, **more)

    monkeypatch.setattr(gfl.detector, "Detector", sometimes)
    assert main([*QUICK, "--batch", "1", "2"]) == 1
    out = capsys.readouterr().out
    assert "batch 1: out of memory\n" in out and "batch 2\n" in out


def test_as_many_candidates_pass_as_in_a_trained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes would cost nothing if a random network's scores were compared with the usual threshold."""
    real, thresholds = gfl.detector.Detector, []

    def noted(*arguments, score_threshold: float, **more):
        thresholds.append(score_threshold)
        return real(*arguments, score_threshold=score_threshold, **more)

    monkeypatch.setattr(gfl.detector, "Detector", noted)
    assert main(QUICK) == 0
    assert 0.005 < thresholds[0] < 0.1


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    for word in ("--models", "--batch", "--size", "--device", "--dtype", "--clock", "--compile", "bench.py detectors"):
        assert word in out


def test_what_the_first_runs_prepare_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run of a batch chooses algorithms, the second one captures its graph."""
    call, calls = gfl.detector.Detector.__call__, []
    monkeypatch.setattr(gfl.detector.Detector, "__call__", lambda *given: calls.append(0) or call(*given))
    assert main([*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    (timing,) = json.loads((tmp_path / "out.json").read_text())["timings"]
    assert len(calls) == timing["runs"] + 2
