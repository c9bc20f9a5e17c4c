# SPDX-License-Identifier: Apache-2.0
"""What the command line says: help in 80 columns, errors in one form, the nearest option for an unknown one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import UnidentifiedImageError

from gfl import cli
from gfl.commands import export
from gfl.demo import course
from gfl.engine import distributed
from gfl.engine.distributed import choose_device
from gfl.files import error_text, reason


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["train", "--epoch-number", "3"], "gfl train: unknown option --epoch-number"),
        (["trian"], "; did you mean `train`?"),
        (["detect", "model.pt", "a.jpg", "--dtype", "bf61"], "; did you mean `bf16`?"),
        (["train", "--out", "x", "--epohcs=3"], "gfl train: unknown option --epohcs=3; did you mean `--epochs`?"),
        (
            ["export", "a.pt", "--out", "b", "--formt", "x"],
            "unknown option --formt; did you mean `--format`?",
        ),
        (["eval", "a.pt", "more", "words"], "gfl eval: too many arguments: more words"),
        (["demo", "--iterations", "many"], "gfl demo: argument --iterations: invalid int value: 'many'"),
    ],
)
def test_a_wrong_command_line_is_answered_by_its_command(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["--out", "run"] if words[0] == "train" and "--out" not in words else []
    with pytest.raises(SystemExit) as status:
        cli.main(words + required)
    said = capsys.readouterr().err
    assert status.value.code == 2
    own = f"gfl {words[0]} " if words[0] in cli.COMMANDS else "gfl [-h]"
    assert said.startswith(f"usage: {own}") and answer in said and "error:" not in said


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.pt"), "a.pt: no such file or directory"),
        (PermissionError(13, "Permission denied"), "permission denied"),
        (OSError("of its own words"), "of its own words"),
        (ValueError("gfl: `epochs` must be positive"), "`epochs` must be positive"),
        (ValueError("gfl demo: `iterations` must be"), "`iterations` must be"),
        (ValueError("gfl.TrainConfig: `epochs` must be"), "`epochs` must be"),
        (RuntimeError("gflops"), "gflops"),
    ],
)
def test_errors_have_one_form(error: Exception, text: str) -> None:
    assert error_text(error) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.pt"), "no such file or directory"),
        (
            UnidentifiedImageError("cannot identify image file <_io.BytesIO object at 0x7f325959c5e0>"),
            "cannot identify image file",
        ),
        (URLError(ConnectionRefusedError(111, "Connection refused")), "connection refused"),
        (URLError("no host given"), "no host given"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_reason_is_in_words(error: Exception, text: str) -> None:
    assert reason(error) == text


def test_a_missing_file_is_named_without_the_systems_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(tmp_path / "no.pt"), "--out", str(tmp_path / "x.onnx")]) == 1
    assert capsys.readouterr().err == f"gfl export: {tmp_path / 'no.pt'}: no such file or directory\n"


def test_a_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="or a GPU as cuda:1 or 1, got 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="`device` is cuda:2, but there are 2 GPUs"):
        distributed.choose_device("2")


@pytest.mark.parametrize("file", ["det.engine", "det", "det.pt2"])
def test_export_writes_no_file_of_another_format(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "best.pt", "--out", str(tmp_path / file)]) == 1
    assert "`--out` must end in .onnx for --format onnx" in capsys.readouterr().err
    assert set(export.SUFFIXES.values()) == {".onnx", ".pt2"}


def test_export_replaces_a_file_only_if_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "det.onnx"
    out.write_text("mine")
    assert cli.main(["export", "no.pt", "--out", str(out)]) == 1
    assert "is there already: choose another name, or add --overwrite" in capsys.readouterr().err
    assert cli.main(["export", "no.pt", "--out", str(out), "--overwrite"]) == 1
    assert "no.pt: no such file" in capsys.readouterr().err and out.read_text() == "mine"


def test_an_interrupted_demo_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, drawn, resumed = torch.get_num_threads(), [], []
    monkeypatch.setattr(course, "write_dataset", lambda folder, **_: drawn.append(folder))

    def interrupted(config: object, out: Path, *, device: str, resume: bool) -> dict[str, float]:
        resumed.append(resume)
        out.mkdir(exist_ok=True)
        (out / course.CONFIG).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "train", interrupted)
    out = tmp_path / "demo"
    words = ["demo", "--out", str(out), "--iterations", "8"]
    for _ in range(2):
        assert cli.main(words) == 130
    assert drawn == [out / "data"] and resumed == [False, True]
    assert cli.main([*words, "--seed", "4"]) == 1
    assert "holds a demo" in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_the_former_name_of_an_option_works() -> None:
    options = cli.parser().parse_args(["eval", "a.pt", "--output", "x.json"])
    assert options.out == "x.json" and cli.parser().parse_args(["eval", "a.pt"]).out is None


def test_a_program_prints_no_traceback_for_a_wrong_word() -> None:
    done = subprocess.run([sys.executable, "-m", "gfl.cli", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
