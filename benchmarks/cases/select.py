# SPDX-License-Identifier: Apache-2.0
"""Suppression and post-processing of what a trained head finds, and suppression of random boxes."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import formulas.select
import gfl_ops
from formulas.common import widen
from harness import Case
from inputs import CLASSES, Scene, boxes_for_nms

from .common import different, torchvision


def different_sets(got: Tensor, want: Tensor) -> float:
    """Share of the indices that only one of the two holds."""
    ours, theirs = set(got.tolist()), set(want.tolist())
    return len(ours ^ theirs) / max(len(theirs), 1)


def different_detections(got: Any, want: Any) -> float:
    """By counts and ranked scores: equal scores may come in another order."""
    return different((got[1], got[3]), (want[1], want[3]))


def kept_boxes(scene: Scene, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"boxes": scene.candidates.boxes.to(dtype), "scores": scene.candidates.scores.to(dtype)}


def widened(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, **rest: call(widen(boxes), widen(scores), **rest)


def nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    first = scene.candidates.images == 0
    whole = kept_boxes(scene, dtype)
    inputs = {name: value[first] for name, value in whole.items()} | {"iou_threshold": 0.6}
    what = f"{int(first.sum())} boxes"
    peers = {
        "eager": widened(formulas.select.nms),
        "torchvision": widened(torchvision.ops.nms) if torchvision else None,
    }
    yield Case("nms", "nms", f"{what} of an image", inputs, gfl_ops.nms, peers, agree=different_sets)
    # Two images at once: providers that are plain Python loops would take minutes for more.
    few = scene.candidates.images < 2
    idxs = (scene.candidates.images * CLASSES + scene.candidates.labels)[few]
    inputs = {name: value[few] for name, value in whole.items()} | {"idxs": idxs, "iou_threshold": 0.6}
    peers = {"eager": widened(formulas.select.batched_nms)} | torchvision_batched_nms()
    what = f"{len(idxs)} boxes, {len(idxs.unique())} groups"
    yield Case("nms", "batched_nms", what, inputs, gfl_ops.batched_nms, peers, agree=different_sets)


def torchvision_batched_nms() -> dict[str, Callable[..., Any] | None]:
    """torchvision's own choice, and both of its strategies whatever the number of boxes."""
    if torchvision is None:
        return {"torchvision": None}
    module = torchvision.ops.boxes
    peers = {"torchvision": torchvision.ops.batched_nms}
    for name, strategy in (("shifted", "_batched_nms_coordinate_trick"), ("by class", "_batched_nms_vanilla")):
        peers[f"tv {name}"] = getattr(module, strategy, None)
    return {name: widened(call) if call is not None else None for name, call in peers.items()}


def suppression(count: int, clustered: bool, size: tuple[int, int], seed: int) -> Case:
    """`batched_nms` of random boxes."""
    how = "clustered" if clustered else "uniform"
    given = boxes_for_nms(count, clustered, size, seed) | {"iou_threshold": 0.6}
    return Case(
        "nms", f"batched_nms {count} {how}", f"{CLASSES} classes", given, gfl_ops.batched_nms,
        torchvision_batched_nms(), agree=different_sets, oracle=formulas.select.nms_by_class,
    )  # fmt: skip


def one_class() -> dict[str, Any]:
    """The NMS inside a peer's chain: torchvision's compiled one where it is installed."""
    return {"one_class": torchvision.ops.nms} if torchvision else {}


def multiclass_nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    found = scene.candidates
    first = found.images == 0
    labels, values = found.labels[first][:, None], found.scores[first][:, None]
    scores = torch.zeros((len(labels), CLASSES)).scatter(1, labels, values)
    inputs = {"boxes": found.boxes[first].to(dtype), "scores": scores.to(dtype)}

    def ours(boxes: Tensor, scores: Tensor) -> Any:
        return gfl_ops.multiclass_nms(boxes, scores, 0.05, 0.6, 100)

    def eager(boxes: Tensor, scores: Tensor) -> Any:
        boxes, scores = widen(boxes), widen(scores)
        return formulas.select.multiclass_nms(boxes, scores, 0.05, 0.6, 100, **one_class())

    def agree(got: Any, want: Any) -> float:
        return different(got[1], want[1])

    what = f"{len(scores)} boxes, {CLASSES} classes"
    yield Case("multiclass_nms", "multiclass_nms", what, inputs, ours, {"eager": eager}, agree=agree)


def soft_nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    # As many as one class of an image has: nobody decays thousands.
    best = scene.candidates.scores.topk(min(500, len(scene.candidates.scores))).indices
    inputs = {name: value[best] for name, value in kept_boxes(scene, dtype).items()}

    def ours(boxes: Tensor, scores: Tensor) -> Any:
        return gfl_ops.soft_nms(boxes, scores, None, 0.3, 0.5, 1e-3, "linear")

    def eager(boxes: Tensor, scores: Tensor) -> Any:
        return formulas.select.soft_nms(widen(boxes), widen(scores), 0.3, 1e-3)

    def agree(got: Any, want: Any) -> float:
        return different(got[1], want[1])

    yield Case("soft_nms", "soft_nms", f"{len(best)} boxes", inputs, ours, {"eager": eager}, agree=agree)


@functools.cache
def ultralytics_nms() -> Callable[..., Any] | None:
    """Its `non_max_suppression`, if it is installed."""
    for name in ("ultralytics.utils.nms", "ultralytics.utils.ops"):
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(name).non_max_suppression
    return None


def postprocess(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    head = scene.trained
    inputs = {
        "cls_scores": [m.to(dtype) for m in head.cls_scores],
        "reg_preds": [m.to(dtype) for m in head.reg_preds],
        "image_sizes": head.image_sizes,
    }

    def ours(cls_scores: list[Tensor], reg_preds: list[Tensor], image_sizes: Tensor) -> Any:
        return gfl_ops.postprocess(cls_scores, reg_preds, head.strides, image_sizes, reg_max=head.reg_max)

    def eager(cls_scores: list[Tensor], reg_preds: list[Tensor], image_sizes: Tensor) -> Any:
        return formulas.select.postprocess(cls_scores, reg_preds, head.strides, scene.size, head.reg_max, **one_class())

    def ultralytics(cls_scores: list[Tensor], reg_preds: list[Tensor], image_sizes: Tensor) -> Any:
        suppress = ultralytics_nms()
        return formulas.select.ultralytics_postprocess(
            cls_scores, reg_preds, head.strides, scene.size, head.reg_max, suppress
        )

    peers = {"eager": eager, "ultralytics": ultralytics if ultralytics_nms() else None}
    # All scores are read, but of the distributions only the candidates'.
    reads = sum(m.numel() * m.element_size() for m in inputs["cls_scores"])
    reads += scene.candidates.rows.numel() * inputs["reg_preds"][0].element_size()
    what = f"{scene.batch} images, {len(scene.candidates.rows)} candidates"
    yield Case("postprocess", "postprocess", what, inputs, ours, peers, agree=different_detections, reads=reads)


MAKERS = {"nms": nms, "multiclass_nms": multiclass_nms, "soft_nms": soft_nms, "postprocess": postprocess}
