# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

import gfl_ops
from gfl import cli
from gfl_ops import kernel_check
from gfl_ops.kernel_check import Report
from gfl_ops.kernel_check_process import OK, WRONG, Verdict


def reports(monkeypatch: pytest.MonkeyPatch, status: str) -> None:
    """Let the check find one kernel of that status on one device."""
    verdict = Verdict("qfl", "native", status, 0.5, "" if status == OK else "result 0: 1 of 129 wrong")
    monkeypatch.setattr(gfl_ops, "self_check", lambda device: Report(device, {"device": "CPU"}, (verdict,), 0.5))
    monkeypatch.setattr(kernel_check, "devices", lambda: ["cpu"])


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WRONG, 1)])
def test_the_check_prints_verdicts_and_writes_them(
    status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports(monkeypatch, status)
    assert cli.main(["doctor", "--check", "--json", str(tmp_path / "verdicts.json")]) == code
    printed = capsys.readouterr().out
    assert f"qfl               native   {status}" in printed
    assert ("1 of 129 wrong" in printed) == (code == 1)
    assert max(map(len, printed.splitlines())) <= 80
    (written,) = json.loads((tmp_path / "verdicts.json").read_text())
    assert written["ok"] == (code == 0) and written["verdicts"][0]["operator"] == "qfl"


def test_without_the_check_nothing_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gfl_ops, "self_check", lambda device: pytest.fail("checked unasked"))
    assert cli.main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_a_file_for_verdicts_needs_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", str(tmp_path / "verdicts.json")]) == 1
    assert "`--json` needs --check" in capsys.readouterr().err


def test_what_an_issue_report_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    requirements = ["numpy", "tomli; python_version < '3.11'", 'no-such-package>=2; extra == "eval"']
    requirements += ["pytest>=8; extra == 'test'", "pillow[all]; extra == 'other'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    facts = {line[:15].strip(): line[15:] for line in printed.split("\n\n")[0].splitlines()}
    assert facts["packages"] == f"numpy {importlib.metadata.version('numpy')}"
    assert facts["optional"] == f"pillow {importlib.metadata.version('pillow')}; missing: no-such-package"
    assert "GiB" in facts["memory"] and "cores" in facts["memory"] and "GiB free in" in facts["disk"]
    assert max(map(len, printed.splitlines())) <= 80
