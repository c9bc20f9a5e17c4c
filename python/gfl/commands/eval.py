# SPDX-License-Identifier: Apache-2.0
"""``gfl eval``: COCO's average precision of a checkpoint, or of a file of detections."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config as configuration

if TYPE_CHECKING:
    from ..data.coco import CocoDataset

HELP = "evaluate a checkpoint, or a file of detections, by COCO's average precision"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="the detector to evaluate")
    parser.add_argument(
        "--detections", metavar="FILE", help="evaluate these detections instead, a JSON file in COCO's result format"
    )
    parser.add_argument("--annotations", metavar="FILE", help="annotation file that --detections are compared with")
    parser.add_argument("--per-class", action="store_true", help="show the AP of each class too")
    parser.add_argument("--output", metavar="FILE", help="write the metrics to this JSON file")
    parser.add_argument(
        "--save-detections",
        metavar="FILE",
        help="write what the checkpoint detects to this JSON file, in COCO's format",
    )
    parser.add_argument(
        "--optimize",
        action="store_true",
        help="evaluate the detector with its norms folded in, as in `gfl detect`: quicker",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N [cuda if there is one]")
    configuration.add_options(parser, "data", "test")


def run(options: argparse.Namespace) -> int:
    for file in (options.output, options.save_detections):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"{Path(file).parent}, the folder of {file}, is not there")
    if options.detections is not None:
        return _of_file(options)
    if options.checkpoint is None:
        raise ValueError("a CHECKPOINT is needed, or --detections FILE and --annotations FILE")
    if options.annotations is not None:
        raise ValueError("`--annotations` is for --detections; a CHECKPOINT takes --data and --val-annotations")
    return _of_checkpoint(options)


def _of_file(options: argparse.Namespace) -> int:
    from ..data.coco import read_annotations, read_detections
    from ..engine import evaluate

    if options.annotations is None:
        raise ValueError("`--detections` needs --annotations FILE")
    if options.checkpoint is not None or options.save_detections is not None or options.optimize:
        raise ValueError("`--detections` goes without a CHECKPOINT, --save-detections and --optimize")
    annotations = read_annotations(options.annotations)
    detections = read_detections(options.detections, annotations)
    _say(f"{len(detections)} detections, {len(annotations.image_ids)} images", annotations.problems)
    _report(options, evaluate.coco_metrics(annotations, detections))
    if options.per_class:
        print(evaluate.class_table(evaluate.class_metrics(annotations, detections)))
    return 0


def _of_checkpoint(options: argparse.Namespace) -> int:
    from ..checkpoint import model_from
    from ..data.loader import validation_dataset
    from ..engine import evaluate
    from ..engine.distributed import processes
    from ..models.fused import FusedGFL

    model, stored, classes, _ = model_from(options.checkpoint)
    config = configuration.overrides(stored, options)
    dataset = validation_dataset(config)
    _check_classes(options.checkpoint, classes, dataset)
    if options.optimize:
        model = FusedGFL(model)
    with processes(options.device) as process:
        metrics, detections = evaluate.evaluate(model.to(process.device), dataset, config, process.device)
        if not process.main:
            return 0
        _say(f"{len(detections)} detections, {len(dataset)} images", dataset.problems)
        _report(options, metrics)
        if options.per_class:
            print(evaluate.class_table(evaluate.class_metrics(dataset.annotations, detections)))
        if options.save_detections is not None:
            Path(options.save_detections).write_text(json.dumps(detections))
    return 0


def _check_classes(checkpoint: str, classes: list[str] | None, dataset: CocoDataset) -> None:
    """Labels mean nothing but by their order, so the names must be the same in the same order."""
    if classes is None or classes == dataset.classes:
        return
    if len(classes) != len(dataset.classes):
        raise ValueError(
            f"{checkpoint} was trained on {len(classes)} classes, {dataset.annotations.path} lists "
            f"{len(dataset.classes)}"
        )
    label = next(c for c, (one, other) in enumerate(zip(classes, dataset.classes)) if one != other)
    raise ValueError(
        f"class {label} of {checkpoint} is {classes[label]!r}, that of {dataset.annotations.path} is "
        f"{dataset.classes[label]!r}"
    )


def _say(what: str, problems: Mapping[str, int]) -> None:
    print(what)
    for problem, number in problems.items():
        print(f"{number} {problem}")


def _report(options: argparse.Namespace, metrics: dict[str, float]) -> None:
    from ..engine import evaluate

    print(evaluate.table(metrics))
    if options.output is not None:
        values: dict[str, Any] = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        Path(options.output).write_text(json.dumps(values, indent=2) + "\n")
