# SPDX-License-Identifier: Apache-2.0
"""Every writer with each of its system calls failing: the file is the whole old one or the whole new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import file_fuzz
import pytest
import torch
from failing_files import ERRORS, Killed, failing
from PIL import Image

from gfl import checkpoint, files
from gfl.cli import main
from gfl.config import preset
from gfl.engine import log
from gfl.models import build

SHAPE = preset("gfl_tiny").replace(
    num_classes=2, width=8, neck_channels=8, head_channels=8, head_convs=1, head_groups=2
)


def a_checkpoint(path: Path, version: int) -> None:
    checkpoint.write(path, {"state_dict": {"x": torch.full((3000,), float(version))}}, path.with_name("p.pt"))


def a_picture(path: Path, version: int) -> None:
    with files.replacing(path) as part:
        Image.new("RGB", (8, 8), (version,) * 3).save(part)


def a_cut_table(path: Path, version: int) -> None:
    rows = "".join(f"{step},{version}\n" for step in range(1, 4))
    if version == 1 or not path.exists():
        files.write(path, f"step,version\n{rows}")
    else:
        log.cut_after(path, 2)


# A name, what writes one of two versions there, what reads it back.
WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], object]]] = {
    "last.pt": (
        a_checkpoint,
        lambda path: checkpoint.read(path)["state_dict"]["x"].unique().tolist(),
    ),
    "config.json": (lambda path, v: SHAPE.replace(epochs=v).save(path), lambda path: preset(str(path)).train.epochs),
    "metrics.json": (lambda path, v: files.write_json(path, {"AP": v}), lambda path: json.loads(path.read_text())),
    "picture.png": (a_picture, lambda path: Image.open(path).getpixel((0, 0))),
    "steps.csv": (a_cut_table, lambda path: path.read_text()),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("killed", [False, True], ids=["error", "kill"])
def test_every_call_may_fail(name: str, killed: bool, tmp_path: Path) -> None:
    write, read = WRITERS[name]
    path = tmp_path / "folder" / name
    path.parent.mkdir()

    def prepared() -> list[object]:
        for file in path.parent.iterdir():
            file.unlink()
        write(path, 1)
        return [read(path)]

    old = prepared()[0]
    with failing(path.parent) as layer:
        write(path, 2)
    new = read(path)
    assert new != old and {"fsync", "replace"} <= set(layer.calls)
    for number, call in enumerate(layer.calls):
        for code in (0,) if killed else ERRORS:
            prepared()
            error = Killed() if killed else OSError(code, os.strerror(code), str(path))
            with failing(path.parent, number, error), suppress(OSError, Killed):
                write(path, 2)
            where = f"{name}: {call}, call {number}, {code}"
            if path.exists():
                assert read(path) in (old, new), where
            else:  # Where links fail, the one before stands alone for a moment.
                assert name == "last.pt" and killed and read(path.with_name("p.pt")) == old, where
            # What a kill leaves is hidden, and gone with the next training.
            rest = [file.name for file in path.parent.iterdir() if file.name not in (name, "p.pt")]
            assert all(one.startswith(files.PART) for one in rest) and (killed or call == "unlink" or not rest), where


def test_after_a_kill_the_next_owner_of_the_folder_cleans_up(tmp_path: Path) -> None:
    with failing(tmp_path, 2, Killed()), pytest.raises(Killed):
        checkpoint.write(tmp_path / "last.pt", {"state_dict": {"x": torch.ones(3)}})
    assert len(list(tmp_path.iterdir())) == 1
    with files.locked(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [files.LOCK]
    assert not list(tmp_path.iterdir())


def test_links_are_replaced_and_never_written_through(tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    out.mkdir()
    file_fuzz.data_set(tmp_path, 1)
    photo.write_bytes((tmp_path / "images" / "1.png").read_bytes())
    before = photo.read_bytes()
    for name, link in (("soft.png", os.symlink), ("hard.png", os.link)):
        link(photo, out / name)
        a_picture(out / name, 7)
        assert photo.read_bytes() == before and Image.open(out / name).getpixel((0, 0)) == (7, 7, 7)
    assert not (out / "soft.png").is_symlink()


def test_two_runs_of_detect_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_fuzz.data_set(tmp_path, 1)
    model = build(SHAPE.model, SHAPE.test)
    meta = checkpoint.meta(SHAPE, ["a", "b"])
    checkpoint.write(tmp_path / "x.pt", {"meta": meta, "state_dict": model.state_dict()})
    out = tmp_path / "out"
    words = ["detect", str(tmp_path / "x.pt"), str(tmp_path / "images"), "--out", str(out), "--device", "cpu"]
    with files.locked(out):
        assert main(words) == 1
        assert "out is in use by" in capsys.readouterr().err
        assert [file.name for file in out.iterdir()] == [files.LOCK]
    assert main(words) == 0
    assert sorted(file.name for file in out.iterdir()) == ["1.jpg", "detections.json", "detections.jsonl"]


def test_what_may_not_be_written(tmp_path: Path) -> None:
    given, images = tmp_path / "last.pt", tmp_path / "images"
    file_fuzz.data_set(tmp_path, 1)
    given.write_bytes(b"weights")
    (tmp_path / "link.json").symlink_to(given)
    os.link(given, tmp_path / "hard.json")
    (tmp_path / "folder.json").mkdir()
    for path in (given, tmp_path / "link.json", tmp_path / "hard.json", images / "1.png"):
        with pytest.raises(ValueError, match=r"`--output` .* is an input"):
            files.check_output(path, "--output", [given, images, None], ".json")
    (tmp_path / "other.pt").write_bytes(b"weights too")
    with pytest.raises(ValueError, match=r"other\.pt is there already and is no \.json file"):
        files.check_output(tmp_path / "other.pt", "--output", [given], ".json")
    with pytest.raises(IsADirectoryError, match="`--output` is a folder"):
        files.check_output(tmp_path / "folder.json", "--output", [], ".json")
    with pytest.raises(FileNotFoundError, match="nowhere, the folder of"):
        files.check_output(tmp_path / "nowhere" / "x.json", "--output", [], ".json")
    (tmp_path / "earlier.json").write_text("{}")
    for name in ("new.json", "earlier.json", "new.txt"):
        files.check_output(tmp_path / name, "--output", [given, images], ".json")
    files.check_output("/dev/null", "--output", [], ".json")
    files.write("/dev/null", "x")
    assert Path("/dev/null").is_char_device()


def test_lines_stay_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.jsonl"
    with pytest.raises(RuntimeError), files.lines(path) as add:
        add({"n": 1})
        assert path.read_text() == '{"n": 1}\n'
        raise RuntimeError
    assert path.read_text() == '{"n": 1}\n' and "found.jsonl" in capsys.readouterr().err
    with files.lines(path) as add:
        add({"n": 2})
    assert not path.exists()


def test_a_second_owner_is_told_of_the_first(tmp_path: Path) -> None:
    with files.locked(tmp_path) as before:
        assert before == ""
        with pytest.raises(ValueError, match="in use by this process"), files.locked(tmp_path):
            pass
    (tmp_path / files.LOCK).write_text("process 1 on moon, since 1969\n")
    with files.locked(tmp_path) as before:
        assert before == "process 1 on moon, since 1969"


def test_errors_of_the_command_line_print_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell's `*` puts names of files there."""
    for words in (["detect", "x.pt", "y.png", "--\x1b[2J.png"], ["\x1b[31mred"]):
        with pytest.raises(SystemExit):
            main(words)
        said = capsys.readouterr().err
        assert "\\x1b" in said and "\x1b" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "utf-8"])
def test_any_line_can_be_printed(encoding: str) -> None:
    import io

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding, errors="strict")
    files.say("caf\udce9 – 日本 \x1b[2J\u202e fox 🦊\nnext", stream)
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "\x1b" not in text and "\\x1b[2J" in text and text.endswith("\nnext\n") and "\\udce9" in text
    stream.close()
    files.say("nobody reads this", stream)
