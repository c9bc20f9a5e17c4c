# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training: its curves, its data, and where the detector is right and wrong."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gfl_ops.ops.boxes.box_ops import pairwise_iou

from ..data.coco import Annotations, CocoDataset
from ..draw import contact_sheet, draw_detections
from .log import EVALUATIONS, STEPS
from .quality import THRESHOLDS, Curves

# A detection finds an object from this IoU on.
MATCH = 0.5
# Images of a batch or of the validation data that are shown, and the longest side of one.
SHOWN, SIDE = 8, 480
# Classes with a line or a name of their own in a figure.
MOST_CLASSES = 30


def results(out: Path) -> Image.Image:
    """Losses, learning rate and AP of a training's tables."""
    figure, axes = _figure(1, 3)
    steps, evaluations = (_columns(out / name) for name in (STEPS, EVALUATIONS))
    for name in (column for column in steps if column.startswith("loss")):
        axes[0].plot(steps["step"], steps[name], label=name)
    axes[1].plot(steps["step"], steps["lr"], label="learning rate")
    for name in ("AP", "AP50", "AP75"):
        axes[2].plot(evaluations["step"], evaluations[name], marker=".", label=name)
    axes[2].set_ylim(0, 1.02)
    for one in axes:
        one.set_xlabel("step")
        one.legend()
    return _image(figure)


def precision_recall(evaluation: Any, names: Sequence[str]) -> Image.Image:
    """Precision over recall at an IoU of 0.5, of each class and as their mean."""
    table = torch.as_tensor(evaluation.eval["precision"])[0, :, :, 0, -1]
    there = (table >= 0).all(0)
    figure, (axes,) = _figure(1, 1)
    recall = torch.linspace(0, 1, len(table)).tolist()
    for label, name in enumerate(names[:MOST_CLASSES]):
        if there[label]:
            axes.plot(recall, table[:, label].tolist(), linewidth=0.8, label=name)
    if bool(there.any()):
        axes.plot(recall, table[:, there].mean(1).tolist(), color="black", linewidth=2, label="mean")
        axes.legend(fontsize="x-small")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    return _image(figure)


def f1_by_threshold(curves: Curves) -> Image.Image:
    """Precision, recall and F1 over the score threshold, means of the classes, and the best threshold."""
    figure, (axes,) = _figure(1, 1)
    for name, curve in (("precision", curves.precision), ("recall", curves.recall), ("F1", curves.f1)):
        axes.plot(THRESHOLDS.tolist(), curve[:, :, 0].nanmean(1).tolist(), label=name)
    best = curves.best()["threshold"]
    axes.axvline(best, color="black", linestyle=":", label=f"best F1 at {best:.2f}")
    axes.set(xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend()
    return _image(figure)


def confusion_matrix(annotations: Annotations, detections: Sequence[Mapping[str, Any]], threshold: float) -> Tensor:
    """int64 ``[K + 1, K + 1]``: objects of a class (rows) found as a class (columns); last are none.

    Detections of at least the score `threshold` take objects in the order of their scores, each the one of the largest
    IoU that is left, from 0.5 on, whatever its class. Crowds are left out.
    """
    classes = len(annotations.classes)
    label_of = {number: label for label, number in enumerate(annotations.category_ids)}
    matrix = torch.zeros(classes + 1, classes + 1, dtype=torch.int64)
    of_image = defaultdict(list)
    for detection in detections:
        if detection["score"] >= threshold:
            of_image[detection["image_id"]].append(detection)
    rows = defaultdict(list)
    for index, (row, crowd) in enumerate(zip(annotations.rows.tolist(), annotations.crowd.tolist())):
        if not crowd:
            rows[annotations.image_ids[row]].append(index)
    for image in {*of_image, *rows}:
        found = sorted(of_image[image], key=lambda one: -one["score"])
        objects = torch.tensor(rows[image], dtype=torch.int64)
        truth = annotations.labels[objects].tolist()
        given = torch.tensor([one["bbox"] for one in found], dtype=torch.float64).reshape(-1, 4)
        iou = pairwise_iou(_corners(given), _corners(annotations.boxes[objects]))
        free = set(range(len(truth)))
        for row, detection in enumerate(found):
            best = max(free, key=lambda column: float(iou[row, column]), default=None)
            label = label_of[detection["category_id"]]
            if best is not None and iou[row, best] >= MATCH:
                free.remove(best)
                matrix[truth[best], label] += 1
            else:
                matrix[classes, label] += 1
        for column in free:
            matrix[truth[column], classes] += 1
    return matrix


def confusion(matrix: Tensor, names: Sequence[str]) -> Image.Image:
    """A confusion matrix, as shares of the objects of each class."""
    figure, (axes,) = _figure(1, 1, height=5.5)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= MOST_CLASSES:
        ticks, shown = range(len(names) + 1), [*names, "nothing"]
        axes.set_xticks(ticks, shown, rotation=90)
        axes.set_yticks(ticks, shown)
        for row, counts in enumerate(matrix.tolist()):
            for column, count in enumerate(counts):
                if count:
                    dark = float(shares[row, column]) > 0.5
                    axes.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="found as", ylabel="object")
    return _image(figure)


def labels(data: CocoDataset) -> Image.Image:
    """Objects per class, and the sizes of their boxes."""
    figure, axes = _figure(1, 2)
    annotations = data.annotations
    counts = torch.bincount(annotations.labels, minlength=len(data.classes))
    shown = range(min(len(counts), MOST_CLASSES))
    axes[0].barh([data.classes[label] for label in shown], counts[: len(shown)].tolist())
    axes[0].invert_yaxis()
    axes[0].set_xlabel("objects")
    axes[1].scatter(*annotations.boxes[:, 2:].T.numpy(), s=3, alpha=0.3)
    axes[1].set(xlabel="width of a box, pixels", ylabel="height")
    return _image(figure)


def predictions(data: CocoDataset, detections: Sequence[Mapping[str, Any]], threshold: float) -> Image.Image | None:
    """The first validation images twice, with their objects and with what is found; None if none can be read."""
    label_of = {number: label for label, number in enumerate(data.category_ids)}
    shown = []
    for index in range(min(len(data), SHOWN)):
        try:
            sample = data[index]
        except ValueError:
            continue
        found = [d for d in detections if d["image_id"] == sample.image_id and d["score"] >= threshold]
        boxes = _corners(torch.tensor([one["bbox"] for one in found]).reshape(-1, 4))
        kinds = [label_of[one["category_id"]] for one in found]
        pixels = Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())
        shown.append(_drawn(pixels, sample.boxes, sample.labels.tolist(), data.classes))
        shown.append(_drawn(pixels, boxes, kinds, data.classes, [one["score"] for one in found]))
    return contact_sheet(shown, 4, title="objects, and beside them what is found") if shown else None


def _corners(boxes: Tensor) -> Tensor:
    """xyxy of boxes (x, y, width, height)."""
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def _drawn(
    image: Image.Image, boxes: Tensor, labels: list[int], names: Sequence[str], scores: list[float] | None = None
) -> Image.Image:
    scale = SIDE / max(image.size)
    return draw_detections(image, boxes.tolist(), labels, [names[label] for label in labels], scores, scale=scale)


def _columns(path: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = defaultdict(list)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    columns[name].append(float(value))
    return columns


def _figure(rows: int, columns: int, height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _image(figure: Any) -> Image.Image:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return Image.open(content).convert("RGB")
