# SPDX-License-Identifier: Apache-2.0
"""A newcomer's way through the commands, typical mistakes and all: from each labelling tool's export to detections."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import layout_writers as written
import pytest

from gfl import cli
from gfl.config import Config

Said = Callable[..., str]
Small = Callable[..., Config]
# Nothing that a newcomer reads has these.
FOREIGN = re.compile(r"Traceback|\[Errno|<_io|gfl \w+: gfl|Error:")
# Of a network and a training that take a moment.
QUICK = [
    *("--config", "gfl_tiny", "--width", "8", "--neck-channels", "8", "--head-channels", "8", "--head-groups", "2"),
    *("--short-side", "64", "--long-side", "64", "--train-short-side", "64,64", "--train-long-side", "64"),
    *("--workers", "0", "--batch-size", "2", "--device", "cpu", "--log-steps", "1"),
]


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Runs a command, and gives all that it says."""

    def run(*words: str, status: int = 0) -> str:
        try:
            ended = cli.main(list(words))
        except SystemExit as end:
            ended = end.code
        text = "".join(capfd.readouterr())
        assert ended == status, text
        assert not FOREIGN.search(text), text
        return text

    return run


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_a_terminal(command: str, said: Said) -> None:
    text = said(command, "--help")
    assert text.startswith(f"usage: gfl {command}") and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", written.WRITERS)
def test_an_export_is_looked_at_and_trained_on(name: str, said: Said) -> None:
    Path("mine").mkdir()
    data = str(written.WRITERS[name](Path("mine").resolve()))
    looked = said("data", data, "--sheet", "")
    assert "ball" in looked and "cup" in looked and max(map(len, looked.splitlines())) <= 80 + len(data)
    train = ["train", *QUICK, "--data", data, "--out", "run", "--backbone-weights", "none", "--steps", "2"]
    assert "AP" in said(*train)
    assert Path("run/report.html").exists() and Path("run/last.pt").exists()


def test_the_whole_way(said: Said) -> None:
    Path("mine").mkdir()
    written.yolo_images_labels(Path("mine"))
    Path("other").mkdir()
    written.voc(Path("other"))
    for file in Path("other").rglob("*.xml"):
        file.write_text(file.read_text().replace(">cup<", ">mug<"))
    Path("empty").mkdir()
    more = ["--backbone-weights", "none"]

    # The data: a folder that isn't there, one without anything, then the right one.
    assert "min" in said("data", "min", status=1)
    assert "annotations" in said("data", "empty", status=1)
    assert "no problems" in said("data", "mine")
    assert Path("data_sheet.jpg").exists()

    # The training: what is missing, misspelt or not there is named.
    assert "--out" in said("train", "--data", "mine", status=2)
    assert "did you mean `--epochs`?" in said("train", "--out", "run", "--epochss", "3", status=2)
    assert "--config must be given" in said("train", "--data", "mine", "--out", "run", status=1)
    assert "gfl_tiny" in said("train", "--config", "gfl_tinny", "--data", "mine", "--out", "run", status=1)
    r18 = ["--config", "gfl_r18_1x", "--device", "cpu", "--data", "mine", "--out", "run"]
    assert "`backbone_weights` must be given" in said("train", *r18, status=1)
    wrong = {"--device": "cuda:7", "--epochs": "many", "--augment": "colour", "--lr": "-1"}
    for option, value in wrong.items():
        text = said("train", *QUICK, "--data", "mine", "--out", "run", *more, option, value, status=1)
        assert value in text and option.lstrip("-") in text
    assert "mined" in said("train", *QUICK, "--data", "mined", "--out", "run", *more, status=1)
    assert "no training to resume" in said("train", "--out", "nothing", "--resume", status=1)

    # It is stopped by SIGTERM, is not begun again by mistake, and resumes to its end.
    words = ["train", *QUICK, "--recipe", "finetune", "--data", "mine", "--out", "run", *more]
    stopped_at_once(words, Path("run/steps.csv"))
    assert "run holds a training: resume it" in said(*words, "--epochs", "2", status=1)
    steps = len(Path("run/steps.csv").read_text().splitlines())
    assert "AP" in said("train", "--out", "run", "--resume", "--epochs", str(steps // 2 + 2))
    assert Path("run/report.html").read_text().count("<img") >= 2
    best = "run/best.pt" if Path("run/best.pt").exists() else "run/last.pt"

    # The evaluation: a checkpoint that isn't there, other classes, the right ones.
    assert "run/bets.pt: no such file" in said("eval", "run/bets.pt", "--data", "mine", status=1)
    assert "'mug'" in said("eval", best, "--data", "other", "--workers", "0", status=1)
    assert "AP" in said("eval", best, "--data", "mine", "--workers", "0", "--per-class", "--device", "cpu")
    assert "not a checkpoint" in said("eval", "mine/data.yaml", "--data", "mine", status=1)

    # The export: a format that there isn't, a file that is there.
    assert "must end in .onnx" in said("export", best, "--out", "detector.engine", status=1)
    export = ["export", best, "--out", "detector.pt2", "--format", "torch-export", "--outputs", "decoded"]
    assert "images [1, 3, 64, 64]" in said(*export)
    assert "--overwrite" in said(*export, status=1)

    # The detection: no image, no such folder, a class that the model doesn't know, the right way.
    Path("mine/notes.txt").write_text("no image")
    assert "notes.txt" in said("detect", best, "mine/notes.txt", status=1)
    assert "fotos" in said("detect", best, "fotos", status=1)
    assert "no image" in said("detect", best, "empty", status=1)
    assert "did you mean" in said("detect", best, "mine/images/val", "--classes", "bal", status=1)
    assert "unreadable" in said("detect", best, "mine/images/val", "--score", "0.01", "--out", "found")
    assert Path("found/detections.json").exists() and Path("found/d.jpg").exists()


def stopped_at_once(words: list[str], log: Path) -> None:
    """Sends SIGTERM to a training's group after its first steps."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gfl.cli", *words, "--epochs", "100000", "--eval-every", "0"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 400
    while not log.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=400)
    assert process.returncode == 130 and "stopped after step" in text and not FOREIGN.search(text), text


def test_the_report_in_a_browser(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    from gfl.engine.report import TITLES
    from gfl.engine.train import train

    train(small(epochs=4, lr_drops=(), lr=0.1), tmp_path / "run", device="cpu")
    problems: list[str] = []
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1000, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("request", lambda one: problems.append(one.url) if not one.url.startswith(("file:", "data:")) else None)
        page.goto((tmp_path / "run" / "report.html").as_uri(), wait_until="load")
        widths = page.evaluate("[...document.images].map((image) => image.complete ? image.naturalWidth : 0)")
        assert len(widths) == len(TITLES) and min(widths) > 200
        # Nothing is cut off at the right.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
        chromium.close()
    assert problems == []
