# SPDX-License-Identifier: Apache-2.0
"""`gfl bench` by its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.count("gfl_tiny, 64x64, cpu fp32, batch") == 2 and said.count("GFLOP an image") == 2
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(t["batch"], t["provider"]) for t in record["timings"]] == [
        (1, "plain"),
        (1, "ours"),
        (2, "plain"),
        (2, "ours"),
    ]
    assert record["threads"] == 1 and record["clock"] == "cpu" and record["versions"]["torch"] == torch.__version__
    assert all(t["p50"] > 0 and set(t["parts"]) for t in record["timings"])
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


def test_a_case_that_fails_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gfl.engine import bench

    real = bench.bench

    def sometimes(name, size, batch, *rest, **more):
        if batch == 1:
            raise RuntimeError("out of memory\nat length")
        return real(name, size, batch, *rest, **more)

    monkeypatch.setattr(bench, "bench", sometimes)
    assert main([*QUICK, "--batch", "1", "2"]) == 1
    said = capsys.readouterr().out
    assert "batch 1: out of memory\n" in said and "batch 2\n" in said


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    for word in (
        "--models",
        "--batch",
        "--size",
        "--device",
        "--dtype",
        "--clock",
        "--compile",
        "plain",
        "ours",
        "floor",
    ):
        assert word in said
