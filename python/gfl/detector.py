# SPDX-License-Identifier: Apache-2.0
"""A trained model in use: images in, boxes in the images' own pixels out."""

from __future__ import annotations

import dataclasses
import glob
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import checkpoint, draw
from .config import Config
from .data import transforms
from .data.coco import coco_detection
from .engine.distributed import choose_device
from .engine.pipeline import Pipeline, Predictions, batches_by_shape, fetch, testing
from .models.fused import FusedGFL
from .models.gfl import GFL
from .threads import MOST, cores, map_ahead

# One image, unless it is the path of a folder or a glob pattern.
Source = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor]
# Of images in a folder; a file given by its name or by a glob may have any.
SUFFIXES = transforms.IMAGE_SUFFIXES
# Batches that a GPU has queued while the host reads images and results.
IN_FLIGHT = 2


@dataclass(frozen=True)
class Result:
    """The n detections in one image, best first.

    Attributes:
        boxes: fp32 ``[n, 4]`` xyxy in pixels of the image as a viewer shows it (EXIF orientation applied), on the CPU.
        scores: fp32 ``[n]`` in (0, 1).
        labels: int64 ``[n]`` in [0, C).
        names: class name of each.
        category_ids: those of the annotation file that the model was trained on; label + 1 if its file doesn't say.
        size: (height, width) of the image.
        path: of the file; None for an image that came without one.
        edges: the distributions that the boxes were read from, in the image's pixels, if requested.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    size: tuple[int, int]
    path: Path | None
    edges: draw.Edges | None
    # Of images without a file, or if requested, so that a folder's results stay small.
    _pixels: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def image(self) -> Image.Image:
        """The image itself, upright; read again from its file unless its pixels were kept."""
        pixels = self._pixels
        if pixels is None:
            if self.path is None:
                raise ValueError("gfl.Result: it has neither a file nor pixels of its own")
            pixels = transforms.read_image(self.path)
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def draw(self, score_threshold: float = 0.3, *, scale: float = 1.0) -> Image.Image:
        """The image, `scale` times as large, with boxes, names and scores of detections of at least the threshold."""
        scores = [score for score in self.scores.tolist() if score >= score_threshold]
        n = len(scores)  # the best come first
        boxes, labels = self.boxes[:n].tolist(), self.labels[:n].tolist()
        return draw.draw_detections(self.image(), boxes, labels, self.names[:n], scores, scale=scale)

    def draw_edges(self, index: int, *, truth: Sequence[float] | None = None, size: int = 300) -> Image.Image:
        """Detection `index` with the four distributions beside its edges; see `gfl.draw.draw_edges`.

        Raises:
            ValueError: the detector was called without ``edges=True``.
        """
        if self.edges is None:
            raise ValueError("gfl.Result.draw_edges: no distributions were kept; call the detector with `edges=True`")
        return draw.draw_edges(
            self.image(),
            self.boxes[index].tolist(),
            self.edges.probabilities[index].tolist(),
            self.edges.locations[index].tolist(),
            self.edges.bins[index].tolist(),
            title=f"{self.names[index]} {float(self.scores[index]):.2f}",
            color=draw.class_color(int(self.labels[index])),
            truth=truth,
            size=size,
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO's list of results: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score`` each."""
        parts = zip(self.category_ids, self.boxes.tolist(), self.scores.tolist())
        return [coco_detection(image_id, *part) for part in parts]


class Detector:
    """Detects objects in images.

    Args:
        model: a `gfl.models.GFL`, or the file of a checkpoint (this package's, mmdet's, …).
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
        else:
            self.model, _, named, ids = checkpoint.model_from(model, config, strict=True)
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

    def __call__(self, source: Source | Sequence[Source], *, edges: bool = False) -> Result | list[Result]:
        """Detect the objects in one image, or in each of several.

        Args:
            source: one image: the path of a file, a pillow image, a uint8 array ``[H, W, 3]`` in RGB or ``[H, W]``, a
                uint8 tensor ``[3, H, W]``; or several: a sequence of such, a folder (its image files by name), a glob.
                Files and pillow images are turned upright as their EXIF orientation says.
            edges: also keep the distributions that the boxes were read from.

        Returns:
            A `Result`, or for several a list of them in the given order. Files of a folder or glob that can't be
            decoded are left out with a warning.

        Raises:
            ValueError: a file that does not exist or can't be decoded (it is named; not in a folder or glob), an array
                or tensor of another shape.
            TypeError: neither of these kinds, or another dtype than uint8.
        """
        if isinstance(source, (str, os.PathLike)):
            if Path(source).is_dir() or (glob.has_magic(str(source)) and not Path(source).is_file()):

                def warn(_: Source, why: str) -> None:
                    warnings.warn(why, stacklevel=6)  # where the detector was called

                return list(self.stream(find_images(source), edges=edges, on_error=warn))
        elif isinstance(source, Sequence):
            return list(self.stream(source, edges=edges))
        return next(self.stream([source], edges=edges))

    def stream(
        self,
        sources: Sequence[Source],
        *,
        edges: bool = False,
        on_error: Callable[[Source, str], object] | None = None,
        keep_pixels: bool = False,
    ) -> Iterator[Result]:
        """The results of single images, one after another in their order, so that few images are held at a time.

        For a GPU files are read in threads, ahead of it.

        Args:
            sources: single images, as `__call__` takes them.
            edges: also keep the distributions.
            on_error: called with each source that can't be read and the reason; the source is then left out. By
                default a ValueError is raised.
            keep_pixels: hold the pixels of files in the results too, for pictures without reading them again.
        """
        gpu = self.device.type == "cuda"
        loaded = self._read(sources, on_error, keep_pixels, min(MOST, cores()) if gpu else 0)
        running: deque[_Started] = deque()
        finished: dict[int, Result] = {}
        place = 0
        # So many that most shapes come often enough to fill a batch.
        for group in batches_by_shape(loaded, self._padded_size, self.batch_size, 4 * self.batch_size):
            running += self._start(group, edges)
            while len(running) > (IN_FLIGHT if gpu else 0):
                finished |= self._finish(running.popleft())
            while place in finished:
                yield finished.pop(place)
                place += 1
        for started in running:
            finished |= self._finish(started)
        yield from (finished[place] for place in sorted(finished))

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

        items = ((s, None if isinstance(s, (str, os.PathLike)) else attempt(s)) for s in sources)
        for source, loaded in map_ahead(read, items, threads):
            if not isinstance(loaded, ValueError):
                yield loaded
            elif on_error is None:
                raise loaded
            else:
                on_error(source, str(loaded))

    def _load(self, source: Source, keep_pixels: bool) -> _Loaded:
        path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        try:
            pixels = _pixels(source) if path is None else transforms.read_image(path)
        except OSError as error:
            raise ValueError(f"gfl: {path} can't be read: {error.strerror or error}") from error
        test = self.model.test
        height, width = int(pixels.shape[1]), int(pixels.shape[2])
        new = transforms.input_size((height, width), test.short_side, test.long_side, test)
        kept = pixels if path is None or keep_pixels else None
        return _Loaded(path, (height, width), new, self._pipeline.stage(pixels), kept)

    def _padded_size(self, one: _Loaded) -> tuple[int, ...]:
        """In multiples of the model's divisor."""
        return tuple(-(-side // self.model.test.size_divisor) for side in one.input_size)

    @torch.no_grad()
    def _start(self, group: Sequence[tuple[int, _Loaded]], edges: bool) -> list[_Started]:
        """Images of one padded size, each with its place among all; on a GPU they are queued."""
        started = []
        with self._configured():
            # Of a shape there are graphs of two batch sizes: a batch that is half empty costs more than single images.
            graphed, full = self._pipeline.graphed(), 2 * len(group) > self.batch_size
            rows = self.batch_size if graphed and full else 1 if graphed else len(group)
            for first in range(0, len(group), rows):
                places, images = zip(*group[first : first + rows])
                sizes = [one.input_size for one in images]
                batch = self._pipeline.load([one.staged for one in images], sizes, rows)
                found = self._pipeline.run(batch, edges=edges)
                started.append(_Started(images, places, fetch(found, self.device)))
        return started

    def _finish(self, started: _Started) -> dict[int, Result]:
        """Its results by their places."""
        results: dict[int, Result] = {}
        detections, of_edges = started.wait()
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
            results[place] = Result(boxes, scores, labels, names, ids, one.size, one.path, edges, one.pixels)
        return results

    @contextmanager
    def _configured(self) -> Iterator[None]:
        """The network in evaluation mode, with the model's settings and this detector's threshold and precision."""
        test = self.model.test
        if self.score_threshold is not None:
            test = dataclasses.replace(test, score_threshold=self.score_threshold)
        mixed = self.dtype != torch.float32 and not self.optimize
        with testing(self._network, test), torch.autocast(self.device.type, self.dtype, enabled=mixed):
            yield


class _Loaded(NamedTuple):
    """An image, and the (height, width) that it is resized to."""

    path: Path | None
    size: tuple[int, int]
    input_size: tuple[int, int]
    staged: Tensor  # for the device
    pixels: Tensor | None  # for the result


class _Started(NamedTuple):
    """A batch in flight: its images, and their places among all."""

    images: Sequence[_Loaded]
    places: Sequence[int]
    wait: Callable[[], Predictions]


def find_images(source: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder (by suffix, without subfolders), or those of a glob, sorted by name; at least one."""
    folder = Path(source)
    if folder.is_dir():
        paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        problem = f"no image files ({', '.join(SUFFIXES)}) in the folder {folder}"
    else:
        paths = [Path(name) for name in glob.glob(str(source), recursive=True)]
        problem = f"no file, no folder and no file by the pattern {source}"
    if not (found := sorted(path for path in paths if path.is_file())):
        raise ValueError(f"gfl: {problem}")
    return found


def _pixels(source: Any) -> Tensor:
    """uint8 ``[3, H, W]`` of an image in memory."""
    if isinstance(source, Image.Image):
        return transforms.to_tensor(ImageOps.exif_transpose(source))
    if not isinstance(source, (np.ndarray, Tensor)):
        kinds = "a path, a pillow image, an array, a tensor or a sequence of these"
        raise TypeError(f"gfl.Detector: `source` must be {kinds}, got {type(source).__name__}")
    array = isinstance(source, np.ndarray)
    if str(source.dtype).removeprefix("torch.") != "uint8":
        kind = "array" if array else "tensor"
        raise TypeError(f"gfl.Detector: the {kind} of an image must be uint8 (levels of 0 to 255), got {source.dtype}")
    if array and source.ndim == 2:
        source = source[..., None].repeat(3, 2)
    if source.ndim != 3 or source.shape[2 if array else 0] != 3 or 0 in source.shape:
        layout = "an array must have shape [H, W, 3] or [H, W]" if array else "a tensor must have shape [3, H, W]"
        raise ValueError(f"gfl.Detector: {layout}, got {list(source.shape)}")
    return torch.from_numpy(source.copy()).permute(2, 0, 1) if array else source.cpu()
