# SPDX-License-Identifier: Apache-2.0
"""The examples run as files from another folder, and print what they promise."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"


def run(name: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    """What the example prints. mmcv-lite has no compiled extension: mmdet_stub stands in for it where that is so."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(TESTS / 'support')!r});"
        "from peers import mmdet_stub; mmdet_stub.install();"
        f"sys.argv[1:] = {list(arguments)!r};"
        f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return result.stdout


def test_a_head_from_scratch_learns(tmp_path: Path) -> None:
    source = (EXAMPLES / "head_from_scratch.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    modules = {node.names[0].name if isinstance(node, ast.Import) else node.module
               for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert modules == {"torch", "gfl_ops"}
    overlap = re.search(r"in 16 new images: ([0-9.]+)", run("head_from_scratch.py", tmp_path))
    assert overlap and float(overlap[1]) > 0.6


def test_the_dialects(tmp_path: Path) -> None:
    printed = run("dialects.py", tmp_path)
    losses = [float(x) for x in re.findall(r" ([0-9.]+(?:e-?\d+)?)\b(?=[ \n])", printed)]
    assert len(losses) == 9 and all(x > 0 for x in losses)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "needs"),
    [("mmdet_gfl.py", "mmdet"), ("torchvision_fcos.py", "torchvision"), ("ultralytics_yolov8.py", "ultralytics")],
)
def test_a_framework(name: str, needs: str, tmp_path: Path) -> None:
    """Patched and unpatched have the same losses, up to the last digits."""
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed (tests/support/peers/requirements.txt)")
    printed = run(name, tmp_path, YOLO_OFFLINE="true", YOLO_CONFIG_DIR=str(tmp_path))
    assert "replaced by gfl_ops:" in printed and "detections:" in printed
    # The README's table, which is taken from the example, lists what patch() replaces.
    listed = re.search(
        r"^Replaces: (.*(?:\n {4}.*)*)", (EXAMPLES / name).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert listed
    promised = re.findall(r"`([\w.]+)`", listed[1])
    replaced = re.search(r"replaced by gfl_ops:\n((?:  \S+\n)+)", printed)
    assert replaced
    names = replaced[1].split()
    assert len(names) == len(promised)
    assert all(f".{label}".endswith(f".{end}") for label, end in zip(names, promised)), (names, promised)
    ours, theirs = (
        [float(x) for x in re.findall(r"[ \[](\d+\.\d+(?:e-?\d+)?)", line)]
        for line in printed.splitlines()
        if "loss" in line.split("with")[0] and "with " in line
    )
    assert len(ours) == len(theirs) >= 3
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.peers
def test_a_training_of_ultralytics(data: Path, tmp_path: Path) -> None:
    """On real photos: the losses of six steps are those of ultralytics."""
    if importlib.util.find_spec("ultralytics") is None:
        pytest.skip("ultralytics is not installed (tests/support/peers/requirements.txt)")
    folder = str(data / "coco_val2017_47")
    printed = run("ultralytics_train.py", tmp_path, folder, YOLO_OFFLINE="true", YOLO_CONFIG_DIR=str(tmp_path))
    assert ".v8DetectionLoss" in printed
    ours, theirs = (
        [float(x) for x in re.findall(r"[\[ ](\d+\.\d+)", line)]
        for line in printed.splitlines()
        if line.startswith("losses with")
    )
    assert len(ours) == len(theirs) == 6
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
