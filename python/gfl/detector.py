# SPDX-License-Identifier: Apache-2.0
"""A trained model in use: images in, boxes in the images' own pixels out."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checkpoint, draw
from .config import Config, InferenceConfig, did_you_mean
from .data import transforms
from .engine.distributed import choose_device
from .engine.pipeline import Pipeline, Predictions, batches_by_shape, fetch, testing
from .models.fused import FusedGFL
from .models.gfl import GFL
from .result import Result as Result
from .result import Times
from .sources import Named, Source, Unread, find_images, in_memory, is_several
from .threads import MOST, cores, map_ahead

# Batches that a GPU has queued while the host reads images and results.
IN_FLIGHT = 2


class Detector:
    """Detects objects in images.

    Args:
        model: a `gfl.models.GFL`, the name of published weights (`gfl models` lists them), which are downloaded the
            first time, or the file of a checkpoint (this package's, mmdet's, …).
        device: to compute on; by default that of a given model, for a file the GPU if there is one.
        dtype: fp32, or bf16 or fp16 for mixed precision.
        classes: names, one per class; by default the checkpoint's, else "class 0", ….
        config: of a checkpoint that has weights alone: what they can't tell, such as the size of images.
        score_threshold: detections at or below it are dropped; by default the model's test setting.
        batch_size: images per batch, all of the same padded size; by default 1 on the CPU, 8 on a GPU.
        optimize: run a copy of the network with its norms folded in (`gfl.models.fused`), wholly in `dtype`; on a GPU
            as a CUDA graph per batch shape, from its second use on, with images resized there. Later changes of the
            weights have no effect. In fp32 the scores differ by about 1e-5.
        compile: with `optimize`, run the network by `torch.compile`: the first batch of each shape takes minutes.

    The model's test settings decide the size that images are scaled to. An image's result does not depend on the
    others in the call. Threads may share a detector, and detectors a model; their batches take turns.

    Raises:
        ValueError: a file that is not a checkpoint; a device that is not there; another number of names than of
            classes; no positive batch size; `compile` without `optimize`.
        TypeError: `dtype` is not one of the three.
    """

    def __init__(
        self,
        model: GFL | str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        classes: Sequence[str] | None = None,
        score_threshold: float | None = None,
        batch_size: int | None = None,
        optimize: bool = False,
        compile: bool = False,
        config: Config | None = None,
    ) -> None:
        ids: Sequence[int] | None = None
        if isinstance(model, GFL):
            self.model = model
            self.config = Config(model=model.config, test=model.test) if config is None else config
        else:
            self.model, self.config, named, ids = checkpoint.model_from(model, config, strict=True)
            classes = named if classes is None else classes
        if device is None and self.model is model:
            self.device = next(self.model.parameters()).device
        else:
            # "cuda" is the current GPU, as in torch.
            current = torch.cuda.current_device() if torch.cuda.is_available() else 0
            self.device = choose_device(None if device is None else str(device), current)
        self.dtype = torch.float32 if dtype is None else dtype
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"gfl.Detector: `dtype` must be torch.float32, bfloat16 or float16, got {dtype}")
        self.model.to(self.device)
        count = self.model.config.num_classes
        self.classes = [f"class {i}" for i in range(count)] if classes is None else list(classes)
        if len(self.classes) != count:
            wanted = f"{count} names, as many as the model's"
            raise ValueError(f"gfl.Detector: `classes` must be {wanted}, got {len(self.classes)}")
        self.category_ids = list(range(1, count + 1)) if ids is None else list(ids)
        self.score_threshold = score_threshold
        self.batch_size = (8 if self.device.type == "cuda" else 1) if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f"gfl.Detector: `batch_size` must be at least 1, got {batch_size}")
        if compile and not optimize:
            raise ValueError("gfl.Detector: `compile` goes with `optimize=True`")
        self.optimize = optimize
        self._network = FusedGFL(self.model, self.dtype).to(self.device) if optimize else self.model
        self._pipeline = Pipeline(self._network, self.device, graphs=optimize, compile=compile)

    def __repr__(self) -> str:
        parts = (self.model.config.backbone, f"{len(self.classes)} classes", str(self.device), str(self.dtype)[6:])
        return f"Detector({', '.join(parts)}{', optimized' if self.optimize else ''})"

    def __call__(
        self,
        source: Source | Sequence[Source],
        *,
        edges: bool = False,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        max_detections: int | None = None,
    ) -> Result | list[Result]:
        """Detect the objects in one image, or in each of several.

        Args:
            source: one image: the path of a file, its bytes, a URL, a pillow image, a uint8 array ``[H, W, 3]`` in RGB,
                ``[H, W, 4]`` or ``[H, W]``, a uint8 tensor ``[3, H, W]``; or several: a sequence of such, a folder (its
                image files by name), a glob. Files and pillow images are turned upright as their EXIF orientation says.
            edges: also keep the distributions that the boxes were read from.
            score_threshold: instead of the detector's.
            classes: look for these alone, names or labels.
            max_detections: per image, instead of the model's.

        Returns:
            A `Result`, or for several a list of them in the given order. Files of a folder or glob that can't be
            decoded are left out with a warning.

        Raises:
            ValueError: a file that does not exist or can't be decoded (it is named; not in a folder or glob), an array
                or tensor of another shape, an unknown class.
            TypeError: neither of these kinds, or another dtype than uint8.
        """
        how: dict[str, Any] = {"edges": edges, "score_threshold": score_threshold, "classes": classes}
        how["max_detections"] = max_detections
        if is_several(source):

            def warn(_: Source, why: str) -> None:
                warnings.warn(why, stacklevel=6)  # where the detector was called

            paths: Any = source
            return list(self.stream(find_images(paths), on_error=warn, **how))
        if isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray, memoryview)):
            return list(self.stream(source, **how))
        return next(self.stream([source], **how))  # type: ignore[list-item]

    def stream(
        self,
        sources: Iterable[Source],
        *,
        edges: bool = False,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        max_detections: int | None = None,
        on_error: Callable[[Source, str], object] | None = None,
        keep_pixels: bool = False,
    ) -> Iterator[Result]:
        """The results of single images, one after another in their order, so that few images are held at a time.

        For a GPU files are read in threads, ahead of it.

        Args:
            sources: single images, as `__call__` takes them.
            edges, score_threshold, classes, max_detections: as for `__call__`.
            on_error: called with each source that can't be read and the reason; the source is then left out. By
                default a ValueError is raised.
            keep_pixels: hold the pixels of files in the results too, for pictures without reading them again.
        """
        wanted = self._wanted(edges, score_threshold, classes, max_detections)
        gpu = self.device.type == "cuda"
        loaded = self._read(sources, on_error, keep_pixels, min(MOST, cores()) if gpu else 0)
        running: deque[_Started] = deque()
        finished: dict[int, Result] = {}
        place = 0
        # So many that most shapes come often enough to fill a batch.
        for group in batches_by_shape(loaded, self._padded_size, self.batch_size, 4 * self.batch_size):
            running += self._start(group, wanted)
            while len(running) > (IN_FLIGHT if gpu else 0):
                finished |= self._finish(running.popleft())
            while place in finished:
                yield finished.pop(place)
                place += 1
        for started in running:
            finished |= self._finish(started)
        yield from (finished[place] for place in sorted(finished))

    def train(self, out: str | os.PathLike[str], *, device: str | None = None, **fields: Any) -> Detector:
        """Trains a copy of the model further, as ``gfl train --init`` does; returns a detector with the best weights.

        Args:
            out: folder of the training; ``gfl train --resume`` continues one that was stopped.
            device: by default the detector's.
            fields: any of `gfl.Config`: ``data``, ``train_annotations``, ``epochs`` and so on. Other classes than the
                detector's get a new class layer.

        Raises:
            ValueError, RuntimeError, OSError: as `gfl.train`.
        """
        from .engine.folder import BEST, LAST
        from .engine.train import train

        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        start = out / "start.pt"
        self.save(start)
        config = dataclasses.replace(self.config, model=self.model.config, test=self.model.test)
        train(config.replace(init=str(start), **fields), out, device=device or str(self.device))
        return Detector(out / (BEST if (out / BEST).exists() else LAST), self.device, self.dtype)

    def evaluate(
        self, annotations: str | os.PathLike[str], images: str | os.PathLike[str], **fields: Any
    ) -> dict[str, float]:
        """COCO's metrics on an annotation file and its folder of images; `fields` of `gfl.Config`, as ``workers=0``.

        Raises:
            ValueError, OSError, RuntimeError: as `gfl.evaluate`.
        """
        from .data.coco import CocoDataset
        from .engine.evaluate import evaluate

        config = dataclasses.replace(self.config, model=self.model.config, test=self.model.test).replace(**fields)
        data = CocoDataset(Path(annotations), Path(images))
        mixed = self.dtype != torch.float32 and not self.optimize
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            return evaluate(self._network, data, config, self.device)[0]

    def export(
        self,
        file: str | os.PathLike[str],
        *,
        format: str = "onnx",
        size: tuple[int, int] | None = None,
        batch: int | None = 1,
        outputs: str | None = None,
        input: str = "fp32",
    ) -> tuple[tuple[int, int], str]:
        """Writes the detector in its dtype as a file that runs without this package; see `gfl.engine.export`.

        Args:
            file: .onnx, or .pt2 of the other formats.
            format: one of `gfl.engine.export.FORMATS`.
            size: (height, width) of the input, multiples of 32; by default the test size.
            batch: images per call, None for any number.
            outputs: "maps", "decoded" or "detections"; by default detections of one image, decoded boxes of more.
            input: "fp32", normalised images, or of ONNX "uint8", pixels.

        Returns the `size` and the `outputs` that were taken. Raises ValueError for another format and what
        `gfl.engine.export` refuses, RuntimeError if a package that the format needs is not installed.
        """
        from .engine import export

        if format not in export.FORMATS:
            raise ValueError(f"gfl.Detector.export: `format` must be {', '.join(export.FORMATS)}, got {format!r}")
        if input != "fp32" and (input, format) != ("uint8", "onnx"):
            raise ValueError(f"gfl.Detector.export: `input` must be fp32, or of ONNX uint8, got {input!r}")
        test, divisor = self.model.test, self.model.test.size_divisor
        if size is None:
            size = (-(-test.short_side // divisor) * divisor, -(-test.long_side // divisor) * divisor)
        outputs = outputs or (export.DETECTIONS if batch == 1 else export.DECODED)
        how: dict[str, Any] = {"batch": batch, "outputs": outputs, "dtype": self.dtype}
        if format == "onnx":
            export.to_onnx(self.model, Path(file), size, classes=self.classes, pixels=input == "uint8", **how)
        else:
            how["compiled"] = format == "aotinductor"
            export.to_torch(self.model, Path(file), size, device=self.device, **how)
        return size, outputs

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes a checkpoint with configuration and classes; one named .safetensors is in that format."""
        config = dataclasses.replace(self.config, model=self.model.config, test=self.model.test)
        meta = checkpoint.meta(config, self.classes, self.category_ids)
        checkpoint.write(file, {"meta": meta, "state_dict": self.model.state_dict()})

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Writes a folder as the Hugging Face Hub has it; see `gfl.hub`. `push_to_hub` uploads it."""
        importlib.import_module("gfl.hub").HubDetector(self).save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the detector to the Hugging Face Hub; `options` are those of huggingface_hub's mixin."""
        return importlib.import_module("gfl.hub").HubDetector(self).push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Detector:
        """A detector from a repository of the Hugging Face Hub or a folder; `options` of this class, or ``revision``,
        ``token`` and the like of huggingface_hub's mixin.
        """
        return importlib.import_module("gfl.hub").HubDetector.from_pretrained(source, **options).detector

    def _read(
        self,
        sources: Iterable[Source],
        on_error: Callable[[Source, str], object] | None,
        keep_pixels: bool,
        threads: int,
    ) -> Iterator[_Loaded]:
        """The images that can be read; files in threads, what is in memory, which may be anyone's, in this one."""

        def attempt(source: Source) -> _Loaded | ValueError:
            try:
                return self._load(source, keep_pixels)
            except ValueError as error:
                return error

        def read(item: tuple[Source, _Loaded | ValueError | None]) -> tuple[Source, _Loaded | ValueError]:
            source, known = item
            return source, attempt(source) if known is None else known

        items = ((s, None if isinstance(s, (str, os.PathLike, Unread)) else attempt(s)) for s in sources)
        for source, loaded in map_ahead(read, items, threads):
            if not isinstance(loaded, ValueError):
                yield loaded
            elif on_error is None:
                raise loaded
            else:
                on_error(source, str(loaded))

    def _wanted(
        self,
        edges: bool,
        score_threshold: float | None,
        classes: Sequence[str | int] | None,
        max_detections: int | None,
    ) -> _Wanted:
        test = self.model.test
        least = self.score_threshold if score_threshold is None else score_threshold
        given: dict[str, Any] = {"score_threshold": least, "max_detections": max_detections}
        test = dataclasses.replace(test, **{name: value for name, value in given.items() if value is not None})
        without: tuple[int, ...] = ()
        if classes is not None:
            names = {name: label for label, name in reversed(list(enumerate(self.classes)))}
            labels = set()
            for one in classes:
                label = names.get(one, -1) if isinstance(one, str) else one
                if not 0 <= label < len(self.classes):
                    meant = did_you_mean(one, names) if isinstance(one, str) else ""
                    raise ValueError(f"gfl.Detector: `classes`: the model has no class {one!r}{meant}")
                labels.add(label)
            without = tuple(sorted(set(range(len(self.classes))) - labels))
        return _Wanted(edges, test, without)

    def _load(self, source: Source, keep_pixels: bool) -> _Loaded:
        begun = time.perf_counter()
        unread = Unread(source) if isinstance(source, (str, Path)) else source
        if isinstance(unread, os.PathLike):
            unread = Unread(os.fspath(unread))
        path, name = None, ""
        if isinstance(unread, Unread):
            path, name, pixels = unread.path, str(unread.place), unread.pixels()
        elif isinstance(unread, Named):
            name, pixels = unread.name, unread.pixels
        else:
            pixels = in_memory(unread)
        test = self.model.test
        height, width = int(pixels.shape[1]), int(pixels.shape[2])
        new = transforms.input_size((height, width), test.short_side, test.long_side, test)
        kept = pixels if not isinstance(unread, Unread) or keep_pixels else None
        staged = self._pipeline.stage(pixels)
        return _Loaded(path, name, (height, width), new, staged, kept, time.perf_counter() - begun)

    def _padded_size(self, one: _Loaded) -> tuple[int, ...]:
        """In multiples of the model's divisor."""
        return tuple(-(-side // self.model.test.size_divisor) for side in one.input_size)

    @torch.no_grad()
    def _start(self, group: Sequence[tuple[int, _Loaded]], wanted: _Wanted) -> list[_Started]:
        """Images of one padded size, each with its place among all; on a GPU they are queued."""
        started = []
        with self._configured(wanted.test):
            # Of a shape there are graphs of two batch sizes: a batch that is half empty costs more than single images.
            graphed, full = self._pipeline.graphed(), 2 * len(group) > self.batch_size
            rows = self.batch_size if graphed and full else 1 if graphed else len(group)
            for first in range(0, len(group), rows):
                places, images = zip(*group[first : first + rows])
                sizes = [one.input_size for one in images]
                begun = time.perf_counter()
                batch = self._pipeline.load([one.staged for one in images], sizes, rows)
                loaded = time.perf_counter()
                found = self._pipeline.run(batch, edges=wanted.edges, without=wanted.without)
                clock = (loaded - begun, loaded, *self._pipeline.seconds)
                started.append(_Started(images, places, fetch(found, self.device), clock))
        return started

    def _finish(self, started: _Started) -> dict[int, Result]:
        """Its results by their places."""
        results: dict[int, Result] = {}
        detections, of_edges = started.wait()
        resizing, begun, network, rest = started.clock
        if self.device.type == "cuda":
            network, rest = time.perf_counter() - begun, 0.0
        share = len(started.images)
        for i, (place, one) in enumerate(zip(started.places, started.images)):
            count = int(detections.count[i])
            boxes, scores, labels = (value[i, :count].clone() for value in detections[:3])
            (height, width), (h, w) = one.size, one.input_size
            factor = torch.tensor([w / width, h / height])
            edges = None
            if of_edges is not None:
                here = draw.Edges(*(value[i, :count].clone() for value in of_edges))
                edges = here._replace(locations=here.locations / factor, bins=here.bins / factor)
            # Boxes clipped to the scaled image may end an ulp outside the image after the division.
            limit = torch.tensor([width, height], dtype=torch.float32).repeat(2)
            boxes = torch.minimum(boxes / factor.repeat(2), limit)
            names, ids = ([of[c] for c in labels.tolist()] for of in (self.classes, self.category_ids))
            times = Times(one.seconds + resizing / share, network / share, rest / share)
            found = (boxes, scores, labels, names, ids)
            results[place] = Result(*found, one.size, one.path, edges, one.pixels, one.name, times)
        return results

    @contextmanager
    def _configured(self, test: InferenceConfig) -> Iterator[None]:
        """The network in evaluation mode, with the settings and this detector's precision."""
        mixed = self.dtype != torch.float32 and not self.optimize
        with testing(self._network, test), torch.autocast(self.device.type, self.dtype, enabled=mixed):
            yield


class _Wanted(NamedTuple):
    """What a call asks for; `without` are labels to leave out."""

    edges: bool
    test: InferenceConfig
    without: tuple[int, ...]


class _Loaded(NamedTuple):
    """An image, and the (height, width) that it is resized to."""

    path: Path | None
    name: str
    size: tuple[int, int]
    input_size: tuple[int, int]
    staged: Tensor  # for the device
    pixels: Tensor | None  # for the result
    seconds: float


class _Started(NamedTuple):
    """A batch in flight: its images, and their places among all."""

    images: Sequence[_Loaded]
    places: Sequence[int]
    wait: Callable[[], Predictions]
    clock: tuple[float, float, float, float]  # seconds of resizing; when it was started; seconds on a CPU
