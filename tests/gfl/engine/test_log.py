# SPDX-License-Identifier: Apache-2.0
"""The tables of a training, and what a kill leaves of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gfl.engine.log import EVALUATIONS, LOGGER, STEPS, TEXT, Pace, RunLog


def write(folder: Path, steps: range, step: int = 0, evaluated: int = 0) -> None:
    log = RunLog(folder, step, evaluated)
    for s in steps:
        log.row(STEPS, s, {"loss": s / 8})
        if s % 2 == 0:
            log.row(EVALUATIONS, s, {"AP": s / 16})
    log.close()


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "killed", range(1, 7))
    with (tmp_path / "killed" / STEPS).open("a") as file:
        file.write("7,0.8")  # a row that the kill cut
    write(tmp_path / "killed", range(5, 9), step=4, evaluated=4)
    for name in (STEPS, EVALUATIONS):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_an_evaluation_that_no_checkpoint_knows_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5))
    log = RunLog(tmp_path, 4, evaluated=2)
    log.row(EVALUATIONS, 4, {"AP": 0.25})
    log.close()
    assert (tmp_path / EVALUATIONS).read_text() == "step,AP\n2,0.125\n4,0.25\n"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", active=False)
    log.row(STEPS, 1, {"loss": 1.0})
    log.say("something")
    log.close()
    assert not (tmp_path / "run").exists()


def test_a_program_that_logs_gets_the_lines_and_the_screen_stays_free(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    log.say("one \x1b[2J line")
    log.close()
    assert [(r.name, r.levelname, r.message) for r in caplog.records][-1] == ("gfl.train", "INFO", "one \\x1b[2J line")
    assert "line" not in capsys.readouterr().err and LOGGER.handlers == []


def test_without_one_the_lines_are_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    log = RunLog(tmp_path)
    log.say("a line")
    log.close()
    assert "a line\n" in capsys.readouterr().err


def test_an_older_table_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / STEPS).write_text("step,loss\n1,0.5\n")
    log = RunLog(tmp_path, 1)
    log.row(STEPS, 2, {"memory_gib": 3.0, "loss": 0.25})
    log.close()
    assert (tmp_path / STEPS).read_text().splitlines() == ["step,loss", "1,0.5", "2,0.25"]


def test_a_pace_counts_waiting_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def items() -> Iterator[int]:
        for item in range(2):
            clock[0] += 3
            yield item

    pace = Pace(torch.device("cpu"))
    for _ in pace.waiting(items()):
        clock[0] += 1
        pace.count(4)
    row = pace.read()
    assert row["images_per_second"] == 1 and row["data_wait"] == 0.75 and 0 < row["memory_gib"] < 1000
    assert pace.left(1000) == "1:06:40"
    # An evaluation, say.
    clock[0] += 5000
    pace.start()
    assert pace.left(10) == "0:00:40"


def test_what_is_said_is_kept(tmp_path: Path) -> None:
    for text in ("one", "two"):
        log = RunLog(tmp_path)
        log.say(text)
        log.close()
    lines = (tmp_path / TEXT).read_text().splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
