# SPDX-License-Identifier: Apache-2.0
"""The demo's two pictures: detections in held-out scenes, and the distributions behind some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..data.coco import CocoDataset
from ..detector import Detector, Result
from ..draw import contact_sheet

# Detections that are shown; distributions are shown of sure ones that match a true box.
SHOWN, SURE, MATCH = 0.5, 0.5, 0.7
# Of a scene in the picture of detections, so that the small ones are seen.
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
    """Boxes with their distributions: first of sharp edges all round, then with one edge that is most in doubt.

    One box a scene, of the first `among` scenes; only such as are found surely and rightly. None if there is none.
    """
    found: list[_Candidate] = []
    paths = [scenes.path(i) for i in range(min(len(scenes), among))]
    for i, result in enumerate(detector.stream(paths, edges=True)):
        found += _candidates(i, result, scenes[i].boxes, scenes[i].labels)
    count = columns * rows
    sharp = _one_a_scene(sorted(found, key=lambda c: c.doubt[-1]), count // 3)
    used = {c.scene for c in sharp}
    doubtful = sorted((c for c in found if c.scene not in used), key=lambda c: c.doubt[-2] - c.doubt[-1])
    chosen = sharp + _one_a_scene(doubtful, count - len(sharp))
    if not chosen:
        return None
    return contact_sheet([c.result.draw_edges(c.index, truth=c.truth) for c in chosen], columns, title=_EDGES)


@dataclass(frozen=True)
class _Candidate:
    """A detection that may be shown: its scene, its place in the result, the doubts of its edges rising, its truth."""

    scene: int
    result: Result
    index: int
    doubt: list[float]
    truth: list[float]


def _candidates(scene: int, result: Result, boxes: Tensor, labels: Tensor) -> list[_Candidate]:
    found = []
    for index in range(len(result)):
        box, label = result.boxes[index], result.labels[index]
        overlap = torch.where(labels == label, _iou(box, boxes), 0.0)
        if (
            result.edges is None
            or result.scores[index] < SURE
            or not len(boxes)
            or overlap.max() < MATCH
            or (box[2:] - box[:2]).max() < 24
        ):
            continue
        doubt = result.edges.doubt()[index].sort().values.tolist()
        found.append(_Candidate(scene, result, index, doubt, boxes[overlap.argmax()].tolist()))
    return found


def _iou(box: Tensor, boxes: Tensor) -> Tensor:
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - shared)


def _one_a_scene(candidates: Sequence[_Candidate], count: int) -> list[_Candidate]:
    best: dict[int, _Candidate] = {}
    for candidate in candidates:
        if len(best) < count:
            best.setdefault(candidate.scene, candidate)
    return list(best.values())
