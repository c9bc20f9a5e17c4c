# SPDX-License-Identifier: Apache-2.0
"""A training's pictures and its report, one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .. import draw, files
from ..config import Config
from ..data.coco import CocoDataset
from ..data.loader import Batch
from . import pictures
from .evaluate import METRICS, class_figures, coco_evaluation, shown
from .quality import AREAS, POINT, curves

REPORT = "report.html"
# Pictures by their file's name, in the report's order, and what they show.
TITLES = {
    "results.png": "Losses, learning rate and AP",
    "precision_recall.png": "Precision and recall at an IoU of 0.5",
    "f1.png": "Precision, recall and F1 by score threshold",
    "confusion.png": "What objects are found as",
    "predictions.jpg": "Validation images",
    "labels.png": "Training data",
    "train_batch.jpg": "A training batch",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #262a33 }
table { border-collapse: collapse } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ced2d9 }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } pre { overflow: auto }
"""
MISSING = "no pictures of curves: matplotlib is not installed (pip install 'gfl-ops[report]')"


def begin(out: Path, data: CocoDataset, batch: Batch) -> dict[str, Image.Image]:
    """Writes the pictures of the training data and returns them by their names."""
    drawn = {"train_batch.jpg": draw.draw_batch(batch, data.annotations.distinct_names())}
    return _write(out, drawn | _plots({"labels.png": lambda: pictures.labels(data)}))


def finish(
    out: Path, config: Config, validation: CocoDataset | None, detections: Sequence[Mapping[str, Any]] | None
) -> dict[str, Image.Image]:
    """Writes the pictures of a training's results and `REPORT`, and returns the pictures by their names.

    `detections` are those of the last evaluation in the validation data; None: there was none.
    """
    drawn = _plots({"results.png": lambda: pictures.results(out)})
    tables: list[str] = []
    if validation is not None and detections is not None:
        evaluation = coco_evaluation(validation.annotations, detections, validation.image_ids)
        of_classes, names = curves(evaluation), validation.annotations.distinct_names()
        best = of_classes.best()
        threshold = best["threshold"] if math.isfinite(best["threshold"]) else 0.5
        tables = [_point_table(best), _class_table(names, class_figures(evaluation), of_classes.at(threshold).tolist())]
        tables.append(_size_table(of_classes.at(threshold).nanmean(1).tolist()))
        matrix = pictures.confusion_matrix(validation.annotations, detections, threshold)
        drawn |= _plots(
            {
                "precision_recall.png": lambda: pictures.precision_recall(evaluation, names),
                "f1.png": lambda: pictures.f1_by_threshold(of_classes),
                "confusion.png": lambda: pictures.confusion(matrix, names),
            }
        )
        if (sheet := pictures.predictions(validation, detections, threshold)) is not None:
            drawn["predictions.jpg"] = sheet
    _write(out, drawn)
    files.write(out / REPORT, page(out, config, tables))
    return drawn


def page(out: Path, config: Config, tables: Iterable[str]) -> str:
    """The report as HTML: tables, then those of `TITLES` that are in the folder."""
    parts = [f"<h1>{html.escape(out.name)}</h1>", *tables]
    for name, title in TITLES.items():
        if (out / name).exists():
            kind = "jpeg" if name.endswith(".jpg") else "png"
            content = base64.b64encode((out / name).read_bytes()).decode()
            parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/{kind};base64,{content}">')
    settings = html.escape(json.dumps(config.to_dict(), indent=1))
    parts.append(f"<h2>Settings</h2><pre>{settings}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(out.name)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table; numbers in four digits."""
    cells = "".join(f"<th>{html.escape(one)}</th>" for one in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        texts = (shown(one) if isinstance(one, float) else html.escape(str(one)) for one in row)
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _point_table(best: Mapping[str, float]) -> str:
    return "<h2>At the threshold of the highest F1</h2>" + table(POINT, [[best[name] for name in POINT]])


def _class_table(names: Sequence[str], figures: Sequence[float], at: Sequence[Sequence[Sequence[float]]]) -> str:
    rows = [(name, figures[k], *(of[k][0] for of in at)) for k, name in enumerate(names)]
    return "<h2>By class</h2>" + table(["class", METRICS[0], *POINT[:3]], rows)


def _size_table(at: Sequence[Sequence[float]]) -> str:
    rows = [(area, *(of[i] for of in at)) for i, area in enumerate(AREAS)]
    return "<h2>By size</h2>" + table(["objects", *POINT[:3]], rows)


def has_plots() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def _plots(wanted: Mapping[str, Callable[[], Image.Image]]) -> dict[str, Image.Image]:
    return {name: draw() for name, draw in wanted.items()} if has_plots() else {}


def _write(out: Path, drawn: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    for name, picture in drawn.items():
        content = io.BytesIO()
        picture.save(content, "JPEG" if name.endswith(".jpg") else "PNG", quality=88)
        files.write(out / name, content.getvalue())
    return dict(drawn)
