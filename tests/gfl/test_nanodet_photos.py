# SPDX-License-Identifier: Apache-2.0
"""From JPEG files to COCO's AP with NanoDet-Plus's real weights, in every way that a detector runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gfl
import gfl_ops
from gfl import checkpoint
from gfl.cli import main
from gfl.data import transforms
from gfl.data.coco import CocoDataset, coco_detection
from gfl.engine import export
from gfl.engine.evaluate import coco_metrics

pytest.importorskip("pycocotools", reason="pycocotools is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

PRESET, SIZE = "nanodet_plus_m_416", (416, 416)
# Of an independent program, from the same files; what decoders, resizing and rounding may change.
AP, TOLERANCE = 0.3644, 0.003
# Per photo, best first.
Found = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    path = data / "nanodet_plus" / "nanodet_plus_m_416.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.fixture(scope="module")
def photos(data: Path) -> CocoDataset:
    folder = data / "coco_val2017_47"
    return CocoDataset(folder / "instances_val2017_47.json", folder / "images")


def average_precision(photos: CocoDataset, found: Iterator[Found]) -> float:
    results: list[dict[str, Any]] = []
    for image, (boxes, scores, labels) in zip(photos.image_ids, found, strict=True):
        ids = (photos.category_ids[label] for label in labels.tolist())
        results += [coco_detection(image, *one) for one in zip(ids, boxes.tolist(), scores.tolist())]
    return coco_metrics(photos.annotations, results, photos.image_ids)["AP"]


# One way in each run of the tests, with the network and the files that are read; the others with `-m slow`.
@pytest.mark.parametrize(
    "option", [["--optimize"], pytest.param([], marks=pytest.mark.slow)], ids=["optimize", "plain"]
)
def test_the_command_evaluates(weights: Path, photos: CocoDataset, option: list[str], tmp_path: Path) -> None:
    folder, output = photos.annotations.path.parent, tmp_path / "metrics.json"
    what = ["--val-annotations", photos.annotations.path.name, "--val-images", "images", "--workers", "0"]
    command = ["eval", str(weights), "--config", PRESET, "--data", str(folder), *what, "--output", str(output)]
    assert main([*command, *option, "--device", "cpu"]) == 0
    assert json.loads(output.read_text())["AP"] == pytest.approx(AP, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True], ids=["plain", "optimize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_detector_detects(weights: Path, photos: CocoDataset, optimize: bool, dtype: torch.dtype) -> None:
    detector = gfl.Detector(weights, "cpu", dtype, config=gfl.preset(PRESET), optimize=optimize)
    results = detector.stream([photos.path(i) for i in range(len(photos))])
    found = ((result.boxes, result.scores, result.labels) for result in results)
    assert average_precision(photos, found) == pytest.approx(AP, abs=TOLERANCE)


def onnx_program(model: gfl.models.GFL, file: Path) -> Callable[[Tensor], Found]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnxruntime

    export.to_onnx(model, file, SIZE)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Found:
        boxes, scores, labels = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        return boxes, scores, labels

    return run


def torch_program(model: gfl.models.GFL, file: Path) -> Callable[[Tensor], Found]:
    export.to_torch(model, file, SIZE)
    module, test = torch.export.load(file).module(), model.test

    def run(images: Tensor) -> Found:
        boxes, scores = module(images)
        limits = test.score_threshold, test.iou_threshold, test.max_detections
        return gfl_ops.multiclass_nms(boxes[0], scores[0], *limits)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("program", [onnx_program, torch_program], ids=["onnxruntime", "torch.export"])
def test_exported_files_detect(
    weights: Path,
    photos: CocoDataset,
    program: Callable[[gfl.models.GFL, Path], Callable[[Tensor], Found]],
    tmp_path: Path,
) -> None:
    model = checkpoint.model_from(weights, gfl.preset(PRESET), strict=True).model
    run = program(model, tmp_path / ("model.onnx" if program is onnx_program else "model.pt2"))

    def found() -> Iterator[Found]:
        for i in range(len(photos)):
            image = transforms.read_image(photos.path(i))
            resized = transforms.resize(image, *SIZE, stretch=True)
            batch, sizes = transforms.pad([resized], 32)
            boxes, scores, labels = run(transforms.normalise(batch, sizes, model.config))
            yield boxes * torch.tensor([image.shape[2] / SIZE[1], image.shape[1] / SIZE[0]]).repeat(2), scores, labels

    assert average_precision(photos, found()) == pytest.approx(AP, abs=TOLERANCE)


def test_the_keys_are_the_official_ones(weights: Path) -> None:
    with torch.device("meta"):
        own = gfl.create_model(PRESET).state_dict()
    read = checkpoint.normalise(checkpoint.read(weights))
    assert read.source == "NanoDet-Plus" and len(own) == 645
    assert {key: value.shape for key, value in own.items()} == {k: v.shape for k, v in read.state_dict.items()}
