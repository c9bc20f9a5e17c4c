# SPDX-License-Identifier: Apache-2.0
"""The tables of a training, and what a kill leaves of them."""

from __future__ import annotations

from pathlib import Path

from gfl.engine.log import EVALUATIONS, STEPS, TEXT, RunLog


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


def test_what_is_said_is_kept(tmp_path: Path) -> None:
    for text in ("one", "two"):
        log = RunLog(tmp_path)
        log.say(text)
        log.close()
    lines = (tmp_path / TEXT).read_text().splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
