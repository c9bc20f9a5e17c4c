# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its code runs, its table is the registry's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gfl import cli, config

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TEN_LINES, DETECTOR, DROP_IN = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
# The subcommands with their options, without what starts several processes.
COMMANDS = re.findall(
    r"^(?:torchrun .*? -m gfl\.cli|gfl) (.+)$",
    "".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " "),
    flags=re.MULTILINE,
)


def test_the_first_lines_run(seed: int) -> None:
    names: dict[str, object] = {}
    exec(f"import torch\ntorch.manual_seed({seed})\n" + TEN_LINES, names)
    assert names["pred"].grad.isfinite().all()  # type: ignore[attr-defined]
    assert 0 < len(names["keep"]) <= 30  # type: ignore[arg-type]


def test_the_drop_in_lines_run() -> None:
    given = """
import torch
cls_score, labels, scores = torch.randn(7, 80), torch.full((7,), 80), torch.zeros(7)
label_weights, num_total_samples = torch.ones(7), 1
"""
    names: dict[str, object] = {}
    exec(given + DROP_IN, names)
    assert float(names["loss"]) > 0  # type: ignore[arg-type]


def test_the_detector_s_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first.jpg", "second.jpg"):
        pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    exec(DETECTOR, {})
    assert Image.open(tmp_path / "found.png").size == (80, 60)


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)
    found = config.preset(str(tmp_path / "mine.toml"))
    assert found == config.Config().replace(
        data="mine",
        train_annotations="train.json",
        backbone_weights="torchvision",
        lr=0.005,
        train_short_side=(480, 800),
    )


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_are_understood(line: str) -> None:
    options = cli.parser().parse_args(shlex.split(line))
    if line.startswith("train") and not options.resume:
        config.overrides(config.preset(options.config), options)


def test_the_tables_are_the_registry_s_and_the_examples() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "path", ["benchmarks/bench_losses.py", "benchmarks/bench.py", "scripts/gpu_record.py", "scripts/aot_report.py"]
)
def test_every_script_has_help(path: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / path), "--help"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
