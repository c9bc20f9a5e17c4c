# SPDX-License-Identifier: Apache-2.0
"""The web service: every way to send a photo, what it refuses, and the page in a browser."""

from __future__ import annotations

import base64
import io
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gfl.detector import Detector

pytest.importorskip("starlette", reason="pip install 'gfl-ops[serve]'")
testclient = pytest.importorskip("starlette.testclient")

from gfl.serve import Limits, create_app  # noqa: E402

CLASSES = ["cup", "<b>cat</b>", "car"]


@pytest.fixture
def photo(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize((150, 100), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def detector(model) -> Detector:
    return Detector(model, classes=CLASSES, score_threshold=0.1)


def client(detector: Detector, **limits: float):
    return testclient.TestClient(create_app(detector, Limits(**limits)))  # type: ignore[arg-type]


def sent(where, photo: bytes, how: str, **fields: object):
    if how == "form":
        return where.post("/detect", files={"image": ("../../x.png", photo, "image/png")}, data=fields)
    if how == "json":
        return where.post("/detect", json={"image": base64.b64encode(photo).decode(), **fields})
    return where.post("/detect", content=photo, headers={"Content-Type": "image/png"}, params=fields)


@pytest.mark.parametrize("how", ["form", "json", "body"])
def test_every_way_to_send_a_photo(how: str, detector: Detector, photo: bytes) -> None:
    where = client(detector)
    answer, expected = sent(where, photo, how), detector(photo)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["width"], found["height"]) == (150, 100) and len(found["detections"]) == len(expected) > 3
    assert [one["score"] for one in found["detections"]] == expected.scores.tolist()
    assert {one["name"] for one in found["detections"]} <= set(CLASSES)
    some = sent(where, photo, how, score_threshold="0.2", classes="cup,2", max_detections="2", edges="1").json()
    same = detector(photo, score_threshold=0.2, classes=["cup", 2], max_detections=2, edges=True)
    assert [one["score"] for one in some["detections"]] == same.scores.tolist()
    for one, probabilities in zip(some["detections"], same.edges.probabilities.tolist(), strict=True):
        assert one["edges"]["probabilities"] == probabilities and one["label"] in (0, 2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"score_threshold": "nan"}, "`score_threshold` must be a number from 0 to 1, got 'nan'"),
        ({"max_detections": "1e9"}, "`max_detections` must be a number"),
        ({"max_detections": "10001"}, "`max_detections` must be a number"),
        ({"classes": "dog"}, "no class 'dog'"),
    ],
)
def test_fields_that_say_nothing(fields: dict[str, str], says: str, detector: Detector, photo: bytes) -> None:
    answer = sent(client(detector), photo, "form", **fields)
    assert answer.status_code == 400 and says in answer.json()["error"]


def test_what_is_no_photo(detector: Detector, photo: bytes) -> None:
    where = client(detector)
    for content in (b"", b"no photo", photo[:200]):
        answer = sent(where, content, "body")
        assert answer.status_code == 400 and "can't be decoded" in answer.json()["error"]
    for content in (b"[" * 100_000, b"{}", b'{"image": 7}', b'{"image": "!"}', b"\xff"):
        answer = where.post("/detect", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and "base64" in answer.json()["error"]
    assert where.post("/detect", data={"image": "text"}).status_code == 415
    assert where.post("/detect", files={"photo": photo}).status_code == 400
    assert where.post("/detect", files=[("image", photo), ("image", photo)]).status_code == 400
    assert where.get("/detect").status_code == 405 and where.get("/../page.html").status_code == 404


def test_limits_of_size(detector: Detector, photo: bytes) -> None:
    where = client(detector, bytes=len(photo) - 1)
    assert sent(where, photo, "body").status_code == 413

    def blocks():
        for start in range(0, len(photo), 100):
            yield photo[start : start + 100]

    chunked = where.post("/detect", content=blocks(), headers={"Content-Type": "image/png"})
    assert chunked.status_code == 413 and "larger than" in chunked.json()["error"]
    for side in (9_000, 20_000):  # Of the larger one Pillow opens not even the head.
        content = io.BytesIO()
        Image.new("1", (side, side)).save(content, "PNG")
        answer = sent(client(detector), content.getvalue(), "form")
        assert len(content.getvalue()) < 1e5 and answer.status_code == 413
        assert "more than 50000000 pixels" in answer.json()["error"]


def test_limits_of_time_and_number(detector: Detector, photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on, ended = threading.Event(), []

    def slow(*_: object, **__: object) -> None:
        going_on.wait(30)
        ended.append(1)

    monkeypatch.setattr(Detector, "__call__", slow)
    with client(detector, seconds=0.2, waiting=1) as where:
        assert sent(where, photo, "body").status_code == 504
        # The first one still runs.
        assert sent(where, photo, "body").status_code == 503
        going_on.set()
        while not ended:
            time.sleep(0.01)


def test_it_is_a_part_of_another_application(detector: Detector, photo: bytes) -> None:
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed")
    whole = fastapi.FastAPI()
    whole.mount("/objects", create_app(detector))
    answer = testclient.TestClient(whole).post("/objects/detect", files={"image": ("x.png", photo, "image/png")})
    assert answer.status_code == 200 and len(answer.json()["detections"]) == len(detector(photo))


def test_the_page(detector: Detector) -> None:
    where = client(detector)
    for path in ("/", "/page.js"):
        answer = where.get(path)
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "innerHTML" not in where.get("/page.js").text


def test_the_page_in_a_browser(detector: Detector, photo: bytes, tmp_path: Path) -> None:
    """A photo is dropped: its boxes and four distributions appear, and a class's name stays text."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    uvicorn = pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(detector), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    expected = detector(photo, score_threshold=0.3)
    problems: list[str] = []
    try:
        with playwright.sync_playwright() as tools:
            chromium = tools.chromium.launch(executable_path=browser, args=["--no-sandbox"])
            page = chromium.new_page(viewport={"width": 900, "height": 700})
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
            page.goto(f"http://127.0.0.1:{port}/", wait_until="load")
            page.evaluate(
                """(text) => {
                  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                  const data = new DataTransfer();
                  data.items.add(new File([bytes], "photo.png", { type: "image/png" }));
                  document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
                }""",
                base64.b64encode(photo).decode(),
            )
            page.locator("#says", has_text="objects").wait_for()
            assert f"{len(expected)} objects in 150×100 pixels" in page.text_content("#says")
            assert page.evaluate("[document.getElementById('picture').width, picture.height]") == [150, 100]
            assert page.locator("svg.side").count() == 4 and page.locator("svg.side rect").count() == 4 * 17
            assert page.text_content("#sides b") == expected.names[0] and not page.locator("#sides b b").count()
            # The frame of the best box is on the canvas.
            changed = page.evaluate("[...picture.getContext('2d').getImageData(0, 0, 150, 100).data]")
            drawn = np.array(changed, dtype=np.uint8).reshape(100, 150, 4)[..., :3]
            assert (drawn != np.asarray(Image.open(io.BytesIO(photo)))).any()
            page.screenshot(path=str(tmp_path / "page.png"))
            page.fill("#score", "1")
            page.dispatch_event("#score", "change")
            page.locator("#says", has_text="0 objects in").wait_for()
            assert page.locator("svg.side").count() == 0
            page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"broken"})
            page.locator("#says", has_text="not detected").wait_for()
            chromium.close()
    finally:
        server.should_exit = True
        thread.join(30)
    assert [text for text in problems if "400" not in text and "favicon" not in text and "404" not in text] == []
