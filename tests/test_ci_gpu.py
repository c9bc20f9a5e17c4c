# SPDX-License-Identifier: Apache-2.0
""".ci/gpu without a GPU: how it stops, what it selects, what becomes of its figures.

The parts themselves are rehearsed by ``REHEARSE=1 .ci/gpu 1`` and ``2``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import on_device
import pytest
import torch

import gfl_ops
from gfl_ops.core import backends

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "gpu"
SUPPORT = ROOT / "tests" / "support"
TEXT = SCRIPT.read_text(encoding="utf-8")


def run(command: list[str], timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    # pytest-xdist's own variables would make a pytest in there one of its workers.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=kept | environment)


def script(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    places = {"OUT": str(tmp_path / "out"), "DIST": str(tmp_path / "dist"), "TMPDIR": str(tmp_path), "PATH": path}
    return run(["bash", str(SCRIPT), *words], **(places | environment))


def program(tmp_path: Path, name: str, text: str) -> None:
    """A stand-in for a program, found before the real one."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def function(name: str) -> str:
    """A function of the script, alone."""
    (text,) = re.findall(rf"^{name}\(\) \{{.*?\n\}}$|^{name}\(\) \{{.*\}}$", TEXT, re.MULTILINE | re.DOTALL)
    return text


def test_the_script_is_well_formed(tmp_path: Path) -> None:
    assert run(["bash", "-n", str(SCRIPT)]).returncode == 0
    for words in ((), ("3",)):
        done = script(tmp_path, *words)
        assert done.returncode == 2 and "usage: .ci/gpu build|1|2" in done.stderr


def test_it_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "exit 9")
    done = script(tmp_path, "1")
    assert done.returncode == 2 and "no GPU" in done.stdout


@pytest.mark.parametrize("part", ["1", "2"])
def test_a_failed_build_stops_the_run(tmp_path: Path, part: str) -> None:
    """python3 -m pip fails; nothing after it runs."""
    program(tmp_path, "python3", f'case "$*" in *pip*) echo no compiler; exit 1;; esac; exec {sys.executable} "$@"')
    done = script(tmp_path, part, REHEARSE="1")
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"\[\d+ s\] build: exit status 1; no compiler\n", done.stdout)
    assert (tmp_path / "out" / f"part{part}.tgz").is_file() and (
        tmp_path / "out" / "log.txt"
    ).read_text() == done.stdout


def test_a_wheel_that_does_not_fit_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "gfl_ops-0.1.0-cp27-cp27m-win32.whl").write_bytes(b"")
    done = script(tmp_path, "1", REHEARSE="1")
    assert done.returncode == 1 and "install: exit status 1" in done.stdout and "self-check" not in done.stdout


def test_a_command_gets_what_is_left_of_the_part_s_time(tmp_path: Path) -> None:
    lines = [
        "slow=1 limit=12 SECONDS=0 logs=$PWD out=$PWD work=$PWD part=1",
        *(function(name) for name in ("say", "left", "save", "at_most")),
        "mkdir -p logs; logs=$PWD/logs",
        "at_most 1 slow sleep 30",
        "signal=INT at_most 5 fails sh -c 'echo why; exit 3'",
        'own() { echo "a function, $1"; }; export -f own',
        "at_most 5 well own given",
        "SECONDS=8",
        "at_most 5 late echo never",
    ]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    log = [re.sub(r"^\[\d+ s\] ", "", line) for line in done.stdout.splitlines()]
    assert log == [
        "slow: exit status 124; ",
        "fails: exit status 3; why",
        "well: exit status 0; a function, given",
        "late: left out, no time",
    ], done.stderr
    assert (tmp_path / "part1.tgz").is_file() and not (tmp_path / "logs" / "late.txt").exists()


def test_each_test_has_a_process_and_failures_are_named(tmp_path: Path) -> None:
    (tmp_path / "cpp").mkdir()
    for name, text in (("good", "exit 0"), ("bad", "echo wrong; exit 1"), ("stuck", "exec sleep 60")):
        (tmp_path / "cpp" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "cpp" / name).chmod(0o755)
    lines = ["slow=1 dist=$PWD work=$PWD logs=$PWD", function("each"), "each cpp 2 '' good bad stuck"]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "1 of 3 passed; bad: exit status 1;stuck: exit status 124;\n"
    assert (tmp_path / "cpp.bad.txt").read_text() == "wrong\n"


FAULTY = """
import torch

def test_before(): pass

def test_faulty():
    torch.cuda.is_initialized = lambda: True
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access\\nmore")
    torch.cuda.synchronize = synchronize

def test_after(): pass
"""


def test_a_fault_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(FAULTY)
    faults = tmp_path / "faults.txt"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_faults", "-p", "no:cacheprovider", str(tmp_path)]
    done = run(command, PYTHONPATH=str(SUPPORT), GPU_FAULTS=str(faults))
    assert done.returncode == 70, done.stdout
    (line,) = faults.read_text().splitlines()
    assert line.endswith("test_it.py::test_faulty: CUDA error: an illegal memory access")


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_another_worker_goes_on_after_a_fault(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(FAULTY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_faults", "-n", "1", "--max-worker-restart", "4"]
    done = run([*command, str(tmp_path)], PYTHONPATH=str(SUPPORT), GPU_FAULTS=str(tmp_path / "faults.txt"))
    assert "1 failed, 2 passed" in done.stdout or "1 failed, 3 passed" in done.stdout, done.stdout
    assert re.search(r"worker 'gw0' crashed while running .*test_faulty", done.stdout)


# --- what meets a GPU -----------------------------------------------------------------------------------------------

# A machine whose torch says that there is a GPU, for the collection of tests; nothing is run.
PRETEND = """
import torch
torch.cuda.is_available = lambda: True
from gfl_ops.core import backends
backends.unavailable = lambda backend, stem, device: None
"""


def test_what_is_selected_on_a_gpu_holds_every_operator_s_own_tests(tmp_path: Path) -> None:
    (tmp_path / "pretend_gpu.py").write_text(PRETEND)
    stubs = ["at_most() { printf '%s\\n' \"$*\"; }", "bench() { :; }", "record() { :; }", "device=cuda"]
    part = run(["bash", "-c", "\n".join([*stubs, "headline=() scale=() all=()", function("part1"), "part1"])])
    (selected,) = re.findall(r"^100 pytest-native tests (.+)$", part.stdout, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "pretend_gpu", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-k", selected]
    stems = "nms soft_nms multiclass_nms decode dfl dfl_integral integral atss gfl_loss ld boxes"
    files = [f"test_{stem}.py" for stem in (stems + " large_inputs on_gpu op_contract postprocess qfl").split()]
    done = run([*command, *(str(ROOT / "tests" / name) for name in files)], PYTHONPATH=f"{tmp_path}:{SUPPORT}")
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert {Path(line.split("::")[0]).name for line in found} == set(files), done.stdout[-2000:] + done.stderr
    assert all("cuda" in line and "triton" not in line for line in found)
    for case in ("nms-one-class-6000", "soft-nms-2000", "atss-16x60", "head-loss-256x320", "postprocess-no-room"):
        assert any(f"{case}-native-cuda" in line for line in found), case
    assert sum("test_it_is_the_loop" in line for line in found) >= 3  # soft and multiclass NMS


class Watched(on_device.OnDevice):
    """Counts what it sends."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.sent = 0

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent += 1
        return tensor.clone()


def test_operators_and_their_gradients_are_sent_to_the_device(generator: torch.Generator) -> None:
    if reason := backends.unavailable("native", "dfl", "cpu"):
        pytest.skip(reason)
    pred = torch.randn(6, 17, generator=generator, requires_grad=True)
    target = torch.rand(6, generator=generator) * 16
    with gfl_ops.set_backend("native"):
        want = gfl_ops.distribution_focal_loss(pred, target)
        (want_gradient,) = torch.autograd.grad(want * 3, pred)
        with Watched() as device:
            got = gfl_ops.distribution_focal_loss(pred, target)
            forward = device.sent
            (gradient,) = torch.autograd.grad(got * 3, pred)
    assert 0 < forward < device.sent
    assert torch.equal(got, want) and torch.equal(gradient, want_gradient)


# --- figures --------------------------------------------------------------------------------------------------------


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two parts' figures, gathered as on a machine with a GPU."""
    record = module("gpu_record")
    where = {"gpu": "NVIDIA H200 (sm_90), driver 580", "date": "2026-12-01T10:00:00", "commit": "abc", "versions": {}}
    where["versions"] = {"torch": "2.11.0"}
    monkeypatch.setattr(record.stamp, "stamp", lambda: where)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "nowhere")
    goal = {"goal": "qfl fp32", "provider": "", "want": 80.0, "got": 75.0, "ours_ms": 0.075}
    slower = goal | {"provider": "eager", "want": 12.0, "got": 13.0}
    timing = {"model": "gfl_r50_1x", "size": [800, 1344], "dtype": "bf16", "batch": 1, "images_per_second": 312.3}
    timing |= {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    files = {"stem": "gfl_r50_1x", "what": "800x1344", "dtype": "bf16", "batch": 16, "provider": "optimized"}
    parts: list[dict[str, Any]] = [
        {
            "gfl-bench.json": {"timings": [timing]},
            "bench-inference/bench_gpu.json": {"goals": [goal, slower | {"goal": "decode", "got": None}]},
        },
        {
            "bench-peers/bench_gpu.json": {"goals": [goal | {"got": 70.0, "ours_ms": 0.07}, slower]},
            "bench-files/bench_files.json": {"files": 47, "results": [files | {"forward": {"median": 100.0}}]},
        },
    ]
    for number, part in enumerate(parts):
        for name, content in part.items():
            path = tmp_path / f"logs{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["gpu_record.py", str(tmp_path / f"logs{number}"), "--out", str(tmp_path)])
        assert record.main() == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "nvidia-h200.json"
    return json.loads(path.read_text())


def test_figures_of_both_parts_become_one_record(recorded: dict[str, Any]) -> None:
    assert {name: found["images_per_second"] for name, found in recorded["detectors"].items()} == {
        "gfl_r50_1x 800x1344 bf16 batch 1, from memory": 312.3,
        "gfl_r50_1x 800x1344 bf16 batch 16, from JPEG files": 470.0,
    }
    assert {name: goal["got"] for name, goal in recorded["goals"].items()} == {
        "qfl fp32 / limit": 70.0,
        "decode / eager": None,
        "qfl fp32 / eager": 13.0,
    }
    assert all(figures["commit"] == "abc" for key in ("detectors", "goals") for figures in recorded[key].values())


def test_the_table_is_made_of_the_records(
    recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = module("doc_tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    assert tables.gpus().startswith("Nothing has been timed on a GPU yet")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "nvidia-h200.json").write_text(json.dumps(recorded))
    (tmp_path / "results" / "peers.json").write_text('{"results": []}')
    rows = tables.gpus().splitlines()[4:]
    assert rows == [
        "| **NVIDIA H200 (sm_90), driver 580**, torch 2.11.0, 2026-12-01, abc | |",
        "| gfl_r50_1x 800x1344 bf16 batch 1, from memory | 312.3 images/s |",
        "| gfl_r50_1x 800x1344 bf16 batch 16, from JPEG files | 470 images/s |",
        "| qfl fp32 | 70 µs; 70 µs (goal 80); 13× as fast as eager (goal 12) |",
    ]
