# SPDX-License-Identifier: Apache-2.0
"""The self-check finds planted faults, survives them, and keeps its verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gfl_ops
from gfl_ops import kernel_check, kernel_check_process
from gfl_ops.core import backends, extension, grad_in_forward
from gfl_ops.core.conformance import tensors
from gfl_ops.core.registry import SPECS
from gfl_ops.kernel_check import Report
from gfl_ops.kernel_check_process import CRASHED, FAILED, HUNG, OK, SKIPPED, WRONG, Verdict

if backends.unavailable("native", "qfl", "cpu") is not None:
    pytest.skip("the compiled extension is not there", allow_module_level=True)

# What a subprocess does instead of checking the operator `integral`.
FAULTS = {
    "wrong": "raise Mismatch('sparse, result 0: 1 of 129 wrong')",
    "failed": "raise RuntimeError('CUDA error: an illegal memory access was encountered')",
    "crashed": "os.abort()",
    "hung": "time.sleep(600)",
}


# The same where memory is short: of the device and the host, raised, and by the end of the process.
SHORT_OF_MEMORY = {
    "device": "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
    "driver": "raise RuntimeError('CUDA error: out of memory')",
    "library": "raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')",
    "host": 'raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes.")',
    "python": "raise MemoryError",
    "c++": "print('terminate called: std::bad_alloc', file=sys.stderr, flush=True); os.abort()",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
}

CPU = torch.device("cpu")


def elements(args: tuple[Any, ...]) -> int:
    return sum(t.numel() for t in tensors(args)) or 1


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
        import os, signal, sys, time
        import torch
        from gfl_ops import kernel_check_process
        from gfl_ops.core.conformance import Mismatch
        check = kernel_check_process.check_gradient
        def planted(spec, function, sample, seed):
            if spec.stem == "integral":
                {fault}
            check(spec, function, sample, seed)
        kernel_check_process.check_gradient = planted
        kernel_check_process.main()
        """)
    )
    monkeypatch.setattr(kernel_check_process, "_COMMAND", (sys.executable, str(script)))
    every = kernel_check_process.cases
    monkeypatch.setattr(kernel_check_process, "cases", lambda device: [c for c in every(device) if c[0].stem in stems])
    monkeypatch.setattr(kernel_check_process, "SAMPLE_LIMIT", 15.0)


def test_every_kernel_of_this_machine_is_right() -> None:
    report = gfl_ops.self_check("cpu")
    assert report.ok, str(report)
    assert {(v.operator, v.backend) for v in report.verdicts} == {
        (spec.stem, backend) for spec, backend in kernel_check_process.cases("cpu")
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


@pytest.mark.parametrize("fault", SHORT_OF_MEMORY)
def test_out_of_memory_is_no_verdict(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, tmp_path, SHORT_OF_MEMORY[fault], ("decode", "integral", "nms"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (report,) = kernel_check.ensure_checked("cpu")
    status = {v.operator: v.status for v in report.verdicts if v.backend == "native"}
    assert status == {"decode": OK, "integral": SKIPPED, "nms": OK}
    assert not report.ok and backends.serving("integral", "cpu") == "native"
    assert "not checked, to be tried again later: integral" in capsys.readouterr().err
    # Kept, so that processes that start together check once, but not for long.
    assert kernel_check.stored("cpu") == report
    monkeypatch.setattr(kernel_check, "RETRY_AFTER", 0.0)
    assert kernel_check.stored("cpu") is None


@pytest.mark.parametrize("fault", ["ends", "silent", "none"])
def test_a_process_that_does_not_start_is_no_verdict(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "pass", ("integral", "nms"))
    command = {
        "ends": (sys.executable, "-c", "raise SystemExit('CUDA error: out of memory')"),
        "silent": (sys.executable, "-c", "import time; time.sleep(600)"),
        "none": (str(tmp_path / "missing"),),
    }
    monkeypatch.setattr(kernel_check_process, "_COMMAND", command[fault])
    monkeypatch.setattr(kernel_check_process, "START_LIMIT", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gfl_ops.self_check("cpu")
    assert {v.status for v in report.verdicts} == {SKIPPED} and len(report.verdicts) >= 2


def test_a_verdict_is_used_by_the_next_process_and_asked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path, "pass", ("nms",))
    first = kernel_check.ensure_checked("cpu")
    assert len(first) == 1
    monkeypatch.setattr(kernel_check_process, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert kernel_check.ensure_checked("cpu") == first


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFL_OPS_SELF_CHECK", "0")
    monkeypatch.setattr(kernel_check_process, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert kernel_check.ensure_checked("cpu") == []
    assert kernel_check.stored("cpu") is None


def test_a_damaged_verdict_is_none(tmp_path: Path) -> None:
    folder = kernel_check._folder()
    assert folder == tmp_path / "cache" / "gfl_ops"
    path = folder / kernel_check._file("cpu")
    for text in (
        "",
        "{",
        "[]",
        '{"device": "cpu"}',
        json.dumps({"device": 1, "machine": {}, "verdicts": [1], "seconds": 0}),
    ):
        path.write_text(text)
        assert kernel_check.stored("cpu") is None


def read_only_home(tmp_path: Path) -> dict[str, str]:
    """Variables of a home that nobody can write, with a folder for temporary files beside it."""
    # A file where the folder would be: root may write into read-only folders.
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    return {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}


def test_a_read_only_home_leaves_the_verdict_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in read_only_home(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)
    plant(monkeypatch, tmp_path, "pass", ("nms",))
    first = kernel_check.ensure_checked("cpu")
    assert len(first) == 1 and first[0].ok
    assert [file.parent.parent for file in tmp_path.rglob("self_check_cpu_*.json")] == [tmp_path / "tmp"]
    monkeypatch.setattr(kernel_check_process, "_COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert kernel_check.ensure_checked("cpu") == first


def test_without_any_folder_the_verdict_lasts_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Path(read_only_home(tmp_path)["XDG_CACHE_HOME"]) / "gfl_ops"
    monkeypatch.setattr(kernel_check, "_folders", lambda: [nowhere])
    plant(monkeypatch, tmp_path, "pass", ("nms",))
    assert [report.ok for report in kernel_check.ensure_checked("cpu")] == [True]
    monkeypatch.setenv("LOCAL_RANK", "1")  # nobody can leave it a verdict, so it does not wait for one
    assert kernel_check.ensure_checked("cpu") == []


@pytest.mark.parametrize("home", ["own", "read-only"])
def test_eight_processes_check_once(home: str, tmp_path: Path) -> None:
    variables = read_only_home(tmp_path) if home == "read-only" else {}
    script = tmp_path / "one_of_eight.py"
    script.write_text(
        textwrap.dedent("""
        from gfl_ops import kernel_check, kernel_check_process
        every = kernel_check_process.cases
        kernel_check_process.cases = lambda device: [c for c in every(device) if c[0].stem == "nms"]
        (report,) = kernel_check.ensure_checked("cpu")
        assert report.ok
        """)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
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
    name = kernel_check._file("cpu")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert kernel_check._file("cpu") != name


def test_every_operator_has_a_large_case() -> None:
    for spec in SPECS.values():
        small = max(elements(s.args) for s in spec.samples(CPU, spec.dtypes[0], torch.Generator().manual_seed(0)))
        large = max(elements(s.args) for s in spec.large(CPU, spec.dtypes[0], torch.Generator().manual_seed(0)))
        assert large > small, spec.stem


@pytest.mark.parametrize("stem", [stem for stem, spec in SPECS.items() if spec.one_pass])
@pytest.mark.parametrize("wrong", [False, True])
def test_the_kernels_that_give_loss_and_gradient_are_checked(
    stem: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their operators have them; the public functions call no others."""
    called = []
    finish = grad_in_forward.GradInForward.backward

    def backward(ctx: Any, *arriving: Any) -> Any:
        called.append(ctx.kernels)
        found = finish(ctx, *arriving)
        return tuple(g * 1.01 if wrong and isinstance(g, torch.Tensor) else g for g in found)

    monkeypatch.setattr(grad_in_forward.GradInForward, "backward", staticmethod(backward))
    verdict = kernel_check_process._check(SPECS[stem], "native", "cpu", lambda **message: None)
    assert called and verdict["status"] == (WRONG if wrong else OK), verdict


def test_the_subprocess_imports_this_package_wherever_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gfl_ops").mkdir()
    (tmp_path / "gfl_ops" / "__init__.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    every = kernel_check_process.cases
    monkeypatch.setattr(kernel_check_process, "cases", lambda device: [c for c in every(device) if c[0].stem == "nms"])
    assert gfl_ops.self_check("cpu").ok


# --- on GPUs, stood in for -------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two GPUs of one kind and one of another, and what was checked on them, which a subprocess never is."""
    checked: list[str] = []
    names = ["Fake", "Fake", "Other"]

    def run(device: str) -> tuple[Verdict, ...]:
        checked.append(device)
        return (Verdict("qfl", "native", WRONG, 0.5, "result 0: 1 of 129 wrong"),)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(kernel_check_process, "run", run)
    monkeypatch.setattr(kernel_check, "_asked", False)
    monkeypatch.setattr(backends, "_gpu_is_new", True)
    monkeypatch.setattr(extension, "why_not_on_gpus", lambda: None)
    monkeypatch.delenv("GFL_OPS_SELF_CHECK", raising=False)
    for stem in SPECS:
        backends._AUTOMATIC[stem, "cuda"] = "native"
    return checked


def test_one_gpu_of_each_kind_is_checked_once(gpus: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert kernel_check.devices() == ["cpu", "cuda:0", "cuda:2"]
    with pytest.warns(RuntimeWarning, match="native kernel of qfl is not used on cuda"):
        kernel_check.ensure_checked()
    assert gpus == ["cuda:0", "cuda:2"]
    said = capfd.readouterr().err
    assert "checking the kernels on Fake sm_90, once" in said and "not right: qfl; `gfl doctor --check`" in said
    for device in (None, "cuda", "cuda:1", "cuda:2"):
        kernel_check.ensure_checked(device)
    assert len(gpus) == 2 and capfd.readouterr().err == ""


def test_an_import_only_says_how_to_check_and_uses_what_is_known(gpus: list[str]) -> None:
    with pytest.warns(RuntimeWarning, match="not yet checked on (Fake|Other) sm_90; `gfl doctor --check`") as said:
        assert backends.serving("qfl", "cuda") == "native"
    assert len(said) == 2 and gpus == []  # one for each kind of GPU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.serving("qfl", "cuda")


def test_a_verdict_that_is_there_is_used_at_the_first_call(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="not used on cuda"):
        kernel_check.ensure_checked()
    monkeypatch.setattr(kernel_check, "_asked", False)  # as in a later process
    backends._DISTRUSTED.clear()
    backends._AUTOMATIC["qfl", "cuda"] = "native"
    with pytest.warns(RuntimeWarning, match=r"native kernel of qfl is not used on cuda.*please report") as warned:
        assert backends.serving("qfl", "cuda") != "native"
    assert len(warned) == 1 and len(gpus) == 2


def test_other_ranks_take_the_first_ones_verdict(gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with monkeypatch.context() as impatient:
        for name in ("START_LIMIT", "WHOLE_LIMIT"):
            impatient.setattr(kernel_check_process, name, 0.0)
        assert kernel_check.ensure_checked("cuda:1") == [] and gpus == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.warns(RuntimeWarning, match="not used on cuda"):
        first = kernel_check.ensure_checked("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert kernel_check.ensure_checked("cuda:1") == first and gpus == ["cuda:0"]


def test_a_wrong_kernel_of_the_cpu_is_known_to_the_next_import(tmp_path: Path) -> None:
    verdicts = (Verdict("qfl", "native", WRONG, 0.5, "result 0: 1 of 129 wrong"),)
    folder = kernel_check._folder()
    assert folder is not None
    report = Report("cpu", kernel_check.machine("cpu"), verdicts, 0.5)
    (folder / kernel_check._file("cpu")).write_text(report.to_json())
    code = "from gfl_ops.core import backends; print(backends.serving('qfl', 'cpu'))"
    for off, backend in (("1", "reference"), ("0", "native")):
        environment = {**os.environ, "GFL_OPS_SELF_CHECK": off}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, cwd=tmp_path
        )
        assert done.stdout.strip() == backend, done.stderr
        assert ("please report" in done.stderr) == (backend == "reference")


def test_a_report_survives_json() -> None:
    report = Report("cpu", {"device": "CPU"}, (Verdict("qfl", "native", OK, 0.5),), 1.5)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["ok"] is True


@pytest.mark.parametrize("device", ["meta", "cuda:0"])
def test_a_device_that_cannot_be_checked_is_refused(device: str) -> None:
    if device == "cuda:0" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"gfl_ops.self_check: `device` must be"):
        gfl_ops.self_check(device)
