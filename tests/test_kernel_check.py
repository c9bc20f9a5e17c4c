# SPDX-License-Identifier: Apache-2.0
"""The self-check finds planted faults, survives them, and keeps its verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gfl_ops
from gfl_ops import kernel_check
from gfl_ops.core import backends
from gfl_ops.kernel_check import CRASHED, FAILED, HUNG, OK, WRONG, Report

if backends.unavailable("native", "qfl", "cpu") is not None:
    pytest.skip("the compiled extension is not there", allow_module_level=True)

# What a subprocess does instead of checking the operator `integral`.
FAULTS = {
    "wrong": "raise Mismatch('sparse, result 0: 1 of 129 wrong')",
    "failed": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "crashed": "os.abort()",
    "hung": "time.sleep(600)",
}


@pytest.fixture(autouse=True)
def fresh_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own, and backends as they were afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    automatic, distrusted = dict(backends._AUTOMATIC), dict(backends._DISTRUSTED)
    yield
    for table, before in ((backends._AUTOMATIC, automatic), (backends._DISTRUSTED, distrusted)):
        table.clear()
        table.update(before)


def plant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str, stems: tuple[str, ...]) -> None:
    """Let the subprocess meet `fault` at integral, and check `stems` only."""
    script = tmp_path / "planted.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, time
        from gfl_ops import kernel_check
        from gfl_ops.core.conformance import Mismatch
        check = kernel_check.check_forward
        def planted(spec, function, sample):
            if spec.stem == "integral":
                {fault}
            check(spec, function, sample)
        kernel_check.check_forward = planted
        kernel_check._main()
        """)
    )
    monkeypatch.setattr(kernel_check, "_COMMAND", (sys.executable, str(script)))
    every = kernel_check.cases
    monkeypatch.setattr(kernel_check, "cases", lambda device: [c for c in every(device) if c[0].stem in stems])
    monkeypatch.setattr(kernel_check, "SAMPLE_LIMIT", 15.0)


def test_every_kernel_of_this_machine_is_right() -> None:
    report = gfl_ops.self_check("cpu")
    assert report.ok, str(report)
    assert {(v.operator, v.backend) for v in report.verdicts} == {
        (spec.stem, backend) for spec, backend in kernel_check.cases("cpu")
    }
    assert kernel_check.stored("cpu") == report


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_the_rest_checked(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, FAULTS[fault], ("decode", "integral", "nms"))
    with pytest.warns(RuntimeWarning, match="native kernel of integral is not used on cpu.*report"):
        report = gfl_ops.self_check("cpu")
    status = {v.operator: v.status for v in report.verdicts if v.backend == "native"}
    assert status == {
        "decode": OK,
        "integral": {"wrong": WRONG, "failed": FAILED, "crashed": CRASHED, "hung": HUNG}[fault],
        "nms": OK,
    }
    assert not report.ok
    assert backends.serving("integral", "cpu") == "reference"
    assert backends.serving("decode", "cpu") == "native"
    line = next(line for line in str(report).splitlines() if line.startswith("integral (native)"))
    assert {"wrong": "1 of 129", "failed": "illegal memory", "crashed": "SIGABRT", "hung": "no answer"}[fault] in line
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        kernel_check.apply(report)


def test_a_verdict_is_used_by_the_next_process_and_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "pass", ("nms",))
    first = kernel_check.ensure_checked("cpu")
    monkeypatch.setattr(kernel_check, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert kernel_check.ensure_checked("cpu") == first


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFL_OPS_SELF_CHECK", "0")
    monkeypatch.setattr(kernel_check, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert kernel_check.ensure_checked("cpu") is None
    assert kernel_check.stored("cpu") is None


def test_a_damaged_verdict_is_none(tmp_path: Path) -> None:
    path = kernel_check._path("cpu")
    path.parent.mkdir(parents=True)
    for text in (
        "",
        "{",
        "[]",
        '{"device": "cpu"}',
        json.dumps({"device": 1, "machine": {}, "verdicts": [1], "seconds": 0}),
    ):
        path.write_text(text)
        assert kernel_check.stored("cpu") is None


def test_a_read_only_home_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file where the folder would be: root may write into read-only folders.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plant(monkeypatch, tmp_path, "pass", ("nms",))
    report = kernel_check.ensure_checked("cpu")
    assert report is not None and report.ok


def test_eight_processes_check_once(tmp_path: Path) -> None:
    script = tmp_path / "one_of_eight.py"
    script.write_text(
        textwrap.dedent("""
        from gfl_ops import kernel_check
        every = kernel_check.cases
        kernel_check.cases = lambda device: [c for c in every(device) if c[0].stem == "nms"]
        assert kernel_check.ensure_checked("cpu").ok
        """)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **({"LOCAL_RANK": str(rank)} if rank % 2 else {})},
        )
        for rank in range(8)
    ]
    said = "".join(process.communicate(timeout=240)[1] for process in started)
    assert [process.returncode for process in started] == [0] * 8, said
    assert said.count("checking the kernels") == 1, said


def test_another_machine_has_verdicts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernel_check._path("cpu")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert kernel_check._path("cpu") != path


def test_a_report_survives_json() -> None:
    report = Report("cpu", {"device": "CPU"}, (kernel_check.Verdict("qfl", "native", OK, 0.5),), 1.5)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["ok"] is True


@pytest.mark.parametrize("device", ["meta", "cuda:0"])
def test_a_device_that_cannot_be_checked_is_refused(device: str) -> None:
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"gfl_ops.self_check: `device` must be"):
        gfl_ops.self_check(device)
