# SPDX-License-Identifier: Apache-2.0
"""``gfl eval``: COCO's average precision of a checkpoint, or of a file of detections."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import config as configuration
from .. import files
from ..files import say
from . import add_config, check_kernels, given_config

if TYPE_CHECKING:
    from ..data.coco import Annotations, CocoDataset

    # Data, detections, metrics.
    Found = tuple[Annotations | CocoDataset, list[dict[str, Any]], dict[str, float]]

HELP = "evaluate a checkpoint or detections by COCO's AP"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "gfl eval CHECKPOINT [--data DIR] [option …]\n       gfl eval --detections FILE --annotations FILE [option …]"
    )
    parser.epilog = "Options from --data on default to the checkpoint's configuration; brackets show gfl_r50_1x's."
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="detector to evaluate")
    parser.add_argument("--detections", metavar="FILE", help="evaluate this file of COCO's result format or gfl detect")
    add_config(parser)
    parser.add_argument("--annotations", metavar="FILE", help="annotations that --detections are compared with")
    parser.add_argument("--per-class", action="store_true", help="show AP, precision, recall, F1 of each class too")
    parser.add_argument("--out", metavar="FILE", help="write the metrics to this JSON file")
    parser.add_argument("--output", dest="out", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # the former name
    parser.add_argument("--save-detections", metavar="FILE", help="write the detections in COCO's result format")
    parser.add_argument("--optimize", action="store_true", help="fold batch norms into convolutions: faster")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … [a GPU if there is one]")
    first, hidden = ("data", "val_annotations", "val_images"), ("train_annotations", "train_images", "keep_empty")
    configuration.add_options(parser, "data", "test", first=first, hidden=hidden)


def run(options: argparse.Namespace) -> int:
    _check_outputs(options, options.checkpoint, options.detections, options.annotations, options.config)
    found = _of_checkpoint(options) if options.detections is None else _of_file(options)
    if found is None:  # another process reports
        return 0
    from ..engine import evaluate

    data, detections, metrics = found
    if options.out is not None:
        values = {key: None if math.isnan(value) else value for key, value in metrics.items()}
        files.write_json(options.out, values, indent=2)
    say(f"{len(detections)} detections, {len(data.image_ids)} images")
    for line in data.problems.lines():
        say(line)
    say(evaluate.table(metrics))
    say(evaluate.point_line(metrics))
    if options.per_class:
        whole: Any = getattr(data, "annotations", data)
        evaluation = evaluate.coco_evaluation(whole, detections)
        names = whole.distinct_names()
        say(evaluate.class_table(dict(zip(names, evaluate.class_figures(evaluation), strict=True))))
        say(evaluate.quality_table(names, evaluation, metrics["threshold"]))
    return 0


def _check_outputs(options: argparse.Namespace, *inputs: str | Path | None) -> None:
    for option in ("--out", "--save-detections"):
        if (file := getattr(options, option[2:].replace("-", "_"))) is not None:
            files.check_output(file, option, inputs, ".json")


def _of_file(options: argparse.Namespace) -> Found:
    if options.annotations is None:
        raise ValueError("`--detections` needs --annotations FILE")
    if options.checkpoint is not None or options.save_detections is not None or options.optimize:
        raise ValueError("`--detections` goes without a CHECKPOINT, --save-detections and --optimize")
    from ..data.coco import read_annotations, read_detections
    from ..engine import evaluate

    annotations = read_annotations(options.annotations)
    detections = read_detections(options.detections, annotations)
    return annotations, detections, evaluate.coco_metrics(annotations, detections)


def _of_checkpoint(options: argparse.Namespace) -> Found | None:
    if options.checkpoint is None:
        raise ValueError("a CHECKPOINT is needed, or --detections FILE and --annotations FILE")
    if options.annotations is not None:
        raise ValueError("`--annotations` is for --detections; a CHECKPOINT takes --data and --val-annotations")
    from ..checkpoint import model_from
    from ..data.loader import validation_dataset
    from ..engine import evaluate
    from ..engine.distributed import processes
    from ..models.fused import FusedGFL

    model, stored, classes, _ = model_from(options.checkpoint, given_config(options), strict=True)
    config = configuration.overrides(stored, options)
    root = Path(config.data.data)
    _check_outputs(options, *(root / getattr(config.data, name) for name in ("val_annotations", "val_images")))
    data = validation_dataset(config, classes)
    _check_classes(options.checkpoint, classes, data)
    check_kernels(options.device)
    with processes(options.device) as process:
        network = (FusedGFL(model) if options.optimize else model).to(process.device)
        save = None if options.save_detections is None else Path(options.save_detections)
        metrics, detections = evaluate.evaluate(network, data, config, process.device, save=save)
        return (data, detections, metrics) if process.main else None


def _check_classes(checkpoint: str, classes: list[str] | None, data: CocoDataset) -> None:
    """Labels are positions in a list of names, so the names must be the same in the same order."""
    there, path = data.classes, data.annotations.path
    if classes is None or classes == there:
        return
    if len(classes) != len(there):
        raise ValueError(f"{checkpoint} was trained on {len(classes)} classes, {path} lists {len(there)}")
    label = next(c for c, (one, other) in enumerate(zip(classes, there)) if one != other)
    raise ValueError(f"class {label} of {checkpoint} is {classes[label]!r}, that of {path} is {there[label]!r}")
