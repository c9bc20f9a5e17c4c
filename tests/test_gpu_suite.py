# SPDX-License-Identifier: Apache-2.0
"""scripts/gpu_suite.py without a GPU: how it reads what other programs say, what it would run, and what it reports."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_suite.py"


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def running(suite: ModuleType, tmp_path: Path) -> Any:
    gpu = suite.Gpu("NVIDIA Test", "580.1", "9.0", "1 MiB")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    made = suite.Suite(tmp_path / "out", gpu, None, 1.0, False, scratch)
    made.section = "tests"
    return made


def test_it_reads_nvidia_smi(suite: ModuleType) -> None:
    text = "NVIDIA H100 80GB HBM3, 580.159.04, 9.0, 81559 MiB\nNVIDIA GeForce RTX 5090, 580.1, 12.0, 32607 MiB\n"
    first, second = suite.parse_gpus(text)
    assert (first.name, first.driver, first.arch) == ("NVIDIA H100 80GB HBM3", "580.159.04", "sm_90")
    assert second.arch == "sm_120"
    assert suite.parse_gpus("No devices were found\n") == []
    assert suite.parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


def test_it_reads_pytest(suite: ModuleType) -> None:
    text = """
tests/test_qfl.py::test_gradient[qfl-native-cuda-fp32] PASSED            [  1%]
../project/tests/test_nms.py::test_a[nms cuda] FAILED                    [  2%]
tests/test_nms.py::test_b SKIPPED (no real data at ../shared/data)       [  3%]
tests/test_nms.py::test_c XFAIL (later)
[gw3] [ 50%] PASSED tests/test_iou.py::test_kind[giou cuda]
[gw0] [ 51%] ERROR tests/test_iou.py::test_setup
tests/test_late.py::test_running
=========================== short test summary info ============================
FAILED ../project/tests/test_nms.py::test_a[nms cuda] - AssertionError: 1 of 129 wrong
ERROR tests/test_iou.py::test_setup - RuntimeError
ERROR tests/test_broken.py - ImportError: no module named x
"""
    counts, failures = suite.parse_pytest(text)
    assert counts == {"passed": 2, "failed": 1, "skipped": 1, "xfail": 1, "error": 2}
    assert failures == [
        "../project/tests/test_nms.py::test_a[nms cuda]",
        "tests/test_iou.py::test_setup",
        "tests/test_broken.py",
    ]


@pytest.mark.parametrize(
    ("tool", "code", "text", "status", "expected"),
    [
        ("memcheck", 0, "qfl: passed\n========= ERROR SUMMARY: 0 errors\n", "passed", "0 errors"),
        ("racecheck", 0, "== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "passed", "0 hazards"),
        ("racecheck", 9, "== RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", "failed", "2 hazards"),
        ("memcheck", 9, "== Invalid __global__ write\n== ERROR SUMMARY: 3 errors\n", "failed", "3 errors"),
        ("memcheck", 1, "========= ERROR SUMMARY: 0 errors\n", "failed", "exit code 1"),
        ("initcheck", 1, "========= Error: Device not supported. Please refer to\n", "not there", "refused"),
        ("synccheck", 139, "Segmentation fault\n", "failed", "no summary, exit code 139"),
        ("synccheck", None, "", "out of time", "time"),
    ],
)  # fmt: skip
def test_it_reads_compute_sanitizer(
    suite: ModuleType, tool: str, code: int | None, text: str, status: str, expected: str
) -> None:
    got = suite.parse_sanitizer(tool, code, text)
    assert got[0] == status and expected in got[1]


def test_it_reads_the_end_of_a_benchmark(suite: ModuleType) -> None:
    text = "table\n" * 50 + "ours against the fastest of the others\nqfl 2.0× faster\n"
    assert suite.parse_bench(text) == ["ours against the fastest of the others", "qfl 2.0× faster"]
    assert len(suite.parse_bench("x\n" * 100)) == 25


def test_a_missing_gpu_is_reported(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env={"PATH": str(empty)},
    )  # fmt: skip
    assert done.returncode == 2 and "no NVIDIA GPU here: nvidia-smi is not on PATH" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_every_section_and_runs_nothing(suite: ModuleType, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), "--dry-run"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+) \(at most", done.stdout, re.MULTILINE) == list(suite.SECTIONS)
    assert "--no-build-isolation --no-deps" in done.stdout and "TORCH_CUDA_ARCH_LIST=" in done.stdout
    assert "bench.py losses" in done.stdout and "triton and cuda" in done.stdout
    assert not (tmp_path / "out").exists()


def test_sections_can_be_picked(suite: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--out", str(tmp_path), "--dry-run", "--only", "bench"]) == 0
    out = capsys.readouterr().out
    assert 0 < out.index("bench.py gpu") < out.index("bench.py losses") and "bench.py cpu" not in out
    assert "bench.py detectors --device cuda" in out and "pip install" not in out
    assert set(suite.LIMITS) == set(suite.SECTIONS)


def test_a_command_ends_with_its_children_when_its_time_is_up(running: Any) -> None:
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    done = running.run([sys.executable, "-c", code], 2.0)
    assert done.code is None and done.seconds < 30 and "begun" in done.output
    outcome = running.note("sleeper", done)
    assert outcome.status == "out of time" and outcome.bad


def test_commands_do_not_inherit_a_backend_or_the_interpreter(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GFL_OPS_BACKEND", "reference")
    code = "import os; print(sorted(os.environ))"
    expected = running.run([sys.executable, "-c", code], 20.0).output
    assert "TRITON_INTERPRET" not in expected and "GFL_OPS_BACKEND" not in expected and "GFL_TEST_SEED" in expected


def test_the_report_tells_what_failed(suite: ModuleType, running: Any) -> None:
    running.note("fine", suite.Finished("true", 0, 0.1, "well"), detail="3 | 4")
    done = suite.Finished("false", 1, 0.2, "line 1\nthe reason")
    running.note("broken", done, detail="1 failed", failures=["tests/test_x.py::test_y"])
    running.absent("compute-sanitizer", "it is not there")
    running.write()
    text = (running.out / "gpu_suite.md").read_text()
    assert "NVIDIA Test (sm_90), driver 580.1" in text
    assert "| tests | fine | passed | 0.1 | 3 \\| 4 |" in text
    assert "the reason" in text and "tests/test_x.py::test_y" in text and "well" not in text
    record = json.loads((running.out / "gpu_suite.json").read_text())
    assert [o["status"] for o in record["outcomes"]] == ["passed", "failed", "not there"]
    assert [o.bad for o in running.outcomes] == [False, True, False]


def test_few_files_are_kept(suite: ModuleType, running: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    for i in range(20):
        (made / f"{i:02}.json").write_text("{}")
    running.write()
    running.keep(made)
    running.keep(made)
    assert len(list(running.out.glob("*"))) == suite.FILES


def test_missing_pytest_is_a_failure_that_says_so(
    suite: ModuleType, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    suite.tests(running)
    assert running.outcomes[0].bad and "pytest is not installed" in running.outcomes[0].detail
