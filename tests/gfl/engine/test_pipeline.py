# SPDX-License-Identifier: Apache-2.0
"""The pipeline: images onto the device, detections that are the plain model's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import fake_cuda
import pytest
import torch
from torch import Tensor

import gfl_ops
from gfl import Detector, checkpoint, cli
from gfl.config import Config
from gfl.data import transforms
from gfl.data.loader import validation_dataset
from gfl.engine.evaluate import evaluate
from gfl.engine.pipeline import Pipeline, fetch
from gfl.engine.train import LAST, train
from gfl.models.fused import FusedGFL

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: graphs, streams and pinned copies need one")


def random_images(generator: torch.Generator, *sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.mark.parametrize("divisor", [1, 32])
def test_resizing_on_the_device_is_within_a_level_of_the_cpus(
    divisor: int, generator: torch.Generator, device: torch.device
) -> None:
    given = random_images(generator, (50, 70), (33, 20), (64, 48), (1, 5))
    sizes = [(75, 105), (20, 12), (64, 48), (7, 35)]
    on_device = [transforms.resize(image.to(device), *s, fp32=True) for image, s in zip(given, sizes)]
    found, inner = transforms.pad(on_device, divisor)
    want, _ = transforms.pad([transforms.resize(p, *s) for p, s in zip(given, sizes)], divisor)
    assert found.shape == want.shape and found.dtype == torch.uint8 and found.device.type == device.type
    assert found.is_contiguous(memory_format=torch.channels_last) and inner.tolist() == [list(s) for s in sizes]
    # The CPU's takes its weights in fixed point.
    assert (found.cpu().int() - want.int()).abs().max() <= 1
    for row, (height, width) in zip(found, sizes):
        assert not row[:, height:].any() and not row[:, :, width:].any()


def test_settings_are_part_of_what_is_recorded(
    small: Callable[..., Config], generator: torch.Generator, cuda: fake_cuda.FakeCuda
) -> None:
    """A threshold that changes between two batches of one shape must not meet the other's recording."""
    from gfl.models import build

    config = small(num_classes=2)
    model = FusedGFL(build(config.model, config.test))
    torch.nn.init.normal_(model.bbox_head.gfl_cls.bias, generator=generator)
    assert Pipeline(model, torch.device("cpu"), graphs=True).graphs is None
    pipeline = Pipeline(model, torch.device("cuda:1"), graphs=True)
    batch = pipeline.load(random_images(generator, (64, 64)), [(64, 64)])
    everything = pipeline.run(batch).detections
    low, high = model.test.score_threshold, float(everything.scores[0, 0])
    for threshold in (low, high, high):
        model.test.score_threshold = threshold
        fewer = pipeline.run(batch).detections
    assert int(fewer.count) < int(everything.count) and len(cuda.captures) == 2
    model.test.score_threshold = low
    found, edges = pipeline.run(batch, edges=True)
    assert edges is not None and torch.equal(found.boxes, everything.boxes) and len(cuda.captures) == 2
    assert torch.equal(pipeline.run(batch).detections.boxes, everything.boxes) and len(cuda.captures) == 2


def test_detections_of_the_cpu_are_there_at_once() -> None:
    detections = gfl_ops.Detections(
        torch.rand(1, 2, 4), torch.rand(1, 2), torch.zeros(1, 2).long(), torch.ones(1), torch.zeros(1, 2)
    )
    assert all(a is b for a, b in zip(fetch(detections, torch.device("cpu"))(), detections))


@pytest.fixture
def trained(small: Callable[..., Config], tmp_path: Path) -> tuple[Path, Config]:
    """A detector that has learned something, with as many channels as the fast convolutions need."""
    config = small(
        epochs=25, lr_drops=(20,), lr=0.1, warmup_steps=20, width=16, neck_channels=64, head_channels=64, head_groups=8
    )
    train(config.replace(val_annotations=""), tmp_path / "run", device="cpu")
    return tmp_path / "run" / LAST, config


def test_average_precision_and_detections_are_the_plain_models(trained: tuple[Path, Config], tmp_path: Path) -> None:
    file, config = trained
    model = checkpoint.model_from(file)[0]
    dataset = validation_dataset(config)
    plain, _ = evaluate(model, dataset, config, "cpu", progress=False)
    fast, _ = evaluate(FusedGFL(model), dataset, config, "cpu", progress=False)
    assert plain["AP50"] > 0.1
    assert fast == pytest.approx(plain, abs=1e-3, nan_ok=True)
    output = tmp_path / "metrics.json"
    command = ["eval", str(file), "--optimize", "--device", "cpu", "--val-annotations", config.data.val_annotations]
    assert cli.main([*command, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {k: None if math.isnan(v) else v for k, v in fast.items()}
    images = [str(dataset.path(i)) for i in range(len(dataset))]
    for one, other in zip(Detector(model)(images), Detector(model, optimize=True, batch_size=3)(images)):
        assert one.path == other.path and one.size == other.size
        # Scores to the maps' error; near the threshold one may have a detection more.
        n = min(len(one), len(other))
        assert abs(len(one) - len(other)) <= 2 and n > 0
        torch.testing.assert_close(one.scores[:n], other.scores[:n], rtol=0, atol=1e-3)
        best = one.scores > 0.3
        assert torch.equal(one.labels[best], other.labels[best])
        # A hundredth of a pixel.
        torch.testing.assert_close(one.boxes[best], other.boxes[best], rtol=0, atol=1e-2)


@GPU
def test_a_graph_finds_what_the_plain_model_finds_cuda(trained: tuple[Path, Config]) -> None:
    file, config = trained
    dataset = validation_dataset(config)
    images = [str(dataset.path(i)) for i in range(len(dataset))]
    plain = Detector(file, "cuda", batch_size=1)(images)
    detector = Detector(file, "cuda", optimize=True, batch_size=2)
    for _ in range(3):
        for one, other in zip(plain, detector(images)):
            n = min(len(one), len(other))
            # TF32 in both, in other orders.
            torch.testing.assert_close(one.scores[:n], other.scores[:n], rtol=0, atol=2e-2)
    graphs = detector._pipeline.graphs
    assert graphs is not None and len(graphs) == 1


@GPU
def test_nothing_waits_for_the_gpu_but_the_detections_cuda(
    trained: tuple[Path, Config], generator: torch.Generator
) -> None:
    network = FusedGFL(checkpoint.model_from(trained[0])[0]).cuda()
    pipeline = Pipeline(network, torch.device("cuda"), graphs=True)
    given, sizes = random_images(generator, (50, 60), (60, 50)), [(64, 64)] * 2
    for _ in range(2):  # as it is, and captured
        pipeline.run(pipeline.load(given, sizes))
    torch.cuda.set_sync_debug_mode("error")
    try:
        wait = fetch(pipeline.run(pipeline.load(given, sizes)).detections, pipeline.device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wait().boxes.device.type == "cpu"
