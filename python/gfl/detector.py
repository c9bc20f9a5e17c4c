# SPDX-License-Identifier: Apache-2.0
"""A trained model as a person uses it: photos in, boxes in the photos' own pixels out."""

from __future__ import annotations

import dataclasses
import glob
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import checkpoint, draw
from .data import transforms
from .edges import Edges, find_edges
from .engine.distributed import choose_device
from .engine.pipeline import PendingDetections, Pipeline
from .models.fused import FusedGFL
from .models.gfl import GFL

# One image; a list of them, a folder or a glob is several.
Source = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor]
# What is looked at in a folder; a file given by its name or by a glob may have any.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Result:
    """What was found in one image, n objects, the best first.

    Attributes:
        boxes: fp32 ``[n, 4]`` xyxy in pixels of the image as a viewer shows it (EXIF orientation applied), on the CPU.
        scores: fp32 ``[n]`` in (0, 1).
        labels: int64 ``[n]`` in [0, C).
        names: the class's name of each.
        category_ids: of the annotation file that the model was trained on; label + 1 where its file doesn't say.
        size: (height, width) of the image.
        path: of the file; None for an image that came without one.
        edges: the distributions that the boxes were read from, in the image's pixels, if they were asked for.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]
    category_ids: list[int]
    size: tuple[int, int]
    path: Path | None
    edges: Edges | None
    # Kept for images without a file only, so that a folder's results stay small.
    _pixels: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def image(self) -> Image.Image:
        """The image itself, upright; read again from its file if it has one."""
        if self.path is not None:
            return _picture(transforms.read_image(self.path))
        if self._pixels is None:
            raise ValueError("gfl.Result: it has neither a file nor pixels of its own")
        return _picture(self._pixels)

    def draw(self, score_threshold: float = 0.3, *, scale: float = 1.0) -> Image.Image:
        """The image with boxes, names and scores of what scores at least the threshold, `scale` times as large."""
        shown = [i for i, score in enumerate(self.scores.tolist()) if score >= score_threshold]
        boxes, scores, labels = self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()
        return draw.draw_detections(
            self.image(),
            [boxes[i] for i in shown],
            [labels[i] for i in shown],
            [self.names[i] for i in shown],
            [scores[i] for i in shown],
            scale=scale,
        )

    def draw_edges(self, index: int, *, truth: Sequence[float] | None = None, size: int = 300) -> Image.Image:
        """Detection `index` with the four distributions beside its edges; see `gfl.draw.draw_edges`.

        Raises:
            ValueError: the image was not looked at with ``edges=True``.
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
        return [
            {"image_id": image_id, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
            for (x1, y1, x2, y2), score, category in zip(self.boxes.tolist(), self.scores.tolist(), self.category_ids)
        ]


class Detector:
    """Finds objects in photos.

    Args:
        model: a `gfl.models.GFL`, or the file of a checkpoint (this package's own, mmdet's, …).
        device: to compute on; by default a given model's own, for a file the GPU if there is one.
        dtype: fp32, or bf16 or fp16 for mixed precision.
        classes: names, one a class; by default the checkpoint's, else "class 0", ….
        score_threshold: detections at or below it are dropped; by default the model's test setting.
        batch_size: images at a time, all of the same padded size; by default 1 on the CPU, 8 on a GPU.
        optimize: run a copy of the network with its norms folded in (`gfl.models.fused`), wholly in `dtype`; on a GPU
            in a CUDA graph for each size of batch, with images resized there. Weights that change later are not seen.
            In fp32 the scores differ by about 1e-5.
        compile: with `optimize`, let `torch.compile` make the network's kernels: minutes for the first batch of each
            size.

    The model's test settings decide the size that images are scaled to. An image's result does not depend on the
    others in the call.

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
    ) -> None:
        ids: Sequence[int] | None = None
        if isinstance(model, GFL):
            self.model = model
            self.device = next(model.parameters()).device if device is None else choose_device(str(device))
        else:
            self.model, _, named, ids = checkpoint.model_from(model)
            classes = named if classes is None else classes
            self.device = choose_device(None if device is None else str(device))
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"gfl.Detector: `dtype` must be torch.float32, bfloat16 or float16, got {dtype}")
        self.dtype = torch.float32 if dtype is None else dtype
        self.model.to(self.device)
        count = self.model.config.num_classes
        self.classes = [f"class {i}" for i in range(count)] if classes is None else list(classes)
        if len(self.classes) != count:
            raise ValueError(
                f"gfl.Detector: `classes` must be {count} names, as many as the model's, got {len(self.classes)}"
            )
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
        """Find the objects of one image, or of each of several.

        Args:
            source: one image: the path of a file, a pillow image, a uint8 array ``[H, W, 3]`` in RGB or ``[H, W]``, a
                uint8 tensor ``[3, H, W]``; or several: a sequence of such, a folder (its image files by name), a glob.
                Files and pillow images are turned upright as their EXIF orientation says.
            edges: keep the distributions that the boxes were read from, too.

        Returns:
            A `Result`, or for several a list of them in the given order. Of a folder or glob the files that can't be
            decoded are left out with a warning.

        Raises:
            ValueError: no such file, or one that can't be decoded (it is named), not one in a folder or glob, an array
                or tensor of another shape.
            TypeError: neither of these kinds, or another dtype than uint8.
        """
        if isinstance(source, (str, os.PathLike)) and _is_one(source):
            return next(self.stream([source], edges=edges))
        if isinstance(source, (str, os.PathLike)):

            def warn(_: Source, why: str) -> None:
                warnings.warn(why, stacklevel=4)

            return list(self.stream(find_images(source), edges=edges, on_error=warn))
        if isinstance(source, Sequence):
            return list(self.stream(source, edges=edges))
        return next(self.stream([source], edges=edges))

    def stream(
        self,
        sources: Sequence[Source],
        *,
        edges: bool = False,
        on_error: Callable[[Source, str], object] | None = None,
    ) -> Iterator[Result]:
        """The results of single images, in their order, one after another, so that few images are held at a time.

        Args:
            sources: single images, as `__call__` takes them.
            edges: keep the distributions, too.
            on_error: called with each source that can't be read and why, which is then left out; by default a
                ValueError is raised.
        """
        waiting: list[_Loaded] = []
        running: list[_Started] = []
        for source in sources:
            try:
                waiting.append(self._load(source))
            except ValueError as error:
                if on_error is None:
                    raise
                on_error(source, str(error))
            # Some more than a batch, so that those of one size can be taken together.
            if len(waiting) == (1 if self.batch_size == 1 else 4 * self.batch_size):
                # On a GPU while it computes: the results of what was started before.
                before, running = running, self._start(waiting, edges)
                yield from self._finish(before)
                if self.device.type != "cuda":
                    yield from self._finish(running)
                    running = []
                waiting = []
        yield from self._finish(running)
        yield from self._finish(self._start(waiting, edges))

    def _load(self, source: Source) -> _Loaded:
        path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        pixels = _read(path) if path is not None else _pixels(source)
        test = self.model.test
        height, width = int(pixels.shape[1]), int(pixels.shape[2])
        new = transforms.keep_ratio_size(height, width, test.short_side, test.long_side)
        return _Loaded(path, (height, width), new, pixels)

    def _start(self, loaded: Sequence[_Loaded], edges: bool) -> list[_Started]:
        """Batches of images of like size; on a GPU they are queued."""
        divisor = self.model.test.size_divisor
        groups: dict[tuple[int, int], list[int]] = {}
        for i, one in enumerate(loaded):
            height, width = one.input_size
            groups.setdefault((-(-height // divisor), -(-width // divisor)), []).append(i)
        started = []
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                places = members[start : start + self.batch_size]
                started.append(self._start_batch([loaded[i] for i in places], places, edges))
        return started

    @torch.no_grad()
    def _start_batch(self, images: Sequence[_Loaded], places: list[int], edges: bool) -> _Started:
        with self._as_asked():
            batch = self._pipeline.load([one.pixels for one in images], [one.input_size for one in images])
            found = self._pipeline.run(batch)
        read = []
        if edges:
            for i, count in enumerate(found.detections[3].tolist()):
                cls_scores, reg_preds = ([level[i] for level in maps] for maps in found[1:])
                boxes, scores, labels = (part[i, :count] for part in found.detections[:3])
                config, size = self.model.config, batch.sizes[i]
                read.append(find_edges(cls_scores, reg_preds, config, size, boxes, scores, labels))
        return _Started(images, places, PendingDetections(found.detections), read)

    def _finish(self, started: Sequence[_Started]) -> list[Result]:
        """Their results, in the order in which the images were given."""
        found: dict[int, Result] = {}
        for part in started:
            found |= zip(part.places, self._results(part))
        return [found[i] for i in sorted(found)]

    def _results(self, started: _Started) -> list[Result]:
        detections = started.pending.wait()
        results = []
        for i, (one, count) in enumerate(zip(started.images, detections[3].tolist())):
            boxes, scores, labels = (part[i, :count].clone() for part in detections[:3])
            (height, width), (h, w) = one.size, one.input_size
            factor = torch.tensor([w / width, h / height])
            found = None
            if started.edges:
                here = Edges(*(part.cpu() for part in started.edges[i]))
                found = here._replace(locations=here.locations / factor, bins=here.bins / factor)
            classes = labels.tolist()
            # Dividing what was clipped to the scaled image may end an ulp outside the image itself.
            limit = torch.tensor([width, height], dtype=torch.float32).repeat(2)
            results.append(
                Result(
                    boxes=torch.minimum(boxes / factor.repeat(2), limit),
                    scores=scores,
                    labels=labels,
                    names=[self.classes[c] for c in classes],
                    category_ids=[self.category_ids[c] for c in classes],
                    size=one.size,
                    path=one.path,
                    edges=found,
                    _pixels=one.pixels if one.path is None else None,
                )
            )
        return results

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        """The network in evaluation, with the model's settings, the threshold and the precision of this detector."""
        network, test = self._network, self.model.test
        training, before = network.training, network.test
        network.eval()
        threshold = test.score_threshold if self.score_threshold is None else self.score_threshold
        network.test = dataclasses.replace(test, score_threshold=threshold)
        mixed = self.dtype != torch.float32 and not self.optimize
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                yield
        finally:
            network.test = before
            network.train(training)


@dataclass(frozen=True)
class _Loaded:
    """An image as it is, and the size (height, width) that the network takes it in."""

    path: Path | None
    size: tuple[int, int]
    input_size: tuple[int, int]
    pixels: Tensor


@dataclass(frozen=True)
class _Started:
    """A batch that the device works on: its images, their places among those started together, their edges if asked."""

    images: Sequence[_Loaded]
    places: list[int]
    pending: PendingDetections
    edges: list[Edges]


def find_images(source: str | os.PathLike[str]) -> list[Path]:
    """The image files of a folder (by their suffix, not of folders within it), or the files of a glob, by name.

    Raises:
        ValueError: there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise ValueError(f"gfl: no image files ({', '.join(SUFFIXES)}) in the folder {folder}")
        return paths
    paths = sorted(path for path in map(Path, glob.glob(str(source), recursive=True)) if path.is_file())
    if not paths:
        raise ValueError(f"gfl: no file, no folder and no file by the pattern {source}")
    return paths


def _is_one(path: str | os.PathLike[str]) -> bool:
    """Whether a path means one file: all that is no folder and no glob, be it there or not."""
    return not Path(path).is_dir() and (Path(path).is_file() or not glob.has_magic(str(path)))


def _read(path: Path) -> Tensor:
    try:
        return transforms.read_image(path)
    except OSError as error:
        raise ValueError(f"gfl: {path} can't be read: {error.strerror or error}") from error


def _pixels(source: Any) -> Tensor:
    """uint8 ``[3, H, W]`` of an image that is in memory already."""
    if isinstance(source, Image.Image):
        return transforms.to_tensor(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        _check_dtype("array", source.dtype == np.uint8, source.dtype)
        if source.ndim == 2:
            source = source[..., None].repeat(3, 2)
        if source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ValueError(f"gfl.Detector: an array must have shape [H, W, 3] or [H, W], got {list(source.shape)}")
        return torch.from_numpy(source.copy()).permute(2, 0, 1)
    if isinstance(source, Tensor):
        _check_dtype("tensor", source.dtype == torch.uint8, source.dtype)
        if source.ndim != 3 or source.shape[0] != 3 or 0 in source.shape:
            raise ValueError(f"gfl.Detector: a tensor must have shape [3, H, W], got {list(source.shape)}")
        return source.cpu()
    raise TypeError(
        "gfl.Detector: `source` must be a path, a pillow image, an array, a tensor or a sequence of these, "
        f"got {type(source).__name__}"
    )


def _check_dtype(kind: str, right: bool, dtype: object) -> None:
    if not right:
        raise TypeError(f"gfl.Detector: the {kind} of an image must be uint8 (levels of 0 to 255), got {dtype}")


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
