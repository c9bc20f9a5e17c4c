# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' run-time choice of the instruction set: each is held to the contract of the operators."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gfl_ops.core import extension

ROOT = Path(__file__).resolve().parent.parent
MODULE = extension.EXTENSION.module
ISAS = ("portable", "avx2", "avx512")
# What is compiled once for each instruction set.
STEMS = sorted(path.stem for path in (ROOT / "csrc" / "cpu" / "simd").glob("*.cpp"))

pytestmark = pytest.mark.skipif(MODULE is None, reason="the compiled extension is not there")


def used(isa: str) -> str:
    code = "from gfl_ops.core import extension; print(extension.EXTENSION.module.cpu_isa())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, cwd=ROOT / "tests", env=environment(isa),
    )  # fmt: skip
    return result.stdout.strip()


def environment(isa: str) -> dict[str, str]:
    return dict(os.environ, GFL_OPS_CPU_ISA=isa)


def test_a_narrower_instruction_set_can_be_asked_for() -> None:
    widest = ISAS.index(used("the widest"))
    for i, isa in enumerate(ISAS):
        assert used(isa) == ISAS[min(i, widest)]


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_it_keeps_the_contract(isa: str, seed: int) -> None:
    """The widest one is what every other test runs on."""
    chosen = f"native-cpu and agrees and ({' or '.join(STEMS)})"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "test_op_contract.py"), "-k", chosen],
        capture_output=True, text=True, timeout=900, cwd=ROOT / "tests",
        env=environment(isa) | {"GFL_TEST_SEED": str(seed)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
