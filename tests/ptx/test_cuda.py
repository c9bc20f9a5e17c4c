# SPDX-License-Identifier: Apache-2.0
"""The C++ tests of the launchers with the CUDA kernels as PTX, and how much of each kernel they reach."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("on_ptx", reason="needs the plugin and the engine: see tests/ptx/on_ptx.py")

# What the engine reports of a kernel by design.
BY_DESIGN = {"overlap_kernel": "a block may clear a bit that another reads: either way the box is decided later"}
REACHED = 0.95
# Kernels of which less is reached, by their name: how much has to be, and what no test can reach or is not worth one.
_POW = "the library's power of infinities, NaN and negative numbers, which no base is"
_SINE = "the library's sine of angles beyond any a box has"
_DIVISION = "64-bit division of sizes beyond 2^32"
_REST = "remainders of unrolled loops, in copies for a layout, a dtype or an option"
LESS = {
    r"score_\w+_kernel<.*General<": (0.8, _POW),
    r"gfl_loss_tile_kernel<.*General<RtmdetHead": (0.67, _POW),
    r"gfl_loss_tile_kernel<.*General<": (0.72, _POW),
    r"gfl_loss_tile_kernel<.*FastPath<": (0.93, _DIVISION),
    r"task_aligned_(candidates|resolve)_kernel": (0.87, _POW),
    r"iou_\w+_kernel<double, iou_kind::siou>": (0.8, _SINE),
    r"(bins_\w+_kernel<double, Dfl|multiclass_count_kernel)": (0.92, _DIVISION),
    r"group_norm_relu_\w+_kernel": (0.89, _REST),
    r"postprocess_(select|finish)_kernel": (0.93, _DIVISION + "; " + _REST),
}
TIMEOUT = 900


@dataclass
class Coverage:
    """The instructions of a kernel, by the line of the PTX, that no test has run yet."""

    total: int
    missed: dict[int, str]

    @property
    def share(self) -> float:
        return 1 - len(self.missed) / self.total


@dataclass
class Outcome:
    status: int
    output: str
    warnings: list[str]
    coverage: dict[str, Coverage]
    idle: set[str]


COVERAGE: dict[str, Coverage] = {}
IDLE: set[str] = set()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "program" in metafunc.fixturenames:
        programs = sorted(metafunc.config.getoption("ptx_build").glob("*_ptx"))
        assert programs, "nothing is built: cmake -DGFL_PTX_ON_HOST=ENGINE, then the target `ptx`"
        metafunc.parametrize("program", programs, ids=lambda p: p.name.removesuffix("_ptx"))


@pytest.fixture
def ptx(request: pytest.FixtureRequest) -> Path:
    """The folder of the PTX files."""
    return request.config.getoption("ptx_build") / f"sm_{request.config.getoption('ptx_arch')}"


def run(program: Path, ptx: Path, seed: int) -> Outcome:
    environment = {**os.environ, "POH_PTX": str(ptx), "POH_SEED": str(seed), "POH_COVERAGE": "2"}
    environment["GFL_TEST_SEED"] = str(seed)
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    lines = done.stderr.splitlines()
    warnings = [line for line in lines if line.startswith(("RACE", "UNSET"))]
    warnings = [line for line in warnings if not any(name in line for name in BY_DESIGN)]
    rest = [line for line in lines if not line.startswith(("RACE", "UNSET", "COVERAGE", "NOT RUN", "line "))]
    output = "\n".join([done.stdout, *rest, *warnings[:20]])
    idle = {line.removeprefix("NOT RUN ") for line in lines if line.startswith("NOT RUN ")}
    return Outcome(done.returncode, output, warnings, dict(coverage_in(lines)), idle)


def coverage_in(lines: list[str]) -> Iterator[tuple[str, Coverage]]:
    """What the engine prints of each kernel, and of each instruction that did not run."""
    current = Coverage(0, {})
    for line in lines:
        if found := re.match(r"COVERAGE (.*) \| \d+ launches \| \d+ of (\d+) instructions", line):
            current = Coverage(int(found[2]), {})
            yield found[1], current
        elif found := re.match(r"line (\d+): (.*)", line):
            current.missed[int(found[1])] = found[2]


def test_it_passes(program: Path, ptx: Path, seed: int) -> None:
    outcome = run(program, ptx, seed)
    assert outcome.status == 0, outcome.output
    assert not outcome.warnings, outcome.output
    for kernel, coverage in outcome.coverage.items():
        known = COVERAGE.setdefault(kernel, coverage)
        known.missed = {line: text for line, text in known.missed.items() if line in coverage.missed}
    IDLE.update(outcome.idle)


def test_every_kernel_is_reached(request: pytest.FixtureRequest) -> None:
    """By all programs together; what can't be reached is named in LESS, with the reason."""
    if request.config.option.keyword or "::" in "".join(request.config.args):
        pytest.skip("part of the tests runs")
    assert not IDLE - set(COVERAGE), f"kernels that no test launches: {sorted(IDLE - set(COVERAGE))}"
    short = []
    for kernel, coverage in sorted(COVERAGE.items(), key=lambda item: item[1].share):
        floor, why = next((value for name, value in LESS.items() if re.search(name, kernel)), (REACHED, ""))
        if coverage.share < REACHED:
            print(f"{coverage.share:.1%} of {kernel}: {why}")
        if coverage.share < floor:
            examples = "\n    ".join(list(coverage.missed.values())[:12])
            short.append(f"{coverage.share:.1%} instead of {floor:.0%} of {kernel}\n    {examples}")
    assert not short, "\n".join(short)


@pytest.mark.parametrize("name", ["integral", "multiclass_nms"])
def test_a_planted_fault_is_noticed(name: str, request: pytest.FixtureRequest, ptx: Path, tmp_path: Path) -> None:
    """16-byte accesses moved by 4 bytes, and barriers left out, one at a time in what the program runs."""
    program = request.config.getoption("ptx_build") / f"{name}_ptx"
    file = "bins.ptx" if name == "integral" else f"{name}.ptx"
    lines = (ptx / file).read_text().splitlines()
    missed = {line for c in run(program, ptx, 0).coverage.values() for line in c.missed}
    kernel, places = "", []
    for i, line in enumerate(lines):
        if found := re.search(r"\.entry (\w+)", line):
            kernel = found[1]
        launched = name != "integral" or "Integral" in kernel
        if launched and i + 1 not in missed and re.match(r"\s*bar\.sync", line):
            places.append((i, ""))
        if launched and re.search(r"\bst\.global\.u64\b", line):
            places.append((i, re.sub(r"\[(%\w+)\]", r"[\1+4]", line)))
    assert places
    noticed = 0
    for other in ptx.glob("*.ptx"):
        if other.name != file:
            (tmp_path / other.name).symlink_to(other.resolve())
    chosen = places[:: max(1, len(places) // 6)]
    for i, instead in chosen:
        (tmp_path / file).write_text("\n".join([*lines[:i], instead, *lines[i + 1 :]]))
        outcome = run(program, tmp_path, 0)
        noticed += bool(outcome.status or outcome.warnings)
    # A barrier that is left out may order nothing: that after rows which each thread fetches for itself.
    assert noticed * 2 >= len(chosen)
