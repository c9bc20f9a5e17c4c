# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression, of one class or of many at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import as_dtype, detached, device_type
from ...core.random_inputs import boxes as draw_boxes
from ...core.random_inputs import uniform
from ...core.registry import OpSpec, Sample, register
from ..boxes import box_ops


def reference(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, legacy: bool) -> Tensor:
    """One pass over the kept boxes: each takes out of the rest what it suppresses."""
    threshold = box_ops.rounded(iou_threshold, boxes.dtype)
    rest = torch.sort(scores, stable=True, descending=True).indices
    kept = []
    while rest.numel():
        best, rest = rest[:1], rest[1:]
        kept.append(best)
        hit = box_ops.aligned_iou(boxes[best], boxes[rest], legacy) > threshold
        if idxs is not None:
            hit = hit & (idxs[best] == idxs[rest])
        rest = rest[~hit]
    return torch.cat(kept) if kept else rest


def fake(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, legacy: bool) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for n in (1, 0, 2, 63, 65, 129, 500):
        boxes = draw_boxes(n, device, dtype, generator, extent=100.0)
        scores = uniform((n,), device, dtype, generator)
        idxs = torch.randint(0, 4, (n,), generator=generator).to(device)
        yield Sample(f"one-class-n{n}", (boxes, scores, None, 0.5, False))
        yield Sample(f"classes-n{n}", (boxes, scores, idxs, 0.6, False))
        if n != 129:
            continue
        yield Sample("legacy", (boxes, scores, idxs, 0.5, True))
        yield Sample("negative-coordinates", (boxes - 90, scores, idxs, 0.5, False))
        yield Sample("equal-scores", (boxes, torch.ones_like(scores), idxs, 0.5, False))
        yield Sample("any-class-number", (boxes, scores, idxs * 2**61 - 2**62, 0.5, False))
        yield Sample("threshold-0", (boxes, scores, idxs, 0.0, False))
        yield Sample("threshold-1", (boxes, scores, idxs, 1.0, False))
        yield Sample("threshold-below-0", (boxes, scores, idxs, -0.5, False))
        yield Sample("threshold-above-1", (boxes, scores, None, 1.5, False))
        yield Sample("equal-boxes", (boxes[:1].expand(n, 4), scores, idxs, 0.99, False))
        yield Sample("strided", (boxes.t().contiguous().t(), torch.stack([scores, scores], 1)[:, 0], idxs, 0.5, False))
        yield Sample("degenerate", (boxes[:, [0, 1, 0, 3]], scores, None, 0.1, False))
        yield Sample("inverted", (boxes[:, [2, 1, 0, 3]], scores, None, 0.1, False))
        odd = boxes.clone()
        odd[::7, 1] = float("nan")
        odd[1::7, 2] = float("inf")
        odd[2::7, 0] = -float("inf")
        odd_scores = scores.clone()
        odd_scores[::5] = float("nan")
        odd_scores[1::5] = -0.0
        odd_scores[2::5] = 0.0
        odd_scores[3::5] = -float("inf")
        yield Sample("nan-and-infinity", (odd, odd_scores, idxs, 0.3, False))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    """Several panels; a block per class; a class that needs panels beside small ones."""
    for name, n, bound in (("panels", 3001, 0), ("classes", 5003, 4), ("large-class", 5003, 40)):
        boxes = draw_boxes(n, device, dtype, generator, extent=24.0)
        idxs = torch.randint(0, bound, (n,), generator=generator).clamp(max=bound // 10 or bound) if bound else None
        scores = uniform((n,), device, dtype, generator)
        yield Sample(f"{name}-n{n}", (boxes, scores, None if idxs is None else idxs.to(device), 0.5, False))


NMS = register(
    OpSpec(
        stem="nms",
        schema="(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, bool legacy) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="greedy non-maximum suppression, class by class",
        public=("nms", "batched_nms"),
        triton="nms",
    )
)


def check_boxes(op: str, boxes: Tensor, scores: Tensor) -> None:
    """What holds for `boxes` ``[N, 4]`` and `scores` ``[N]`` of every operator of this family."""
    checks.tensor(op, "boxes", boxes)
    checks.shape(op, "boxes", boxes, "[N, 4]", (None, 4))
    checks.tensor(op, "scores", scores)
    checks.shape(op, "scores", scores, "[N]", boxes.shape[:1])
    checks.same_device(op, "scores", scores, "boxes", boxes)


_CLASSES = (*checks.REAL, torch.uint16, torch.uint32, torch.uint64)


def class_numbers(op: str, idxs: Tensor, boxes: Tensor) -> Tensor:
    """`idxs` after its checks, as int64 numbers that are equal where the classes are."""
    checks.tensor(op, "idxs", idxs, _CLASSES)
    checks.shape(op, "idxs", idxs, "[N]", boxes.shape[:1])
    checks.same_device(op, "idxs", idxs, "boxes", boxes)
    if idxs.is_floating_point():
        return (idxs.double() + 0.0).view(torch.int64)  # the bits; −0 + 0 is 0
    return as_dtype(idxs, torch.int64)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, legacy: bool = False) -> Tensor:
    r"""Greedy non-maximum suppression: keep a box unless a better kept one overlaps it too much.

    .. math:: \mathrm{keep}(i) = \neg \exists\, j \text{ kept, before } i:\;
        \frac{|b_i \cap b_j|}{|b_i \cup b_j|} > \mathrm{threshold}

    The usual procedure of detectors, e.g. Ren et al., Faster R-CNN, NeurIPS 2015 (arXiv 1506.01497), section 3.3; the
    signature is torchvision's.

    Args:
        boxes: fp32, fp16, bf16 or fp64 ``[N, 4]``, corners x1, y1, x2, y2 in any one unit; may be negative.
        scores: floating ``[N]``. NaN counts as the greatest score.
        iou_threshold: a number; an IoU above it suppresses. IoUs lie in [0, 1], so 1 suppresses nothing and a negative
            number everything but the best.
        legacy: widths and heights are one larger, for boxes that name their last pixel (GFocal v1).

    Returns:
        int64 ``[K]``: indices of the kept boxes, by falling score, equal scores by lower index. No gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        IoU in fp32 (fp64 for fp64 boxes), every operation rounded once, against the threshold rounded to that type: the
        indices are equal on all backends. A pair with a NaN coordinate or with an area of union of 0 does not
        suppress, as in torchvision. N = 0 gives an empty result. The size of the result depends on the data, so a GPU
        is waited for once, at the end; `postprocess` has a fixed size instead.
    """
    op = "nms"
    check_boxes(op, boxes, scores)
    iou_threshold, legacy = checks.number(op, "iou_threshold", iou_threshold), checks.flag(op, "legacy", legacy)
    return NMS(device_type(boxes), detached(boxes), detached(scores), None, iou_threshold, legacy)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, legacy: bool = False) -> Tensor:
    r"""Greedy non-maximum suppression within each class: boxes of different classes do not touch each other.

    .. math:: \mathrm{keep}(i) = \neg \exists\, j \text{ kept, before } i:\; c_i = c_j \wedge
        \frac{|b_i \cap b_j|}{|b_i \cup b_j|} > \mathrm{threshold}

    As `nms`, with torchvision's signature. The classes are compared themselves: no offset is added to the coordinates,
    which costs their low bits elsewhere.

    Args:
        boxes: fp32, fp16, bf16 or fp64 ``[N, 4]``, corners x1, y1, x2, y2 in any one unit; may be negative.
        scores: floating ``[N]``. NaN counts as the greatest score.
        idxs: ``[N]`` of any real dtype, class (or image, or both in one number) of each box; any value.
        iou_threshold: a number; an IoU above it suppresses.
        legacy: widths and heights are one larger, for boxes that name their last pixel (GFocal v1).

    Returns:
        int64 ``[K]``: indices of the kept boxes of all classes, by falling score, equal scores by lower index. No
        gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        As for `nms`, but that with more than 2048 boxes a GPU is waited for twice. The same set as torchvision's, but
        for IoUs within 2 ulp of the threshold; its two strategies order equal scores differently.
    """
    op = "batched_nms"
    check_boxes(op, boxes, scores)
    classes = class_numbers(op, idxs, boxes)
    iou_threshold, legacy = checks.number(op, "iou_threshold", iou_threshold), checks.flag(op, "legacy", legacy)
    return NMS(device_type(boxes), detached(boxes), detached(scores), classes, iou_threshold, legacy)
