# SPDX-License-Identifier: Apache-2.0
"""`gfl.Detector` on a GPU, by a stand-in for CUDA: devices, streams, graphs, threads, and what is done ahead."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fake_cuda
import numpy as np
import pytest
import real_data
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gfl_ops
from gfl import checkpoint, cli, threads
from gfl.config import preset
from gfl.data import transforms
from gfl.detector import IN_FLIGHT, Detector, Result, find_images
from gfl.engine import pipeline
from gfl.engine.graphs import GraphCache
from gfl.models import GFL
from gfl.models.autotune import CudnnTuning
from gfl_ops.core import checks

Cuda = fake_cuda.FakeCuda


def assert_same(found: Sequence[Result], wanted: Sequence[Result]) -> None:
    assert [r.path for r in found] == [r.path for r in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert len(one) == len(other)
        # Images are resized in floating point there, which is a level of a pixel from the CPU's.
        torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=2e-2)


@pytest.fixture(autouse=True)
def small_input(model: GFL) -> None:
    model.test.short_side = model.test.long_side = 64
    model.test.size_divisor = 16


@pytest.fixture
def same_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's resizing is the CPU's, so that results can be compared bit for bit."""
    real = transforms.resize
    monkeypatch.setattr(transforms, "resize", lambda *args, fp32=False, **how: real(*args, **how))


@pytest.mark.parametrize("how", ["plain", "optimize", "compile"])
def test_convolutions_run_while_cudnn_times_its_algorithms(
    how: str, model: GFL, folder: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning, on = CudnnTuning.__call__, []

    def on_a_gpu(self: CudnnTuning, x: Tensor) -> Any:
        return tuning(self, cast(Tensor, SimpleNamespace(is_cuda=True, shape=x.shape)))

    monkeypatch.setattr(CudnnTuning, "__call__", on_a_gpu)

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "convolution" in function.name():
                on.append(torch.backends.cudnn.benchmark)
            return function(*args, **(kwargs or {}))

    def compiled(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    detector = Detector(model, "cuda:1", optimize=how != "plain", compile=how == "compile")
    with Spy():
        detector(find_images(folder)[0])
    assert on and all(on) and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("optimize", [False, True])
def test_everything_happens_on_the_detectors_device(
    optimize: bool, model: GFL, folder: Path, cuda: Cuda, same_resize: None
) -> None:
    files = find_images(folder)
    wanted = Detector(model, "cpu", optimize=optimize)(files)
    cuda.actions.clear()
    detector = Detector(model, "cuda:1", batch_size=2, optimize=optimize)
    for _ in range(3 if optimize else 1):
        for one, other in zip(detector(files, edges=True), wanted, strict=True):
            # Groups of two are computed in other orders of sums.
            torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)
            assert one.edges is not None and one.edges.probabilities.shape == (len(one), 4, 17)
    assert cuda.current_device() == 0 and cuda.chosen == []
    assert {action.stream.device.index for action in cuda.actions if action.what != "to"} == {1}
    assert {action.device for action in cuda.actions if action.what in ("pinned", "fetch", "event")} == {1}
    kinds = collections.Counter(action.what for action in cuda.actions)
    assert kinds["event"] and kinds["fetch"] and kinds["pinned"]
    assert len(cuda.captures) == (3 if optimize else 0)
    for capture in cuda.captures:
        # The stream is the detector's own; pinning memory in another thread must not break the capture.
        assert capture["device"] == 1 and capture["mode"] == "thread_local"
        assert capture["stream"].device.index == 1 and capture["stream"] is not cuda.current_stream(1)


def test_without_kernels_that_a_graph_can_hold_there_is_none(
    model: GFL, folder: Path, cuda: Cuda, same_resize: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_images(folder)[:2]
    detector = Detector(model, "cuda:1", optimize=True, batch_size=1)
    with gfl_ops.set_backend("reference"):  # it reads back what it computes, which a capture refuses
        for _ in range(3):
            wanted = detector(files)
    assert cuda.captures == [] and len(wanted) == 2
    with monkeypatch.context() as patch:
        patch.setattr(checks, "SYNCHRONISING", True)
        for _ in range(3):
            detector(files)
    assert cuda.captures == []
    for _ in range(3):
        found = detector(files)
    assert len(cuda.captures) == 2
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


class Meeting:
    """A recording in which two threads meet, if they can, after both have written their inputs."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, [x.clone() for x in inputs]
        self.both = threading.Barrier(2, timeout=0.5)

    def __call__(self, *inputs: Tensor) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        try:
            self.both.wait()
        except threading.BrokenBarrierError:
            self.both.reset()
        return self.function(*self.inputs)


def test_two_threads_get_their_own_boxes(model: GFL, folder: Path, cuda: Cuda) -> None:
    detector = Detector(model, "cuda", optimize=True)
    bright, dark = (np.asarray(Image.open(folder / "a.jpg").point(lambda x, f=f: x * f)) for f in (1.0, 0.3))
    wanted = [detector(image) for image in (bright, dark)]
    detector._pipeline.graphs = GraphCache(record=Meeting)
    detector(bright)
    detector(dark)  # recorded from here on
    found: dict[int, Any] = {}

    def use(number: int) -> None:
        found[number] = detector((bright, dark)[number])

    users = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not torch.equal(wanted[0].scores[:3], wanted[1].scores[:3])
    for number in range(2):
        assert torch.equal(found[number].boxes, wanted[number].boxes)
        assert torch.equal(found[number].scores, wanted[number].scores)


def test_two_detectors_of_one_model_keep_their_thresholds(model: GFL, folder: Path, monkeypatch: Any) -> None:
    """The model's settings are changed for the time of a batch: threads must not see each other's."""
    image, both, predict = np.asarray(Image.open(folder / "a.jpg")), threading.Barrier(2, timeout=0.5), GFL.predict_maps
    best = float(Detector(model)(image).scores[0])
    detectors = [Detector(model, score_threshold=threshold) for threshold in (best / 2, best + 1e-3)]
    wanted = [len(detector(image)) for detector in detectors]

    def slow(self: GFL, images: Tensor) -> Any:
        try:
            both.wait()
        except threading.BrokenBarrierError:
            both.reset()
        return predict(self, images)

    monkeypatch.setattr(GFL, "predict_maps", slow)
    found: dict[int, int] = {}
    users = [threading.Thread(target=lambda n=n: found.update({n: len(detectors[n](image))})) for n in range(2)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert wanted[0] > wanted[1] == 0 and found == dict(enumerate(wanted))


class Counting:
    """Stands for a graph, and counts them."""

    def __init__(self) -> None:
        self.made: list[tuple[int, ...]] = []

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.made.append(tuple(inputs[0].shape))
        return function


Batches = list[tuple[tuple[int, ...], list[list[float]]]]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The shapes of all batches and the sizes of their images; no network looks at them."""
    found: Batches = []

    def predict(
        self: Any, images: Tensor, inner: Tensor, *, edges: bool, without: tuple[int, ...]
    ) -> pipeline.Predictions:
        found.append((tuple(images.shape), inner.tolist()))
        rows = torch.zeros(len(images), 1)
        boxes, count = torch.zeros(len(images), 1, 4), torch.zeros(len(images), dtype=torch.int32)
        return pipeline.Predictions(gfl_ops.Detections(boxes, rows, rows.long(), count, rows.long()), None)

    monkeypatch.setattr(pipeline.Pipeline, "_predict", predict)
    return found


def photo_sizes(number: int, seed: int) -> list[tuple[int, int]]:
    """(height, width) of so many photos, drawn from those of the real data."""
    content = json.loads(real_data.annotations().read_text())
    return random.Random(seed).choices([(image["height"], image["width"]) for image in content["images"]], k=number)


@pytest.mark.skipif(real_data.missing() is not None, reason=str(real_data.missing()))
@pytest.mark.parametrize("batch_size", [8, 16])
def test_five_thousand_photos_need_few_graphs(
    batch_size: int, model: GFL, cuda: Cuda, batches: Batches, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """All of the detector but reading and resizing, for which tensors of the right shapes stand, and the network."""
    model.test.short_side, model.test.long_side, model.test.size_divisor = 800, 1333, 32
    sizes = photo_sizes(5000, seed)
    nothing = torch.zeros((), dtype=torch.uint8)

    def pad(images: Sequence[Tensor], divisor: int) -> tuple[Tensor, Tensor]:
        inner = [tuple(image.shape[1:]) for image in images]
        height, width = (-(-max(side) // divisor) * divisor for side in zip(*inner))
        return nothing.expand(len(images), 3, height, width), torch.tensor(inner)

    monkeypatch.setattr(transforms, "read_image", lambda path: nothing.expand(3, *sizes[int(path.stem)]))
    monkeypatch.setattr(transforms, "resize", lambda image, *size, **more: nothing.expand(3, *size))
    monkeypatch.setattr(transforms, "pad", pad)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    detector = Detector(model, "cuda", batch_size=batch_size, optimize=True)
    record = Counting()
    detector._pipeline.graphs = GraphCache(device=detector.device, record=record)
    results = detector.stream([Path(f"{number}.jpg") for number in range(5000)])
    assert [result.size for result in results] == sizes
    assert len(record.made) <= 25 and len(record.made) == len(set(record.made))
    # Nearly all batches are replayed, few rows are empty, and no image is padded further than it is alone.
    eager = len({shape for shape, _ in batches})
    assert len(batches) - eager > 0.97 * len(batches)
    rows = sum(shape[0] for shape, _ in batches)
    assert rows <= 1.1 * 5000
    for (_, _, height, width), inner in batches:
        for h, w in inner:
            assert (-(-h // 32) * 32, -(-w // 32) * 32) == (height, width) or (h, w) == (1, 1)


def test_files_are_read_ahead_in_threads(model: GFL, folder: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    files, read, readers = find_images(folder) * 2, transforms.read_image, set()

    def watched(path: Path) -> Tensor:
        readers.add(threading.current_thread())
        return read(path)

    monkeypatch.setattr(transforms, "read_image", watched)
    wanted = Detector(model, "cpu")(files)
    assert readers == {threading.current_thread()}
    readers.clear()
    results = Detector(model, "cuda", batch_size=2).stream(files)
    first = next(results)
    assert readers and threading.current_thread() not in readers
    assert_same([first, *results], wanted)
    # What is in memory may be one lazily read image, given several times.
    lazy = [Image.open(folder / "a.jpg")] * 4
    for one in Detector(model, "cuda", batch_size=2)(lazy):
        assert len(one) == len(wanted[0])
    with pytest.raises(ValueError, match="nowhere"):
        Detector(model, "cuda")([files[0], "nowhere.jpg", files[0]])
    broken: list[tuple[Any, str]] = []
    mixed = [files[0], "no.jpg", files[1]]
    kept = list(Detector(model, "cuda").stream(mixed, on_error=lambda *given: broken.append(given)))
    assert [r.path for r in kept] == files[:2] and broken[0][0] == "no.jpg" and "can't be read" in broken[0][1]


def test_an_odd_image_does_not_hold_the_others_back(model: GFL, cuda: Cuda, batches: Batches) -> None:
    odd, usual = np.zeros((40, 90, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    taken: list[int] = []

    class Sources(list[np.ndarray]):
        def __iter__(self) -> Iterator[np.ndarray]:
            for number, source in enumerate(super().__iter__()):
                taken.append(number)
                yield source

    results = Detector(model, "cuda", batch_size=2).stream(Sources([odd] + [usual] * 50))
    assert next(results).size == (40, 90)
    # Four batches of two until it is started, the one that had been started before, and what is ahead in the iteration.
    assert len(taken) <= 4 * 2 + 2 * IN_FLIGHT + 2 * threads.cores() + 2
    assert len(list(results)) == 50


def test_a_gpu_without_a_number_is_the_current_one(model: GFL, cuda: Cuda) -> None:
    with torch.cuda.device(1):
        assert Detector(model, "cuda").device == torch.device("cuda:1")
    assert Detector(model, "cuda").device == torch.device("cuda:0")


def test_pictures_are_drawn_beside_the_detector_from_files_read_once(
    model: GFL, folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, file = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("model") / "best.pt"
    config = dataclasses.replace(preset("gfl_tiny"), model=model.config)
    checkpoint.write(file, {"meta": checkpoint.meta(config, ["a", "b", "c"]), "state_dict": model.state_dict()})
    draw, read, drawing, reads = Result.draw, transforms.read_image, set(), []

    def noted(result: Result, *rest: Any) -> Image.Image:
        drawing.add(threading.current_thread())
        return draw(result, *rest)

    monkeypatch.setattr(Result, "draw", noted)
    monkeypatch.setattr(transforms, "read_image", lambda path: reads.append(path) or read(path))
    assert cli.main(["detect", str(file), str(folder), "--out", str(out), "--device", "cpu"]) == 0
    assert drawing and threading.current_thread() not in drawing
    assert reads == find_images(folder)
    assert sorted(path.name for path in out.glob("*.jpg")) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
