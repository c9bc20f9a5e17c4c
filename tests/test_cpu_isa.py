# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels' run-time choice of the instruction set: each is the same operator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gfl_ops import _extension

MODULE = _extension.EXTENSION.module
ISAS = ("portable", "avx2", "avx512")

CODE = """
import sys, torch, gfl_ops
from gfl_ops import _C
from gfl_ops._spec import SPECS
for spec in SPECS.values():
    if not gfl_ops._extension.serves(spec.forward_name, "cpu"):
        continue
    for dtype in (torch.float32, torch.bfloat16):
        if dtype not in spec.dtypes:
            continue
        for sample in spec.samples(torch.device("cpu"), dtype, torch.Generator().manual_seed(int(sys.argv[1]))):
            got, want = getattr(torch.ops.gfl, spec.forward_name)(*sample.args), spec.reference(*sample.args)
            for g, w in zip((got,) if torch.is_tensor(got) else got, (want,) if torch.is_tensor(want) else want):
                # Sums of up to 129 fp32 terms, each good to a few ulps.
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, equal_nan=True)
print(_C.cpu_isa())
"""


@pytest.mark.skipif(MODULE is None, reason="the compiled extension is not there")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_reference(isa: str, seed: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(seed)],
        capture_output=True, text=True, timeout=600, env=dict(os.environ, GFL_OPS_CPU_ISA=isa),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    used = result.stdout.split()[-1]
    widest = MODULE.cpu_isa() if "GFL_OPS_CPU_ISA" not in os.environ else ISAS[-1]
    assert used == isa or (used == widest and ISAS.index(widest) < ISAS.index(isa))


@pytest.mark.skipif(MODULE is None, reason="the compiled extension is not there")
def test_an_unknown_instruction_set_changes_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from gfl_ops import _C; print(_C.cpu_isa())"],
        capture_output=True, text=True, timeout=300, env=dict(os.environ, GFL_OPS_CPU_ISA="fast"),
    )  # fmt: skip
    assert result.stdout.strip() in ISAS
