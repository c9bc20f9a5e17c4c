# SPDX-License-Identifier: Apache-2.0
"""``gfl detect`` on what people have, and what it leaves when it is stopped."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import file_server
import numpy as np
import pytest
import torch
from PIL import Image

from gfl import detector as detectors
from gfl import sources
from gfl.cli import main
from gfl.detector import Detector
from gfl.files import say
from gfl.zoo import download

try:
    import cv2
except ImportError:
    cv2 = None


@pytest.fixture
def file(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.pt"
    Detector(model, classes=["cup", "../cat", "car"]).save(path)
    return path


@pytest.fixture
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "found"


def detect(file: Path, out: Path, *words: object) -> int:
    return main(["detect", str(file), *map(str, words), "--out", str(out), "--device", "cpu", "--score", "0.1"])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]


def tree(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_lines_and_the_one_file_say_the_same(file: Path, folder: Path, out: Path) -> None:
    assert detect(file, out, folder, "--no-pictures") == 0
    assert tree(out) == {"detections.json", "detections.jsonl"}
    whole = json.loads((out / "detections.json").read_text())
    assert [one["image"]["file_name"] for one in lines(out)] == [one["file_name"] for one in whole["images"]]
    assert [a for one in lines(out) for a in one["annotations"]] == [
        {k: v for k, v in a.items() if k not in ("id", "image_id", "iscrowd")} for a in whole["annotations"]
    ]
    assert [a["id"] for a in whole["annotations"]] == list(range(1, len(whole["annotations"]) + 1))
    for one in lines(out):
        assert set(one["image"]["milliseconds"]) == {"read", "network", "postprocess"}
        assert all(value > 0 for value in one["image"]["milliseconds"].values())


def test_a_stopped_run_leaves_what_was_done(file: Path, folder: Path, out: Path, monkeypatch, capsys) -> None:
    read, count = sources.Unread.pixels, []

    def stopped(self: sources.Unread) -> torch.Tensor:
        count.append(self)
        if len(count) == 3:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(sources.Unread, "pixels", stopped)
    assert detect(file, out, folder, "--no-pictures") == 130
    assert [one["image"]["file_name"] for one in lines(out)] == [str(folder / "a.jpg"), str(folder / "b.png")]
    assert "what was found before is in" in capsys.readouterr().err and not (out / "detections.json").exists()


def test_the_options(file: Path, folder: Path, out: Path, model) -> None:
    words = ("--classes", "cup,2", "--max-detections", 5, "--iou", 0.3, "--size", "96x128", "--save-txt", "--crops")
    assert detect(file, out, folder / "a.jpg", *words) == 0
    model.test = sources_test = model.test.__class__(short_side=96, long_side=128, iou_threshold=0.3)
    wanted = Detector(model, score_threshold=0.1)(folder / "a.jpg", classes=[0, 2], max_detections=5)
    assert sources_test.short_side == 96 and 0 < len(wanted) <= 5 and set(wanted.labels.tolist()) <= {0, 2}
    (one,) = lines(out)
    assert [a["score"] for a in one["annotations"]] == wanted.scores.tolist()
    rows = [list(map(float, row.split())) for row in (out / "labels" / "a.txt").read_text().splitlines()]
    height, width = wanted.size
    for row, found in zip(rows, wanted, strict=True):
        x, y, w, h = (value * side for value, side in zip(row[1:5], (width, height) * 2))
        assert [x - w / 2, y - h / 2, x + w / 2, y + h / 2] == pytest.approx(found.box, abs=1e-3)
        assert row[0] == found.label and row[5] == pytest.approx(found.score, abs=1e-6)
    crops = {name for name in tree(out) if name.startswith("crops")}
    assert crops and all(name.split("/")[1] in ("cup", "car") for name in crops)


def test_names_of_classes_lead_nowhere_else(file: Path, folder: Path, out: Path) -> None:
    assert detect(file, out, folder / "a.jpg", "--crops", "--classes", "../cat") == 0
    assert [path.name for path in out.parent.iterdir()] == ["found"]
    assert any(name.startswith("crops/__cat/a-") for name in tree(out))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--classes", "dog"], "no class 'dog'"),
        (["--size", "96x"], "`--size` must be"),
        (["--size", "0"], "`--size` must be"),
        (["--iou", "2"], "`--iou` must be positive and at most 1"),
        (["--max-detections", "0"], "`--max-detections` must be positive"),
    ],
)
def test_options_that_say_nothing(words: list[str], says: str, file: Path, folder: Path, out: Path, capsys) -> None:
    assert detect(file, out, folder, *words) == 1
    assert says in capsys.readouterr().err


def test_urls(file: Path, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with file_server.serving() as server:
        server.files["x/..%2f..%2fa.jpg?size=3"] = (folder / "a.jpg").read_bytes()
        server.files["page.jpg"] = b"<html>"
        server.redirects["turn.jpg"] = f"http://localhost:{server.port}/x"
        names = [server.url(name) for name in ("x/..%2f..%2fa.jpg?size=3", "page.jpg", "turn.jpg", "none.jpg")]
        assert detect(file, out, *names) == 0
        error = capsys.readouterr().err
        assert "page.jpg can't be decoded" in error and "none.jpg: HTTP status 404" in error
        assert "localhost is in the local network" in error
        (one,) = lines(out)
        assert one["image"]["file_name"] == names[0] and tree(out) >= {"a.jpg"}
    (expected,) = Detector(file, "cpu", score_threshold=0.1)([folder / "a.jpg"])
    assert [a["score"] for a in one["annotations"]] == expected.scores.tolist()


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_an_image_or_names_on_standard_input(file: Path, folder: Path, out: Path, monkeypatch, capsys) -> None:
    stdin(monkeypatch, (folder / "a.jpg").read_bytes())
    assert detect(file, out, "-") == 0
    assert lines(out)[0]["image"]["file_name"] == "stdin"
    names = [str(folder / name) for name in ("b.png", "none.png", "d.bmp")] * 150
    stdin(monkeypatch, "\n".join(names).encode())
    assert [one.place for one in sources.Sources(["-"])] == names  # type: ignore[union-attr]
    with file_server.serving() as server:
        server.files["a.jpg"] = (folder / "a.jpg").read_bytes()
        stdin(monkeypatch, f"{folder / 'b.png'}\r\n\n{server.url('a.jpg')}\n".encode())
        assert detect(file, out, "-", "--no-pictures") == 0
        assert not server.requests and "in the local network" in capsys.readouterr().err
    assert [one["image"]["file_name"] for one in lines(out)] == [str(folder / "b.png")]


def test_pictures_replace_those_of_the_last_run_and_nothing_else(file: Path, folder: Path, out: Path) -> None:
    out.mkdir()
    (out / "b.jpg").write_bytes(b"of someone else")
    for _ in range(2):
        assert detect(file, out, folder) == 0
        assert tree(out) >= {"a.jpg", "b-2.jpg", "c.jpg", "d.jpg"} and "b-3.jpg" not in tree(out)
    assert (out / "b.jpg").read_bytes() == b"of someone else"


# Videos


@pytest.fixture
def video(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    if cv2 is None:
        pytest.skip("needs OpenCV")
    path = tmp_path_factory.mktemp("video") / "street.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 64))
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    for frame in coarse:
        writer.write(cv2.resize(frame, (96, 64), interpolation=cv2.INTER_CUBIC))
    writer.release()
    return path


def test_the_frames_of_a_video(video: Path, file: Path, folder: Path, out: Path) -> None:
    with file_server.serving() as server:
        server.files["street.avi"] = video.read_bytes()
        assert detect(file, out, folder / "a.jpg", video, server.url("street.avi")) == 0
    names = [str(folder / "a.jpg"), *(f"{place}#{n}" for place in (video, server.url("street.avi")) for n in (1, 2, 3))]
    assert [one["image"]["file_name"] for one in lines(out)] == names
    assert tree(out) >= {"street-000001.jpg", "street-000003.jpg", "street-000001-2.jpg"}
    capture = cv2.VideoCapture(str(video))
    expected = Detector(file, "cpu", score_threshold=0.1)(np.ascontiguousarray(capture.read()[1][:, :, ::-1]))
    assert [a["score"] for a in lines(out)[1]["annotations"]] == expected.scores.tolist()


def test_a_broken_video_is_named(file: Path, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if cv2 is None:
        pytest.skip("needs OpenCV")
    (folder / "broken.mp4").write_bytes(b"no video")
    assert detect(file, out, folder / "broken.mp4") == 1
    assert "broken.mp4 can't be opened as a video" in capsys.readouterr().err


def test_cameras_and_streams_are_numbers_and_addresses(monkeypatch: pytest.MonkeyPatch, file: Path, out: Path) -> None:
    opened = []

    def reader(place: object):
        opened.append(place)
        yield from np.zeros((2, 32, 32, 3), np.uint8)

    monkeypatch.setattr(sources, "_video_reader", lambda: reader)
    assert detect(file, out, "0", "rtsp://me:secret@camera.example/live") == 0
    assert opened == [0, "rtsp://me:secret@camera.example/live"]
    names = [one["image"]["file_name"] for one in lines(out)]
    assert names == ["camera 0#1", "camera 0#2", "rtsp://camera.example/live#1", "rtsp://camera.example/live#2"]
    assert "camera 0-000001.jpg" in tree(out)


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "marks"])
def test_a_network_camera_gives_images_by_http(lengths: bool, file: Path, folder: Path, out: Path) -> None:
    """One after another in a single answer; one of them is damaged."""
    images = [(folder / name).read_bytes() for name in ("a.jpg", "notes.txt", "b.png")]
    answer = b"\r\n"
    for image in images:
        size = f"Content-Length: {len(image)}\r\n" if lengths else ""
        answer += f"--frame\r\nContent-Type: image/jpeg\r\n{size}\r\n".encode() + image + b"\r\n"
    with file_server.serving() as server:
        server.files = {"video": answer + b"--frame--\r\n", "still": images[0], "none": b"--frame--"}
        server.kinds = dict.fromkeys(("video", "none"), "multipart/x-mixed-replace; boundary=frame")
        assert detect(file, out, server.url("video"), server.url("still")) == 0
        assert [name for name, _ in server.requests] == ["video", "still", "video", "still"]
        assert detect(file, out.parent / "none", server.url("none")) == 1
    shown = [f"{server.url('video')}#1", f"{server.url('video')}#2", server.url("still")]
    found = lines(out)
    assert [one["image"]["file_name"] for one in found] == shown
    alone = Detector(file, "cpu", score_threshold=0.1)
    for one, name in zip(found, ("a.jpg", "b.png", "a.jpg"), strict=True):
        assert [a["score"] for a in one["annotations"]] == alone(folder / name).scores.tolist()


def test_a_network_camera_s_image_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with file_server.serving() as server:
        server.files["video"] = b"--x\r\nContent-Length: 99999999\r\n\r\n" + b"\n" * 5000
        server.kinds["video"] = "multipart/x-mixed-replace; boundary=x"
        with pytest.raises(OSError, match="video: an image is larger than 0 MiB"):
            list(download.read_parts(server.url("video"), 4096))


@pytest.fixture
def broadcast(video: Path) -> Iterator[str]:
    """The address of a program that sends a video to whoever connects, as a stream."""
    listening = socket.create_server(("127.0.0.1", 0))

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(video.read_bytes())

    thread = threading.Thread(target=send)
    thread.start()
    yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"
    with contextlib.suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def test_a_stream_by_opencv_itself(broadcast: str, video: Path, file: Path, out: Path) -> None:
    assert detect(file, out, broadcast) == 0
    assert [one["image"]["file_name"] for one in lines(out)] == [f"{broadcast}#{n}" for n in (1, 2, 3)]
    capture, alone = cv2.VideoCapture(str(video)), Detector(file, "cpu", score_threshold=0.1)
    for one in lines(out):
        frame = np.ascontiguousarray(capture.read()[1][:, :, ::-1])
        assert [a["score"] for a in one["annotations"]] == alone(frame).scores.tolist()


def test_without_a_decoder_a_video_says_what_to_install(
    monkeypatch, file: Path, folder: Path, out: Path, capsys
) -> None:
    for name in ("cv2", "av"):
        monkeypatch.setitem(sys.modules, name, None)
    (folder / "x.mp4").write_bytes(b"")
    assert detect(file, out, folder / "x.mp4") == 1
    assert "need OpenCV or PyAV: pip install 'gfl-ops[video]'" in capsys.readouterr().err


def test_an_unknown_kind_of_address(file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("file:///etc/passwd", "ftp://example.org/a.jpg", "gopher://x"):
        assert detect(file, out, place) == 1
        assert "only http, https, rtsp" in capsys.readouterr().err


# Several processes


@pytest.mark.slow
def test_processes_share_a_folder(file: Path, folder: Path, out: Path) -> None:
    Image.open(folder / "a.jpg").save(folder / "inner" / "a.jpg")
    (folder / "b2.png").write_bytes(b"broken")
    given = [str(folder), str(folder / "inner")]
    assert detect(file, out.with_name("alone"), *given, "--no-pictures") == 0
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "gfl.cli",
        "detect",
        str(file),
    ]
    words += [*given, "--out", str(out), "--device", "cpu", "--score", "0.1"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    say(done.stdout)
    alone, shared = (json.loads((path / "detections.json").read_text()) for path in (out.with_name("alone"), out))
    for image in alone["images"] + shared["images"]:
        del image["milliseconds"]
    assert shared["images"] == alone["images"] and shared["annotations"] == alone["annotations"]
    assert tree(out) >= {"a.jpg", "a-2.jpg", "b.jpg", "c.jpg", "d.jpg"}


def test_detector_module_has_the_public_names() -> None:
    assert detectors.Result is __import__("gfl").Result
