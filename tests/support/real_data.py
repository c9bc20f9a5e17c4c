# SPDX-License-Identifier: Apache-2.0
"""Outputs of a trained head on 47 photos of COCO val2017 as the maps that `postprocess` takes.

The files lie outside the project: in `GFL_TEST_DATA`, or in `../shared/data` as seen from its root.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STRIDES = (8.0, 16.0, 32.0, 64.0)
SIDES = (52, 26, 13, 7)
CLASSES = 80
REG_MAX = 7
INPUT = 416
# Far below any threshold: what stands where the sparse files leave a location out.
ABSENT = -12.0

_ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("GFL_TEST_DATA", _ROOT.parent / "shared" / "data"))
COCO = FOLDER / "coco_val2017_47"


def missing() -> str | None:
    """Why the tests on real data can't run; None if they can."""
    if not COCO.is_dir():
        return f"{COCO} is not there (GFL_TEST_DATA names the folder of the real data)"
    return None


@dataclass(frozen=True)
class Photos:
    """Maps of some photos, and what is needed to put their boxes back into the photos.

    Attributes:
        ids: COCO's image ids, one a photo.
        cls_scores: levels of ``[B, 80, H, W]``, logits.
        reg_preds: levels of ``[B, 32, H, W]``.
        image_sizes: fp32 ``[B, 2]``: 416, 416.
        scale_factors: fp32 ``[B, 2]``: 416 / photo's width, 416 / photo's height.
    """

    ids: list[int]
    cls_scores: list[Tensor]
    reg_preds: list[Tensor]
    image_sizes: Tensor
    scale_factors: Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Photos:
        return Photos(
            self.ids,
            [m.to(device=device, dtype=dtype) for m in self.cls_scores],
            [m.to(device=device, dtype=dtype) for m in self.reg_preds],
            self.image_sizes.to(device=device),
            self.scale_factors.to(device=device),
        )

    def channels_last(self) -> Photos:
        def convert(maps: list[Tensor]) -> list[Tensor]:
            return [m.contiguous(memory_format=torch.channels_last) for m in maps]

        return Photos(self.ids, convert(self.cls_scores), convert(self.reg_preds), self.image_sizes, self.scale_factors)

    def arguments(self) -> tuple[Any, ...]:
        """The positional arguments of `postprocess`."""
        return self.cls_scores, self.reg_preds, list(STRIDES), self.image_sizes


def sparse_heads(limit: int | None = None) -> Photos:
    """All 47 photos, or the first `limit`: fp16 maps, `ABSENT` and a flat distribution where no class reaches 0.045."""
    import numpy as np

    with np.load(COCO / "nanodet_plus_416_head_sparse.npz") as file:
        ids = sorted(int(key[:-4]) for key in file if key.endswith("_idx"))[:limit]
        rows = []
        for photo in ids:
            head = torch.zeros((sum(s * s for s in SIDES), CLASSES + 4 * (REG_MAX + 1)), dtype=torch.float16)
            head[:, :CLASSES] = ABSENT
            head[torch.from_numpy(file[f"{photo}_idx"]).long()] = torch.from_numpy(file[f"{photo}_val"])
            rows.append(head)
        sizes = [tuple(file[f"{photo}_hw"].tolist()) for photo in ids]
    return _photos(ids, torch.stack(rows), sizes)


def full_heads(limit: int | None = None) -> Photos:
    """The photos whose whole outputs are there, or the first `limit` of them: fp16 maps."""
    import numpy as np

    ids, rows, sizes = [], [], []
    for path in sorted(COCO.glob("nanodet_plus_416_head_[0-9]*.npz"))[:limit]:
        with np.load(path) as file:
            ids.append(int(path.stem.rsplit("_", 1)[1]))
            rows.append(torch.from_numpy(file["head"]))
            sizes.append(tuple(file["hw"].tolist()))
    return _photos(ids, torch.stack(rows), sizes)


def _photos(ids: list[int], heads: Tensor, sizes: list[tuple[int, int]]) -> Photos:
    cls_scores, reg_preds, start = [], [], 0
    for side in SIDES:
        level = heads[:, start : start + side * side].transpose(1, 2).reshape(len(ids), -1, side, side)
        start += side * side
        cls_scores.append(level[:, :CLASSES].contiguous())
        reg_preds.append(level[:, CLASSES:].contiguous())
    image_sizes = torch.full((len(ids), 2), float(INPUT))
    scale_factors = torch.tensor([[INPUT / w, INPUT / h] for h, w in sizes])
    return Photos(ids, cls_scores, reg_preds, image_sizes, scale_factors)


def annotations() -> Path:
    """COCO's annotations of the 47 photos."""
    return COCO / "instances_val2017_47.json"


def category_ids() -> list[int]:
    """COCO's id of each label: the ids in ascending order."""
    return sorted(c["id"] for c in json.loads(annotations().read_text())["categories"])


def reference_detections() -> list[dict[str, Any]]:
    """What an independent program made of the same heads, as COCO's list of results."""
    return json.loads((COCO / "reference_detections.json").read_text())


def coco_results(ids: list[int], detections: Any) -> list[dict[str, Any]]:
    """`Detections` of the photos `ids` as COCO's list of results."""
    categories, results = category_ids(), []
    boxes, scores, labels, count = (t.cpu().tolist() for t in detections[:4])
    for photo, photo_boxes, photo_scores, photo_labels, used in zip(ids, boxes, scores, labels, count, strict=True):
        for (x1, y1, x2, y2), score, label in list(zip(photo_boxes, photo_scores, photo_labels, strict=True))[:used]:
            results.append(
                {
                    "image_id": photo,
                    "category_id": categories[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    return results


def average_precision(results: list[dict[str, Any]]) -> float:
    """COCO's AP of results on the 47 photos, by pycocotools."""
    import contextlib
    import io

    from pycocotools.coco import COCO as Annotations
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = Annotations(str(annotations()))
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])
