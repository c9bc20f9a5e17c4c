# SPDX-License-Identifier: Apache-2.0
"""The examples run as files from another folder, and print what they promise."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import gfl

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
    # The documentation's table, which is taken from the example, lists what patch() replaces.
    listed = re.search(
        r"^Replaces: (.*(?:\n {4}.*)*)", (EXAMPLES / name).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert listed
    promised = re.findall(r"`([\w.]+)`", listed[1])
    replaced = re.search(r"replaced by gfl_ops:\n((?:  \S+\n)+)", printed)
    assert replaced
    names = replaced[1].split()
    if "mmyolo." not in replaced[1]:  # not installed, or it refuses the installed mmcv
        promised = [one for one in promised if not one.startswith("Batch")]
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
    # A rounding may move an object to another location, which the later steps grow.
    assert ours[:4] == pytest.approx(theirs[:4], rel=1e-3) and ours == pytest.approx(theirs, rel=2e-2)


def test_a_fleet_s_batches(tmp_path: Path) -> None:
    """The class that Ray Data would run, and what is asked of Ray."""
    files = {name: tmp_path / name for name in ("x.pt", "photo.png", "ray.py", "asked.json")}
    config = gfl.preset("gfl_tiny").replace(num_classes=2, width=8, neck_channels=8, head_channels=8, head_groups=2)
    gfl.Detector(gfl.models.build(config.model, config.test), classes=["cup", "cat"]).save(files["x.pt"])
    Image.new("RGB", (40, 30), (200, 90, 30)).save(files["photo.png"])
    files["ray.py"].write_text(RAY)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_batch.py"), files["x.pt"], files["photo.png"], files["asked.json"]],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(files["asked.json"].read_text())
    assert rows["path"] == ["a", "b", "c"] and [bool(text) for text in rows["error"]] == [False, True, False]
    assert rows["detections"][0] == rows["detections"][2] and json.loads(rows["detections"][1]) == []


# Ray's part, with the given file, a broken one and the file again as one batch.
RAY = """
import json
from types import SimpleNamespace


class Data:
    def __init__(self, file):
        content = open(file, "rb").read()
        self.batch = {"path": ["a", "b", "c"], "bytes": [content, b"broken", content]}

    def map_batches(self, kind, fn_constructor_args, batch_size, num_gpus, concurrency):
        self.batch = kind(*fn_constructor_args)(self.batch)
        return self

    def write_json(self, target):
        json.dump(self.batch, open(target, "w"))


data = SimpleNamespace(read_binary_files=lambda source, include_paths: Data(source))
"""


def test_every_example_is_run() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("test_*.py"))
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))
