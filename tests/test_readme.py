# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its code runs, its table is the registry's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_lines_run(seed: int) -> None:
    names: dict[str, object] = {}
    exec(f"import torch\ntorch.manual_seed({seed})\n" + BLOCKS[0], names)
    assert names["pred"].grad.isfinite().all()  # type: ignore[attr-defined]
    assert 0 < len(names["keep"]) <= 30  # type: ignore[arg-type]


def test_the_drop_in_lines_run() -> None:
    given = """
import torch
cls_score, labels, scores = torch.randn(7, 80), torch.full((7,), 80), torch.zeros(7)
label_weights, num_total_samples = torch.ones(7), 1
"""
    names: dict[str, object] = {}
    exec(given + BLOCKS[1], names)
    assert float(names["loss"]) > 0  # type: ignore[arg-type]


def test_the_table_of_operators_is_the_registry() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", ["benchmarks/bench_losses.py", "scripts/gpu_suite.py", "scripts/aot_report.py"])
def test_every_script_has_help(path: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / path), "--help"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
