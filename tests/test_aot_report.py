# SPDX-License-Identifier: Apache-2.0
"""The report of kernels compiled ahead of time: what it reads off ptxas, and one run of each compiler."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmark_modules
import pytest

from gfl_ops.core import backends

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "aot_report.py"

# One entry that spills and one that doesn't, with a function that is no entry between them.
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3gfl4cuda10qfl_kernelIfLi4EEEvi' for 'sm_90'
ptxas info    : Function properties for _ZN3gfl4cuda10qfl_kernelIfLi4EEEvi
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 256+128 bytes smem, 9 bytes cmem[0]
ptxas info    : Function properties for helper
    640 bytes stack frame, 999 bytes spill stores, 999 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 400 bytes cmem[0]
"""


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("aot_report", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot_report"] = module
    with benchmark_modules.imported():
        spec.loader.exec_module(module)
        yield module


def test_what_ptxas_says_is_read(report: ModuleType) -> None:
    assert report.parse_ptxas(PTXAS) == {
        "_ZN3gfl4cuda10qfl_kernelIfLi4EEEvi": {"registers": 168, "spill": 20, "stack": 16, "shared": 256},
        "plain": {"registers": 24, "spill": 0, "stack": 0, "shared": 0},
    }


def test_what_machine_code_does_is_counted(report: ModuleType) -> None:
    code = "LDG.E.128.CONSTANT R4 ; @P0 LDG.E.EF.128 R8; LDG.E.64 R2 ; LDG.E R1; STL.128 [R1], R4 ; LDL R3 ; LDL.U16 R5"
    assert report.count_instructions(code) == (2, 3)
    assert report.local_bytes(code) == 16 + 4 + 2


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("plain", "plain"),
        ("void gfl::cuda::(anonymous namespace)::k<float, 4>(gfl::QflInput, float*)", "k<float, 4>"),
        ("void gfl::cuda::k<__half, (bool)1, gfl::Term<(int)2> >(int)", "k<__half, 1, Term<2> >"),
        ("gfl::cuda::two(int (*)(int), float)", "two"),
    ],
)
def test_names_are_shortened(report: ModuleType, demangled: str, short: str) -> None:
    assert report.shortened(demangled) == short


def test_a_spill_in_a_real_call_fails(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(spill: int) -> list[Any]:
        return [report.Kernel("cuda", name, "sm_90", 255, spill, 16, 0) for name in ("decode_kernel", "walk<float>")]

    options = ["--only", "cuda", "--arch", "9.0", "--out", str(tmp_path / "new" / "report.json")]
    monkeypatch.setattr(report, "compile_cuda", lambda source, arch, sass: found(0) if source.stem == "nms" else [])
    assert report.main(options) == 0
    monkeypatch.setattr(report, "compile_cuda", lambda source, arch, sass: found(20) if source.stem == "nms" else [])
    assert report.main(options) == 1
    captured = capsys.readouterr()
    assert captured.err.count("spills 20 bytes on sm_90") == 2
    odd = [report.Kernel("triton", "sample", "sm_90", 72, 8, 8, 0, real=False)]
    monkeypatch.setattr(report, "compile_cuda", lambda source, arch, sass: odd)
    assert report.main(options[:4]) == 0
    assert all(80 <= len(line) <= 120 for line in captured.out.splitlines() if line.startswith("cuda"))
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert [k["name"] for k in written["kernels"]] == ["decode_kernel", "walk<float>"]


def test_occupancy_follows_from_registers(report: ModuleType) -> None:
    """65536 registers per SM, allocated to warps in units of 256; 64 warps at most, 48 on consumer GPUs."""
    found = [report.Kernel("cuda", "k", arch, registers, 0, 0, 0) for arch, registers in
             (("sm_90", 32), ("sm_90", 33), ("sm_90", 128), ("sm_90", 255), ("sm_89", 40), ("sm_89", 80))]  # fmt: skip
    assert [k.occupancy for k in found] == [1, 51 / 64, 16 / 64, 8 / 64, 1, 25 / 48]
    text = report.written(found, False, markdown=True)
    assert "80%" in text and "no GPU has run them" in text
    assert json.loads(report.written(found, False, markdown=False))["kernels"][2]["occupancy"] == 0.25


def test_a_missing_compiler_is_reported(
    report: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "find_nvcc", lambda: None)
    assert report.main(["--only", "cuda", "--arch", "90", "--kernels", "score"]) == 2
    assert "no nvcc" in capsys.readouterr().err


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=env | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def triton() -> ModuleType:
    reason = backends.why_no_triton()
    if reason is not None:
        pytest.skip(reason)
    return importlib.import_module("triton")


def test_triton_kernels_compile_without_a_gpu(triton: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = run(
        "--only", "triton", "--arch", "90", "--dtype", "bfloat16", "--kernels", "^score", "--sass",
        "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert all(k["arch"] == "sm_90" and 0 < k["registers"] <= 255 for k in kernels)
    # What users call does not spill; ptxas keeps 8 bytes of one kernel that only a sample of the tests calls.
    assert not [k["name"] for k in kernels if k["spill"] > (0 if k["real"] else 8)]
    # What a training step runs, of every loss of the family, and the flags that only tests set.
    calls = {k["name"].split("<bfloat16, ")[1].rstrip(">") for k in kernels}
    assert calls >= {"qfl", "focal", "vfl", "qfl unreduced"} and any("activated" in call for call in calls)
    # 80 bf16 classes in tiles of 16: rows begin at multiples of 16 bytes, and are read so.
    assert max(k["loads_16"] for k in kernels if k["name"].endswith("<bfloat16, qfl>")) >= 5


def test_an_interpreting_process_is_refused(triton: ModuleType) -> None:
    done = run("--only", "triton", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr


def test_cuda_kernels_compile_without_a_gpu(report: ModuleType, tmp_path: Path) -> None:
    if report.find_nvcc() is None:
        pytest.skip("no nvcc")
    out = tmp_path / "report.json"
    done = run("--only", "cuda", "--arch", "sm_90", "--kernels", "^score$", "--out", str(out))
    assert done.returncode == 0, done.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert kernels and all(k["name"].startswith("score_") and k["registers"] > 0 for k in kernels)


def test_what_needs_sm_80_has_a_form_for_sm_75(report: ModuleType) -> None:
    if report.find_nvcc() is None:
        pytest.skip("no nvcc")
    kernels = report.compile_cuda(SCRIPT.parents[1] / "csrc" / "cuda" / "atss.cu", "75", sass=False)
    assert {k.name for k in kernels} == {"atss_candidates_kernel", "atss_unpack_kernel"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_bin_compiles(report: ModuleType, triton: ModuleType, dtype: str) -> None:
    """Triton makes a Python int of an integer argument that is 1, which has no method `to`."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gfl_ops.triton import bins
    from gfl_ops.triton import launch as launcher

    if launcher.INTERPRETS:
        pytest.skip("a process with TRITON_INTERPRET=1 can't compile")
    pair = torch.zeros(2, 5, 1, dtype=getattr(torch, dtype)).unbind()
    with launcher.record() as launches:
        bins.ld_backward(bins.ld_forward(*pair, 2.0), *pair, 2.0, [True])
    assert len(launches) == 2
    for each in launches:
        *specialised, options = report.specialised(each)
        triton.compile(ASTSource(each.kernel, *specialised), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("stem", ["nms", "decode"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decisions_are_made_without_fused_arithmetic(
    report: ModuleType, triton: ModuleType, stem: str, dtype: str
) -> None:
    """Equal indices on all backends need every product and quotient rounded once."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gfl_ops.core.registry import SPECS
    from gfl_ops.triton import launch as launcher

    if launcher.INTERPRETS:
        pytest.skip("a process with TRITON_INTERPRET=1 can't compile")
    if getattr(torch, dtype) not in SPECS[stem].dtypes:
        pytest.skip(f"{stem} does not take {dtype}")
    launch = report.launches_of(stem, getattr(torch, dtype))[0][1]
    *specialised, options = report.specialised(launch)
    assert options["enable_fp_fusion"] is False
    ptx = triton.compile(ASTSource(launch.kernel, *specialised), target=GPUTarget("cuda", 90, 32), options=options).asm[
        "ptx"
    ]
    width = dtype.removeprefix("float")
    # `exp` has fused steps of its own, in fp64; where a box is decided there are none.
    if stem == "nms":
        assert "fma." not in ptx
        assert f"div.rn.f{width}" in ptx and "div.full" not in ptx and "rcp" not in ptx
    else:
        assert f"mul.f{width}" in ptx or f"mul.rn.f{width}" in ptx
        assert dtype == "float64" or "fma.rn.f32" not in ptx
