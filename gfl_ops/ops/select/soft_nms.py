# SPDX-License-Identifier: Apache-2.0
"""Soft-NMS: boxes that overlap a better one lose score instead of being dropped."""

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
from .nms import check_boxes, class_numbers

METHODS = ("linear", "gaussian")


def first_best(scores: Tensor) -> Tensor:
    """Position ``[1]`` of the greatest score, NaN the greatest of all; the first of equal ones."""
    best = scores.isnan()
    if not best.any():
        best = scores == scores.max()
    return best.nonzero()[0]


def reference(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    """Take the best box left, decay the others of its class, drop what falls below the minimum; until none is left."""
    threshold, minimum = box_ops.rounded(iou_threshold, boxes.dtype), box_ops.rounded(min_score, boxes.dtype)
    acc = accumulator(boxes.dtype)
    left = torch.arange(boxes.shape[0], device=boxes.device)
    score = scores.to(acc)
    final = score.clone()
    taken = []
    if left.numel():
        best = first_best(score)
        worthy = ~(score < minimum)
        left, score = (left[worthy], score[worthy]) if worthy.any() else (best, score[best])
    while left.numel():
        at = first_best(score)
        best = left[at]
        taken.append(best)
        final[best] = score[at]
        others = torch.arange(left.numel(), device=left.device) != at
        left, score = left[others], score[others]
        iou = box_ops.aligned_iou(boxes[best], boxes[left])
        if gaussian:
            # In fp64, then rounded: two libraries' exponentials differ too rarely there to take different boxes.
            weight = torch.exp(-iou.double().square() / sigma).to(acc).nan_to_num(1.0)
        else:
            weight = torch.where(iou >= threshold, 1 - iou, 1.0)
        if idxs is not None:
            weight = torch.where(idxs[left] == idxs[best], weight, 1.0)
        score = score * weight
        worthy = ~(score < minimum)
        left, score = left[worthy], score[worthy]
    keep = torch.cat(taken).sort().values if taken else left
    keep = keep[final[keep].sort(stable=True, descending=True).indices]
    return keep, final[keep].float()


def fake(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    gaussian: bool,
) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64), boxes.new_empty((kept,), dtype=torch.float32)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for n in (1, 0, 2, 17, 100):
        boxes = draw_boxes(n, device, dtype, generator, extent=60.0)
        scores = uniform((n,), device, dtype, generator)
        idxs = torch.randint(0, 3, (n,), generator=generator).to(device)
        for gaussian in (False, True):
            method = METHODS[gaussian]
            yield Sample(f"{method}-n{n}", (boxes, scores, None, 0.3, 0.5, 1e-3, gaussian))
            yield Sample(f"{method}-classes-n{n}", (boxes, scores, idxs, 0.3, 0.5, 0.1, gaussian))
            if n != 17:
                continue
            yield Sample(f"{method}-all-below", (boxes, scores, idxs, 0.3, 0.5, 2.0, gaussian))
            yield Sample(f"{method}-equal", (boxes[:1].expand(n, 4), scores * 0 + 0.5, None, 0.3, 0.9, 1e-3, gaussian))
            yield Sample(f"{method}-threshold-0", (boxes - 50, scores, None, 0.0, 0.5, 1e-3, gaussian))
            strided = torch.stack([boxes, boxes], 2)[:, :, 0]
            yield Sample(
                f"{method}-strided", (strided, torch.stack([scores] * 3, 1)[:, 1], idxs, 0.3, 2.0, 0.05, gaussian)
            )
            odd_boxes, odd = boxes.clone(), scores.clone()
            odd_boxes[::5, 1] = float("nan")
            odd_boxes[1::5, 2] = float("inf")
            odd[::4] = float("nan")
            odd[1::4] = float("-inf")
            yield Sample(f"{method}-nan-and-infinity", (odd_boxes, odd, idxs, 0.3, 0.5, 1e-3, gaussian))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    boxes = draw_boxes(1501, device, dtype, generator, extent=100.0)
    idxs = torch.randint(0, 2, (1501,), generator=generator).to(device)
    yield Sample("linear-n1501", (boxes, uniform((1501,), device, dtype, generator), idxs, 0.3, 0.5, 0.2, False))


SOFT_NMS = register(
    OpSpec(
        stem="soft_nms",
        schema="(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, float sigma, float min_score,"
        " bool gaussian) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        samples=samples,
        large=large,
        summary="NMS that lowers scores instead of dropping boxes, class by class",
        public=("soft_nms",),
    )
)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    r"""Soft-NMS: a box that overlaps a better one of its class loses score, and is dropped only when little is left.

    The best box left is taken, and the scores of the others of its class are multiplied by a weight of the IoU with it:

    .. math:: w_\mathrm{linear} = \begin{cases} 1 - \mathrm{IoU} & \mathrm{IoU} \ge \mathrm{threshold} \\
        1 & \text{else} \end{cases} \qquad w_\mathrm{gaussian} = e^{-\mathrm{IoU}^2 / \sigma}

    Bodla et al., Soft-NMS, ICCV 2017 (arXiv 1704.04503), section 3; mmcv's names and defaults.

    Args:
        boxes: fp32, fp16, bf16 or fp64 ``[N, 4]``, corners x1, y1, x2, y2.
        scores: floating ``[N]``, usually in [0, 1]. NaN counts as the greatest score, and stays NaN.
        idxs: ``[N]`` of any real dtype, class of each box, any value; None for one class.
        iou_threshold: a number; with "linear", an IoU of at least this much lowers a score.
        sigma: with "gaussian", how wide the decay is; a number > 0.
        min_score: a box is dropped once its score is below this. The best box of all is kept nonetheless, as in mmcv.
        method: "linear" or "gaussian".

    Returns:
        ``(keep, scores)``: int64 ``[K]``, indices of the kept boxes by falling final score, equal ones by lower index,
        and their final scores, fp32 ``[K]``. No gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, method or number outside the above.

    Note:
        Arithmetic in fp32, in fp64 for fp64 boxes; the exponential in fp64. A pair whose IoU is NaN leaves its scores
        as they are. Differs from mmcv's in comparing classes themselves instead of shifting coordinates, and in
        ordering equal scores.
    """
    op = "soft_nms"
    check_boxes(op, boxes, scores)
    if idxs is not None:
        idxs = class_numbers(op, idxs, boxes)
    iou_threshold = checks.number(op, "iou_threshold", iou_threshold)
    sigma = checks.number(op, "sigma", sigma, 0, exclusive=True)
    min_score = checks.number(op, "min_score", min_score)
    checks.choice(op, "method", method, METHODS)
    arguments = (iou_threshold, sigma, min_score, method == "gaussian")
    return SOFT_NMS(device_type(boxes), detached(boxes), detached(scores), idxs, *arguments)
