# SPDX-License-Identifier: Apache-2.0
"""From boxes with a score for every class to detections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, detached, device_type
from ...core.random_inputs import boxes as draw_boxes
from ...core.random_inputs import uniform
from ...core.registry import OpSpec, Sample, register
from ..boxes import box_ops
from .nms import reference as nms_reference


def reference(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold, NMS of all classes at once, cut."""
    threshold = box_ops.rounded(score_threshold, scores.dtype)
    row, label = (scores.to(accumulator(scores.dtype)) > threshold).nonzero(as_tuple=True)
    if boxes.shape[1] == 4:
        found = boxes[row]
    else:
        found = boxes.unflatten(1, (scores.shape[1], 4))[row, label]
    score = scores[row, label]
    keep = nms_reference(found, score, label, iou_threshold, legacy=False)
    if max_detections > 0:
        keep = keep[:max_detections]
    return found[keep], score[keep], label[keep]


def fake(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept, 4)), scores.new_empty((kept,)), scores.new_empty((kept,), dtype=torch.int64)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for n, c in ((1, 1), (0, 3), (33, 4), (129, 5)):
        boxes = draw_boxes(n, device, dtype, generator, extent=100.0)
        scores = uniform((n, c), device, dtype, generator)
        yield Sample(f"shared-n{n}-c{c}", (boxes, scores, 0.3, 0.5, 20))
        shift = uniform((n, c, 4), device, dtype, generator, -5.0, 5.0)
        per_class = (boxes[:, None] + shift).reshape(n, 4 * c)
        yield Sample(f"per-class-n{n}-c{c}", (per_class, scores, 0.3, 0.5, 20))
        if n != 33:
            continue
        yield Sample("all", (boxes, scores, 0.05, 0.5, -1))
        yield Sample("nothing-found", (boxes, scores, 1.0, 0.5, 100))
        yield Sample("no-classes", (boxes, scores[:, :0], 0.1, 0.5, 100))
        yield Sample("equal-scores", (boxes, torch.ones_like(scores), 0.5, 0.4, 50))
        strided = torch.stack([per_class, per_class], 2)[:, :, 1]
        yield Sample("strided", (strided, scores.t().contiguous().t(), 0.3, 0.5, 20))
        odd_boxes, odd = boxes.clone(), scores.clone()
        odd_boxes[::5, 2] = float("nan")
        odd[::4, 1] = float("nan")
        odd[1::4, 2] = float("inf")
        yield Sample("nan-and-infinity", (odd_boxes, odd, 0.3, 0.5, 50))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    boxes = draw_boxes(1501, device, dtype, generator, extent=24.0)
    yield Sample("n1501-c5", (boxes, uniform((1501, 5), device, dtype, generator), 0.05, 0.5, 300))


MULTICLASS_NMS = register(
    OpSpec(
        stem="multiclass_nms",
        schema="(Tensor boxes, Tensor scores, float score_threshold, float iou_threshold, int max_detections)"
        " -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="score threshold, class-wise NMS and cut for boxes with a score per class",
        public=("multiclass_nms",),
    )
)


def multiclass_nms(
    boxes: Tensor, scores: Tensor, score_threshold: float, iou_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Turn boxes with a score for every class into detections: threshold, NMS within each class, the best of all.

    .. math:: \{(b_i, s_{ic}, c) : s_{ic} > \mathrm{threshold}\} \to \text{NMS of each } c \to \text{the best } K

    What the heads of two-stage and dense detectors do with their predictions, e.g. Ren et al., Faster R-CNN, NeurIPS
    2015 (arXiv 1506.01497). A box may be found under several classes.

    Args:
        boxes: fp32, fp16, bf16 or fp64, corners x1, y1, x2, y2: ``[N, 4]``, shared by the classes, or ``[N, 4C]``,
            class c in the columns 4c … 4c+3.
        scores: floating ``[N, C]``, no column for the background. NaN is never above the threshold.
        score_threshold: a number; only scores above it count.
        iou_threshold: a number; an IoU above it suppresses.
        max_detections: how many to return at most; 0 or less for all.

    Returns:
        boxes ``[K, 4]`` and scores ``[K]``, in the dtypes of the input, and labels, int64 ``[K]`` in [0, C); by falling
        score, equal scores by lower box, then by lower class. No gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Scores are compared with the threshold in fp32, in fp64 for fp64 scores; overlaps are those of `nms`. K depends
        on the data, and a GPU is waited for to know the sizes; `postprocess` has a fixed size instead. mmdet's function
        of this name has a background column and returns boxes and scores in one tensor.
    """
    op = "multiclass_nms"
    checks.tensor(op, "scores", scores)
    checks.shape(op, "scores", scores, "[N, C]", (None, None))
    checks.tensor(op, "boxes", boxes)
    n, c = scores.shape
    if boxes.dim() != 2 or boxes.shape[0] != n or boxes.shape[1] not in (4, 4 * c):
        rule = f"must have shape [N, 4] = [{n}, 4] or [N, 4C] = [{n}, {4 * c}]"
        raise ValueError(checks.message(op, "boxes", rule, list(boxes.shape)))
    checks.same_device(op, "boxes", boxes, "scores", scores)
    return MULTICLASS_NMS(
        device_type(boxes),
        detached(boxes),
        detached(scores),
        checks.number(op, "score_threshold", score_threshold),
        checks.number(op, "iou_threshold", iou_threshold),
        checks.number(op, "max_detections", max_detections, integer=True),
    )
