# SPDX-License-Identifier: Apache-2.0
"""Files made to do harm, by every way that they come in: refused by name, nothing run, kept or written elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import file_server
import pytest
import torch
from PIL import Image

from gfl import checkpoint, zoo
from gfl.cli import main
from gfl.config import preset
from gfl.detector import Detector
from gfl.engine.detections import safe_name, stem
from gfl.models import build
from gfl.sources import Named, Unread

SHAPE = preset("gfl_tiny").replace(
    num_classes=2, width=8, neck_channels=8, head_channels=8, head_convs=1, head_groups=2
)


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


def bomb(path: Path) -> None:
    """Ten thousand times as large when it is unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**8))


@pytest.mark.parametrize("kind", ["code", "bomb"])
def test_published_weights_are_read_as_carefully_as_any(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even with the right hash."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    file, marker = tmp_path / "x.pth", tmp_path / "touched"
    if kind == "code":
        torch.save({"state_dict": {"x": Evil(marker)}}, file)
    else:
        bomb(file)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with file_server.serving() as server:
        name = f"gfl-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
        server.files[name] = file.read_bytes()
        monkeypatch.setitem(zoo.TABLE, "gfl_r50_1x", zoo.TABLE["gfl_r50_1x"]._replace(url=server.url(name)))
        assert main(["detect", "gfl_r50_1x", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert {"code": "refused, since it asks for", "bomb": "its records claim 100000000 bytes"}[kind] in error
    assert not marker.exists() and not (tmp_path / "out").exists()


def tiny(path: Path, classes: list[str]) -> Path:
    torch.manual_seed(0)
    model = build(SHAPE.model, SHAPE.test)
    with torch.no_grad():
        model.bbox_head.gfl_cls.bias.fill_(1)
    checkpoint.write(path, {"meta": checkpoint.meta(SHAPE, classes), "state_dict": model.state_dict()})
    return path


def png(width: int, height: int) -> bytes:
    """A black image whose few bytes unpack to many."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_an_image_that_unpacks_to_gigabytes_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    Image.new("RGB", (32, 32)).save(folder / "small.png")
    model = tiny(tmp_path / "x.pt", ["a", "b"])
    assert main(["detect", str(model), str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "bomb.png can't be decoded" in said.err and "1 images, 1 unreadable" in said.out
    with pytest.raises(ValueError, match=r"bytes of an image can't be decoded: .*decompression bomb"):
        Detector(model, "cpu")((folder / "bomb.png").read_bytes())


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "..", ".", "", "/etc/passwd", "a/../../b", "..\\..\\x", "a\0b", "\x1b[2J", "CON:", ".bashrc",
     "x" * 5000, "~root", "$(id)", "‮gpj.exe"],
)  # fmt: skip
def test_a_name_of_any_origin_is_a_file_s_in_this_folder(name: str, tmp_path: Path) -> None:
    found = [safe_name(name), stem(Unread(f"https://example.org/x/{name}")), stem(Named(f"{name}#3", torch.empty(0)))]
    for one in found:
        assert one and not one.startswith(".") and not set(one) & set("/\\\0:\x1b‮$~") and len(one) <= 100
        assert (tmp_path / f"{one}.jpg").parent == tmp_path and (tmp_path / f"{one}.jpg").name == f"{one}.jpg"


def test_classes_of_a_checkpoint_name_no_folder_elsewhere(tmp_path: Path) -> None:
    model = tiny(tmp_path / "x.pt", ["../../up", "/tmp/abs"])
    Image.new("RGB", (64, 64), (200, 90, 30)).save(tmp_path / "photo.png")
    out = tmp_path / "a" / "b" / "out"
    words = [
        "detect",
        str(model),
        str(tmp_path / "photo.png"),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--crops",
        "--save-txt",
    ]
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "a")}
    assert main([*words, "--score", "0.01"]) == 0
    written = {str(path.relative_to(out)) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert any(name.startswith("crops/") for name in written) and not any(".." in name for name in written)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "a")} == before
    json.loads((out / "detections.json").read_text())


def test_text_on_standard_input_reaches_no_place_in_the_local_network(tmp_path: Path, monkeypatch, capsys) -> None:
    model = tiny(tmp_path / "x.pt", ["a", "b"])
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    with file_server.serving() as server:
        server.files["x.png"] = content.getvalue()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(server.url("x.png").encode())))
        assert main(["detect", str(model), "-", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
        assert not server.requests
    assert "in the local network" in capsys.readouterr().err
