# SPDX-License-Identifier: Apache-2.0
"""The README and the documentation say what is true: code runs, commands are understood, tables are the registry's."""

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
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    text = document.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def block(name: str, language: str, part: str) -> str:
    """The one block of a document that has this text."""
    (found,) = (code for code in blocks(ROOT / name, language) if part in code)
    return found


# The subcommands with their options, without what starts several processes.
COMMANDS = [
    pytest.param(line, id=f"{document.stem}: {line}"[:80])
    for document in DOCUMENTS
    for line in re.findall(
        r"^(?:torchrun .*? -m gfl\.cli|gfl) (.+)$",
        "".join(blocks(document, "sh")).replace("\\\n", " "),
        flags=re.MULTILINE,
    )
]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_python_is_valid(document: Path) -> None:
    for code in blocks(document, "python"):
        compile(code, str(document), "exec")


def test_the_first_lines_run(seed: int) -> None:
    names: dict[str, object] = {}
    exec(f"import torch\ntorch.manual_seed({seed})\n" + block("README.md", "python", "quality_focal_loss"), names)
    assert names["pred"].grad.isfinite().all()  # type: ignore[attr-defined]
    assert 0 < len(names["keep"]) <= 30  # type: ignore[arg-type]


def test_the_drop_in_lines_run() -> None:
    given = """
import torch
cls_score, labels, scores = torch.randn(7, 80), torch.full((7,), 80), torch.zeros(7)
label_weights, num_total_samples = torch.ones(7), 1
"""
    names: dict[str, object] = {}
    exec(given + block("docs/drop-in.md", "python", "loss_cls = "), names)
    assert float(names["loss"]) > 0  # type: ignore[arg-type]


def test_the_detector_s_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first.jpg", "second.jpg"):
        pixels = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    exec(block("README.md", "python", "create_model"), {})
    assert Image.open(tmp_path / "found.png").size == (80, 60)


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(block("docs/training.md", "toml", "[train]"))
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
    options = cli.parser().parse_args(shlex.split(line, comments=True))
    if line.startswith("train") and options.config and Path(options.config).suffix == "":
        config.overrides(config.preset(options.config), options)


def test_the_tables_are_current() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "doc_tables.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "path",
    [
        *("benchmarks/bench_losses.py", "benchmarks/bench.py"),
        *("scripts/gpu_record.py", "scripts/aot_report.py", "scripts/build_wheels.py", "scripts/doc_tables.py"),
    ],
)
def test_every_script_has_help(path: str) -> None:
    result = subprocess.run([sys.executable, str(ROOT / path), "--help"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
