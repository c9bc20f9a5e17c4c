# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision of a detector, or of stored detections, by faster-coco-eval or pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import gfl_ops

from .. import files
from ..config import Config
from ..data.coco import Annotations, CocoDataset, check_detections, coco_detection, read_annotations
from ..data.loader import Batch, test_loader
from ..data.transforms import normalise
from ..data.values import ImageId
from ..models.fused import FusedGFL
from .distributed import current_device
from .pipeline import InputBatch, Pipeline, fetch, testing
from .quality import AREAS, POINT, curves
from .step import on_device

# In the order of pycocotools' own summary. AR100 is the share of the objects that 100 boxes per image find.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    config: Config,
    device: torch.device | str,
    progress: bool = True,
    save: Path | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Detects in all images of a data set and compares with its annotations.

    Where `torch.distributed` is initialised its processes share the batches, so the result is that of one process, and
    every process returns it. An image that can't be decoded has no detections; ``dataset.problems`` counts it.

    Args:
        model: a `gfl.models.gfl.GFL` or anything with its `forward`, in any mode. It detects by ``config.test``; its
            own mode and settings are restored.
        dataset: with as many classes as the model.
        config: sizes, batches and workers.
        device: the model's; if a GPU, collectives use it too.
        progress: show a progress bar, if standard error is a terminal.
        save: a JSON file for the detections, written before they are compared; while they come they are lines of JSON
            in a file beside it, one per process.

    Returns:
        Metrics as `coco_metrics` gives them, and the detections as `to_results` does, in the data set's order.

    Raises:
        ValueError: the model has another number of classes; an image or annotation is broken (see `CocoDataset`).
        RuntimeError: neither faster-coco-eval nor pycocotools is installed.
    """
    classes = getattr(getattr(model, "config", None), "num_classes", None)
    if classes not in (None, len(dataset.classes)):
        raise ValueError(f"the model has {classes} classes, {dataset.annotations.path} lists {len(dataset.classes)}")
    together = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    loader = test_loader(dataset, config, rank, world)
    with contextlib.ExitStack() as stack:
        add = stack.enter_context(files.lines(save.with_name(f"{save.stem}.partial-{rank}.jsonl"))) if save else None
        with current_device(device), testing(model, config.test), torch.no_grad():
            hidden = None if progress and rank == 0 else True
            batches = tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hidden)
            own = _detect(model, batches, torch.device(device), dataset.category_ids, add)

        everything: list[Any] = [(own, dataset.unreadable)] * world
        if together:
            with current_device(device):
                dist.all_gather_object(everything, (own, dataset.unreadable))
        for _, unreadable in everything:
            for path in sorted(unreadable):
                dataset.pass_over(path)
        place = {image: row for row, image in enumerate(dataset.image_ids)}
        results = sorted((d for part, _ in everything for d in part), key=lambda d: place[d["image_id"]])
        if save is not None and rank == 0:
            files.write_json(save, results)
    # What the first process computes, or its error, in all of them, so that none waits for one that failed.
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [coco_metrics(dataset.annotations, results, dataset.image_ids)]
        except Exception as error:
            outcome = [error]
    if together:
        with current_device(device):
            dist.broadcast_object_list(outcome, 0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0], results


def _detect(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    category_ids: Sequence[int],
    add: Callable[[Any], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections of all batches in COCO's format, each batch's given to `add`.

    A GPU computes one while those of the one before are read.
    """
    pipeline = Pipeline(model, device, graphs=True) if isinstance(model, FusedGFL) else None

    def start(batch: Batch) -> tuple[Callable[[], gfl_ops.Detections], list[ImageId]]:
        inputs = InputBatch(batch.images, batch.image_sizes, batch.scale_factors)
        if pipeline is not None:
            found = pipeline.run(inputs).detections
        else:
            found = model(normalise(*inputs[:2], getattr(model, "config", None)), *inputs[1:])
        return fetch(found, device), batch.image_ids

    own: list[dict[str, Any]] = []
    before: tuple[Callable[[], gfl_ops.Detections], list[ImageId]] | None = None
    for batch in chain(on_device((batch for batch in batches if batch.image_ids), device), [None]):
        started = None if batch is None else start(batch)
        if before is not None:
            wait, image_ids = before
            results = to_results(wait(), image_ids, category_ids)
            own += results
            if add is not None:
                add(results)
        before = started
    return own


def coco_metrics(
    annotations: str | Path | Annotations,
    detections: Sequence[Mapping[str, Any]],
    image_ids: Iterable[ImageId] | None = None,
) -> dict[str, float]:
    """The twelve figures of pycocotools for boxes, by the names of `METRICS`; NaN where there is no object to find.

    After them come `quality.POINT`: precision, recall and F1 at an IoU of 0.5, means over the classes, and the score
    threshold at which that F1 is highest.

    Args:
        annotations: the file or what was read from it. Numbers are exactly pycocotools' for a file that it can read,
            or with faster-coco-eval the same to twelve digits.
        detections: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``; may be empty.
        image_ids: the images that count; None: all of the annotations.

    Raises:
        OSError, ValueError: as `read_annotations`; an image that the annotations don't know.
        RuntimeError: neither faster-coco-eval nor pycocotools is installed.
    """
    evaluation = coco_evaluation(annotations, detections, image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    # faster-coco-eval has more figures after these.
    figures = {name: _figure(value) for name, value in zip(METRICS, evaluation.stats)}
    return figures | curves(evaluation).best()


def class_metrics(
    annotations: str | Path | Annotations,
    detections: Sequence[Mapping[str, Any]],
    image_ids: Iterable[ImageId] | None = None,
) -> dict[str, float]:
    """AP of each category by name, in the order of the labels; arguments and errors as for `coco_metrics`.

    Where two categories share a name, each name ends with its category's id.
    """
    annotations = read_annotations(annotations)
    evaluation = coco_evaluation(annotations, detections, image_ids)
    return dict(zip(annotations.distinct_names(), class_figures(evaluation), strict=True))


def class_figures(evaluation: Any) -> list[float]:
    """AP of each category of a `coco_evaluation`."""
    # [IoU thresholds, recalls, categories, areas, limits of detections]
    precision = torch.as_tensor(evaluation.eval["precision"])
    of_class = precision[:, :, :, 0, -1].permute(2, 0, 1).flatten(1)
    return [_figure(values.mean()) for values in of_class]


def coco_evaluation(
    annotations: str | Path | Annotations,
    detections: Sequence[Mapping[str, Any]],
    image_ids: Iterable[ImageId] | None = None,
) -> Any:
    """A ``COCOeval`` of boxes, evaluated and accumulated; arguments and errors as for `coco_metrics`.

    It is faster-coco-eval's where that is installed, seven times as fast with the same figures, or pycocotools'.
    """
    COCO, COCOeval = _package()
    annotations = read_annotations(annotations)
    detections = check_detections(detections, annotations)
    truth, found = COCO(), COCO()
    truth.dataset = annotations.to_coco()
    # Numbers in the order of the ids, which may be texts.
    number_of = {image: number for number, image in enumerate(sorted(annotations.image_ids), 1)}
    for image in truth.dataset["images"]:
        image["id"] = number_of[image["id"]]
    for one in (*truth.dataset["annotations"], *detections):
        one["image_id"] = number_of[one["image_id"]]
    found.dataset = {**truth.dataset, "annotations": detections}
    for number, d in enumerate(detections, 1):
        d |= {"id": number, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(number_of[image] for image in image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _package() -> tuple[Any, Any]:
    try:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    except ImportError:
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    except ImportError as error:
        raise RuntimeError(f"an evaluation needs the package faster-coco-eval or pycocotools: {error}") from None


def to_results(
    detections: gfl_ops.Detections, image_ids: Sequence[ImageId], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """`Detections` of a batch in COCO's format, (x, y, width, height) instead of corners."""
    boxes, scores, labels, count = (tensor.tolist() for tensor in detections[:4])
    return [
        coco_detection(image_ids[row], category_ids[label], box, score)
        for row, used in enumerate(count)
        for box, score, label in zip(boxes[row][:used], scores[row], labels[row])
    ]


def table(metrics: Mapping[str, float]) -> str:
    """Metrics of `coco_metrics` in four lines of less than 80 columns, "–" where there is no object."""
    lines = []
    for keys in (METRICS[:6], METRICS[6:]):
        names = (*keys[:3], "small", "medium", "large")
        lines += ["".join(f"{name:>9}" for name in names), "".join(f"{shown(metrics[key]):>9}" for key in keys)]
    return "\n".join(lines)


def class_table(metrics: Mapping[str, float]) -> str:
    """Metrics of `class_metrics` in two columns, 80 characters wide together."""
    names = [name if len(name) <= 28 else name[:27] + "…" for name in metrics]
    cells = [f"  {name:<28} {shown(value):>6}" for name, value in zip(names, metrics.values())]
    half = -(-len(cells) // 2)
    return "\n".join("".join(cells[row::half]).rstrip() for row in range(half))


def point_line(metrics: Mapping[str, float]) -> str:
    """Precision, recall and F1 of `coco_metrics` in a line."""
    if math.isnan(metrics["threshold"]):
        return "no object to find: no precision, recall and F1"
    figures = ", ".join(f"{name} {metrics[name]:.4f}" for name in POINT[:3])
    return f"{figures} at IoU 0.5 and scores from {metrics['threshold']:.2f} on"


def quality_table(names: Sequence[str], evaluation: Any, threshold: float) -> str:
    """Precision, recall and F1 at a score threshold, of each class and of each size, 59 characters wide."""
    at = curves(evaluation).at(threshold)
    rows = [(name, at[:, label, 0]) for label, name in enumerate(names)]
    rows += [(f"{area} objects", at[:, :, size].nanmean(1)) for size, area in enumerate(AREAS)]
    lines = ["  " + " " * 28 + "".join(f"{name:>10}" for name in POINT[:3])]
    for name, values in rows:
        short = name if len(name) <= 28 else name[:27] + "…"
        lines.append(f"  {short:<28}" + "".join(f"{shown(value):>10}" for value in values.tolist()))
    return "\n".join(lines)


def shown(value: float) -> str:
    """A metric in four digits, "–" for NaN."""
    return "–" if math.isnan(value) else f"{value:.4f}"


def _figure(value: Any) -> float:
    # pycocotools gives −1 where there is nothing to find, which averages and plots would take for a value.
    return float(value) if value >= 0 else math.nan
