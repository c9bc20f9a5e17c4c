# SPDX-License-Identifier: Apache-2.0
"""The demo's two pictures: detections in held-out scenes, and the distributions behind some of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from gfl_ops.ops.boxes.box_ops import pairwise_iou

from ..data.coco import CocoDataset
from ..detector import Detector, Result
from ..draw import contact_sheet

# Least scores for the picture of detections and for that of distributions, and least IoU there with a true box.
SHOWN, SURE, MATCH = 0.5, 0.5, 0.7
# Magnification of a scene in the picture of detections, to show small objects.
SCALE = 2.5
_DETECTIONS = "what the network finds in scenes it has never seen: class and score"
_EDGES = "what each edge was read from: sharp where it is seen, spread where it must be guessed; dashed: the true box"


def detections(detector: Detector, scenes: CocoDataset, columns: int = 3, rows: int = 2) -> Image.Image:
    """The first held-out scenes with what is found in them."""
    paths = [scenes.path(i) for i in range(min(len(scenes), columns * rows))]
    return contact_sheet([r.draw(SHOWN, scale=SCALE) for r in detector.stream(paths)], columns, title=_DETECTIONS)


def distributions(
    detector: Detector, scenes: CocoDataset, columns: int = 3, rows: int = 2, among: int = 80
) -> Image.Image | None:
    """Boxes with their distributions: first some with four sharp edges, then those with one most uncertain edge.

    One box per scene, from the first `among` scenes; only confident, correct detections. None if there is none.
    """
    found: list[_Candidate] = []
    paths = [scenes.path(i) for i in range(min(len(scenes), among))]
    for i, result in enumerate(detector.stream(paths, edges=True)):
        found += _candidates(i, result, scenes[i].boxes, scenes[i].labels)
    count = columns * rows
    sharp = _one_per_scene(sorted(found, key=lambda c: c.doubt[-1]), count // 3)
    used = {c.scene for c in sharp}
    doubtful = sorted((c for c in found if c.scene not in used), key=lambda c: c.doubt[-2] - c.doubt[-1])
    chosen = sharp + _one_per_scene(doubtful, count - len(sharp))
    if not chosen:
        return None
    return contact_sheet([c.result.draw_edges(c.at, truth=c.truth) for c in chosen], columns, title=_EDGES)


class _Candidate(NamedTuple):
    """A detection that may be shown."""

    scene: int
    result: Result
    at: int  # its index in the result
    doubt: list[float]  # of its edges, ascending
    truth: list[float]  # its true box


def _candidates(scene: int, result: Result, boxes: Tensor, labels: Tensor) -> list[_Candidate]:
    if result.edges is None or not len(boxes) or not len(result):
        return []
    overlap = pairwise_iou(result.boxes, boxes).masked_fill(result.labels[:, None] != labels, 0)
    side = (result.boxes[:, 2:] - result.boxes[:, :2]).amax(1)
    shown = (result.scores >= SURE) & (overlap.amax(1) >= MATCH) & (side >= 24)
    doubt = result.edges.doubt().sort(1).values
    return [
        _Candidate(scene, result, i, doubt[i].tolist(), boxes[overlap[i].argmax()].tolist())
        for i in shown.nonzero().flatten().tolist()
    ]


def _one_per_scene(candidates: Sequence[_Candidate], count: int) -> list[_Candidate]:
    best: dict[int, _Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.scene, candidate)
    return list(best.values())[:count]
