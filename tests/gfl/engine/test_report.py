# SPDX-License-Identifier: Apache-2.0
"""The pictures of a training, and its page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from gfl import checkpoint
from gfl.config import Config
from gfl.engine import pictures, report
from gfl.engine.quality import POINT, THRESHOLDS, Curves, curves
from gfl.engine.train import BEST, train

Small = Callable[..., Config]


class Page(HTMLParser):
    """What a page refers to, and whether its elements are closed."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_a_training_leaves_a_page_that_needs_no_other_file(small: Small, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a <run>"
    train(small(epochs=4, lr_drops=(), lr=0.1), out, device="cpu")
    page = Page()
    text = (out / report.REPORT).read_text()
    page.feed(text)
    assert page.open == [] and "a &lt;run&gt;" in text and "<run>" not in text
    assert len(page.sources) == len(report.TITLES)
    for name, source in zip(report.TITLES, page.sources, strict=True):
        match = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source)
        assert match is not None
        content = base64.b64decode(match[2])
        assert content == (out / name).read_bytes() and Image.open(io.BytesIO(content)).width > 200
    assert {"disc", "box", "all", "small", *POINT} <= set(page.cells)
    assert "score_threshold" in checkpoint.read(out / BEST)["meta"]


def test_without_matplotlib_there_is_a_page_all_the_same(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "has_plots", lambda: False)
    train(small(epochs=1, val_annotations=""), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / report.REPORT).exists() and (tmp_path / "run" / "train_batch.jpg").exists()
    assert not list((tmp_path / "run").glob("*.png"))
    assert report.MISSING in (tmp_path / "run" / "train.log").read_text()


def test_a_confusion_matrix_counts_each_object_once() -> None:
    truth: Any = SimpleNamespace(
        classes=["a", "b"],
        category_ids=[3, 7],
        image_ids=[1, 2],
        rows=torch.tensor([0, 0, 1, 1]),
        labels=torch.tensor([0, 1, 1, 0]),
        crowd=torch.tensor([False, False, False, True]),
        boxes=torch.tensor([[0.0, 0, 10, 10], [20, 20, 10, 10], [0, 0, 4, 4], [0, 0, 9, 9]], dtype=torch.float64),
    )

    def found(image: int, category: int, score: float, *box: float) -> dict[str, Any]:
        return {"image_id": image, "category_id": category, "score": score, "bbox": list(box)}

    detections = [
        found(1, 3, 0.9, 0, 0, 10, 9),  # right
        found(1, 3, 0.8, 0, 0, 10, 10),  # the same object again
        found(1, 3, 0.7, 20, 20, 10, 10),  # the wrong class
        found(2, 7, 0.2, 0, 0, 4, 4),  # below the threshold
    ]
    # Rows: objects of a, of b, nothing.
    assert pictures.confusion_matrix(truth, detections, 0.5).tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 0]]


def test_points_of_a_curve() -> None:
    """One class: half of its objects are found above 0.6 without a mistake, three quarters above 0.3 with some."""
    recalls = torch.linspace(0, 1, 101, dtype=torch.float64)
    precision = torch.where(recalls <= 0.5, 1.0, torch.where(recalls <= 0.75, 0.75, 0.0))
    scores = torch.where(recalls <= 0.5, 0.6, torch.where(recalls <= 0.75, 0.3, 0.0))
    tables = {name: torch.full((10, 101, 2, 4, 3), -1.0, dtype=torch.float64) for name in ("precision", "scores")}
    for name, column in (("precision", precision), ("scores", scores)):
        tables[name][:, :, 0] = column[None, :, None, None]
    made = curves(SimpleNamespace(eval={name: table.numpy() for name, table in tables.items()}))
    assert made.precision[:, 1].isnan().all()  # a class without objects
    at = made.at(0.5)[:, 0, 0].tolist()
    assert THRESHOLDS[50] == 0.5 and at == pytest.approx([1, 0.5, 2 / 3])
    assert made.recall[70, 0, 0] == 0 and made.f1[70, 0, 0] == 0
    assert made.best() == pytest.approx({"precision": 0.75, "recall": 0.75, "F1": 0.75, "threshold": 0.0})
    tables["precision"][:], tables["scores"][:] = 0.0, 0.0  # objects, of which none is found
    missed = curves(SimpleNamespace(eval={name: table.numpy() for name, table in tables.items()}))
    assert missed.best() == {"precision": 0, "recall": 0, "F1": 0, "threshold": 0}
    assert all(value != value for value in Curves(made.precision[:, 1:], made.recall[:, 1:]).best().values())
