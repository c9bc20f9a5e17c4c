# SPDX-License-Identifier: Apache-2.0
"""What a detector found in one image."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from . import draw, files
from .data.coco import coco_detection
from .data.values import ImageId
from .sources import Unread


class Detection(NamedTuple):
    """One object: a box xyxy in the image's pixels."""

    box: list[float]
    score: float
    label: int
    name: str


class Times(NamedTuple):
    """Seconds of one image, of a batch its share: reading and decoding, network, from its maps to boxes.

    On a GPU the last two are one, `network`, and `postprocess` is 0.
    """

    read: float
    network: float
    postprocess: float


NO_TIMES = Times(0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The n detections in one image, best first.

    It is a sequence of `Detection`; indexed by a slice, a mask or several indices it is another `Result`.

    Attributes:
        boxes: fp32 ``[n, 4]`` xyxy in pixels of the image as a viewer shows it (EXIF orientation applied), on the CPU.
        scores: fp32 ``[n]`` in (0, 1).
        labels: int64 ``[n]`` in [0, C).
        names: class name of each.
        category_ids: those of the annotation file that the model was trained on; label + 1 if its file doesn't say.
        size: (height, width) of the image.
        path: of the file; None for an image that came without one.
        edges: the distributions that the boxes were read from, in the image's pixels, if requested.
        source: what the image is called: a path, a URL, a frame of a video; empty for one in memory.
        times: how long it took.
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
    source: str = ""
    times: Times = NO_TIMES

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in Counter(self.names).items())
        place = f"{files.printable(self.source)} " if self.source else ""
        return f"Result({place}{self.size[1]}×{self.size[0]}: {files.printable(counts) or 'nothing'})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Result):
            return NotImplemented
        plain = ("names", "category_ids", "size", "path", "source")
        tensors = ("boxes", "scores", "labels")
        return all(getattr(self, name) == getattr(other, name) for name in plain) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in tensors
        )

    def __hash__(self) -> int:
        return hash((tuple(self.names), self.size, self.path, self.source))

    def __iter__(self) -> Iterator[Detection]:
        return map(Detection, self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            row = range(len(self))[index]
            return Detection(self.boxes[row].tolist(), self.scores[row].item(), int(self.labels[row]), self.names[row])
        rows = torch.arange(len(self))[index]
        names, ids = ([of[row] for row in rows.tolist()] for of in (self.names, self.category_ids))
        tensors = {name: getattr(self, name)[rows] for name in ("boxes", "scores", "labels")}
        edges = None if self.edges is None else draw.Edges(*(part[rows] for part in self.edges))
        return dataclasses.replace(self, **tensors, names=names, category_ids=ids, edges=edges)

    def image(self) -> Image.Image:
        """The image itself, upright; read again from its file unless its pixels were kept."""
        pixels = self._pixels
        if pixels is None:
            if self.path is None and not self.source:
                raise ValueError("gfl.Result: it has neither a file nor pixels of its own")
            pixels = Unread(self.path or self.source).pixels()
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

    def _repr_png_(self) -> bytes:
        """The picture that a notebook shows."""
        content = io.BytesIO()
        self.draw().save(content, "PNG")
        return content.getvalue()

    def show(self, score_threshold: float = 0.3) -> None:
        """Opens the picture in the system's viewer."""
        self.draw(score_threshold).show()

    def save(self, path: str | os.PathLike[str], score_threshold: float = 0.3) -> None:
        """Writes the picture, in the format of the suffix; a file that is there is replaced by the whole new one."""
        with files.replacing(path) as part:
            self.draw(score_threshold).save(part)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; with distributions if the detector was called with ``edges=True``."""
        found = [
            {"box": one.box, "score": one.score, "label": one.label, "name": one.name, "category_id": category}
            for one, category in zip(self, self.category_ids)
        ]
        if self.edges is not None:
            for row, one in enumerate(found):
                one["edges"] = {name: part[row].tolist() for name, part in self.edges._asdict().items()}
        height, width = self.size
        times = {name: round(1000 * value, 3) for name, value in self.times._asdict().items()}
        return {"source": self.source, "width": width, "height": height, "milliseconds": times, "detections": found}

    def to_coco(self, image_id: ImageId) -> list[dict[str, Any]]:
        """COCO's list of results: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height) and ``score`` each."""
        parts = zip(self.category_ids, self.boxes.tolist(), self.scores.tolist())
        return [coco_detection(image_id, *part) for part in parts]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: xmin, ymin, xmax, ymax, score, label, name.

        Raises:
            RuntimeError: pandas is not installed; so of `to_supervision`.
        """
        frame = _package("pandas").DataFrame(self.boxes.numpy(), columns=["xmin", "ymin", "xmax", "ymax"])
        return frame.assign(score=self.scores.numpy(), label=self.labels.numpy(), name=self.names)

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, with the names as ``data["class_name"]``."""
        numpy = _package("numpy")
        return _package("supervision").Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": numpy.array(self.names, dtype=str)},
        )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeError(f"gfl.Result: this needs {name}: pip install {name}") from error
