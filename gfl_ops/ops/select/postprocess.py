# SPDX-License-Identifier: Apache-2.0
"""From the maps of a detection head to boxes: threshold, top-k, decoding, class-wise NMS, for a whole batch at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import device_type
from ...core.random_inputs import normal, uniform
from ...core.registry import OpSpec, Sample, register
from ..bins.integral import check_reg_max
from ..head.atss import check_strides, per_level
from .postprocess_reference import reference

OP = "postprocess"
MAX_LEVELS = 8
# A candidate's (location, class) pair is 32 bits of its sort key, in every backend.
MAX_PAIRS = 2**32
MAX_SLOTS = 2**31 - 1  # of an image's detections


class Detections(NamedTuple):
    """What `postprocess` finds, in fixed shapes: B images of K = max_detections slots, the best first.

    Attributes:
        boxes: fp32 ``[B, K, 4]``, xyxy in pixels; zero in unused slots.
        scores: fp32 ``[B, K]``, falling; zero in unused slots.
        labels: int64 ``[B, K]``, in [0, C); −1 in unused slots.
        count: int32 ``[B]``, how many slots of each image are used.
        locations: int64 ``[B, K]``, where each was read: level by level and row by row, an index over the locations of
            all levels; −1 in unused slots. `side_distributions` takes them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    locations: Tensor


def fake(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    image_sizes: Tensor,
    scale_factors: Tensor | None,
    reg_max: int,
    score_threshold: float,
    nms_pre: int,
    iou_threshold: float,
    max_detections: int,
    center_offset: Sequence[float],
    anchor_topk: bool,
    activated: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, batch = cls_scores[0], cls_scores[0].shape[0]
    return (
        like.new_empty((batch, max_detections, 4), dtype=torch.float32),
        like.new_empty((batch, max_detections), dtype=torch.float32),
        like.new_empty((batch, max_detections), dtype=torch.int64),
        like.new_empty((batch,), dtype=torch.int32),
        like.new_empty((batch, max_detections), dtype=torch.int64),
    )


def samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, large: bool = False
) -> Iterator[Sample]:
    """Small maps; all but the "smooth" ones decode exactly, so that all backends take equal decisions."""

    def call(
        id: str,
        batch: int = 2,
        classes: int = 5,
        reg_max: int = 8,
        sizes: Sequence[tuple[int, int]] = ((9, 13), (5, 7), (1, 1)),
        shift: float = 0.0,
        spread: float = 2.0,
        smooth: bool = False,
        layout: str = "nchw",
        scaled: bool = False,
        score_threshold: float = 0.3,
        nms_pre: int = 40,
        iou_threshold: float = 0.6,
        max_detections: int = 20,
        offset: float = 0.0,
        anchor_topk: bool = False,
        activated: bool = False,
        legacy: bool = False,
        extent: float = 1.0,
    ) -> Sample:
        def arranged(values: Tensor) -> Tensor:
            if layout == "transposed":
                return values.transpose(2, 3).contiguous().transpose(2, 3)
            if layout == "channels-last":
                return values.contiguous(memory_format=torch.channels_last)
            return values

        def score_map(h: int, w: int) -> Tensor:
            values = normal((batch, classes, h, w), device, dtype, generator, spread) + shift
            return arranged(values.sigmoid() if activated else values)

        def distribution_map(h: int, w: int) -> Tensor:
            if smooth:
                return arranged(normal((batch, 4 * (reg_max + 1), h, w), device, dtype, generator, 1.5))
            # Half of the mass in each of two bins, or all in one: every backend's softmax of it is exact.
            bins = torch.randint(reg_max + 1, (2, batch, 4, 1, h, w), generator=generator)
            values = torch.full((batch, 4, reg_max + 1, h, w), -1000.0)
            for chosen in bins:
                values.scatter_(2, chosen, 0.0)
            return arranged(values.flatten(1, 2).to(device=device, dtype=dtype))

        # Smaller than the maps, so that boxes are clipped and some lose their extent.
        image = torch.tensor([[7.5, 11.0], [9.0, 12.5]]).repeat(batch, 1)[:batch].to(device) * extent
        return Sample(
            id,
            (
                [score_map(h, w) for h, w in sizes],
                [distribution_map(h, w) for h, w in sizes],
                [1.0 * 2**level for level in range(len(sizes))],
                image,
                uniform((batch, 2), device, torch.float32, generator, 1.0, 3.0) if scaled else None,
                reg_max,
                score_threshold,
                nms_pre,
                iou_threshold,
                max_detections,
                [offset] * len(sizes),
                anchor_topk,
                activated,
                legacy,
            ),
        )

    if large:
        # More candidates of a level than a segment has room for, of which every one is sorted.
        yield call("a5355", batch=1, sizes=((70, 61), (35, 31)), shift=8.0, nms_pre=0, extent=6.0, max_detections=100)
        return
    yield call("pair")
    # An IoU is never above 1: nothing here depends on the last bit of an exponential.
    yield call("smooth", smooth=True, iou_threshold=1.0, max_detections=60)
    yield call("smooth-channels-last", smooth=True, iou_threshold=1.0, layout="channels-last", scaled=True, offset=0.5)
    yield call("batch0", batch=0)
    yield call("one-class-r16", batch=1, classes=1, reg_max=16)
    yield call("one-cell", batch=1, sizes=((1, 1),))
    yield call("empty-level", sizes=((0, 4), (5, 7)))
    yield call("nothing", shift=-50.0)
    yield call("all", sizes=((4, 5), (2, 3)), shift=8.0, nms_pre=0, iou_threshold=0.9)
    yield call("channels-last", layout="channels-last", scaled=True)
    yield call("transposed", layout="transposed", nms_pre=-1)
    yield call("anchor", anchor_topk=True, nms_pre=15, offset=0.5)
    yield call("anchor-legacy", anchor_topk=True, nms_pre=15, legacy=True, scaled=True)
    yield call("activated", activated=True, score_threshold=0.4)
    yield call("few-slots", max_detections=3)
    yield call("wide", batch=1, classes=81, reg_max=1, sizes=((6, 11),), score_threshold=0.8)
    # σ(x) is 1 for many of these, x itself is not equal.
    yield call("saturated", shift=30.0, spread=9.0, nms_pre=30)
    yield call("threshold0", sizes=((3, 3),), score_threshold=0.0)
    yield call("threshold1", score_threshold=1.0)


POSTPROCESS = register(
    OpSpec(
        stem="postprocess",
        schema=(
            "(Tensor[] cls_scores, Tensor[] reg_preds, float[] strides, Tensor image_sizes, Tensor? scale_factors,"
            " int reg_max, float score_threshold, int nms_pre, float iou_threshold, int max_detections,"
            " float[] center_offset, bool anchor_topk, bool activated, bool legacy)"
            " -> (Tensor boxes, Tensor scores, Tensor labels, Tensor count, Tensor locations)"
        ),
        reference=reference,
        fake=fake,
        samples=samples,
        large=functools.partial(samples, large=True),
        summary="head maps to detections: threshold, top-k, decoding, class-wise NMS",
        public=("postprocess",),
    )
)


def postprocess(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    image_sizes: Tensor | Sequence[Sequence[float]],
    *,
    reg_max: int = 16,
    score_threshold: float = 0.05,
    nms_pre: int = 1000,
    iou_threshold: float = 0.6,
    max_detections: int = 100,
    center_offset: float | Sequence[float] = 0.0,
    topk_mode: str = "pair",
    scale_factors: Tensor | Sequence[Sequence[float]] | None = None,
    activated: bool = False,
    legacy: bool = False,
) -> Detections:
    r"""Detections of a batch from the maps of a Generalized Focal Loss head.

    Per level, the (location, class) pairs above the threshold, the best `nms_pre` of them; each is decoded to

    .. math:: \bigl(c_x - s\,d_l,\; c_y - s\,d_t,\; c_x + s\,d_r,\; c_y + s\,d_b\bigr), \qquad
              d = \sum_i i \cdot \mathrm{softmax}(z)_i

    (equations 4 and 5 of Li et al., Generalized Focal Loss, arXiv 2006.04388), clipped to its image, and dropped if
    that leaves no width or height. Then non-maximum suppression within each class over all levels of the image.

    Args:
        cls_scores: one to 8 levels of fp32, fp16, bf16 or fp64 ``[B, C, H, W]``: logits, or probabilities if
            `activated`. Any memory format. NaN and −inf are never candidates.
        reg_preds: as many levels of ``[B, 4(R+1), H, W]``, logits of the distances left, top, right, bottom, the bins
            of a side together; their dtype may be another than that of `cls_scores`. Boxes with a NaN are dropped.
        strides: pixels between neighbouring locations, one number per level, > 0.
        image_sizes: ``[B, 2]``, height and width of each image without padding, in pixels of the network's input: a
            tensor (integer or floating; on the maps' device, so that nothing is copied) or a sequence of pairs.
        reg_max: R, the distance of the last bin, in strides; 1 to 128.
        score_threshold: a candidate's probability is above it: compared as ``x > fp32(logit(threshold))``. With 0 or
            less all are candidates, with 1 or more none.
        nms_pre: how many candidates are kept per level; 0 or less keeps all.
        iou_threshold: a box is suppressed by a better one of its class whose IoU with it is greater.
        max_detections: K, how many detections an image has at most.
        center_offset: where in its cell a location's centre is, in cells, one number or one per level: the centre of
            cell (x, y) is ``((x + offset)·s, (y + offset)·s)``. Not used by `legacy`.
        topk_mode: "pair" ranks pairs of location and class (mmdet 3); "anchor" ranks locations by their best class
            and keeps all classes above the threshold of the best `nms_pre` (mmdet 2, GFocal v1).
        scale_factors: ``[B, 2]``, horizontal and vertical: boxes are divided by it, after suppression.
        activated: `cls_scores` holds probabilities.
        legacy: the geometry of GFocal v1: centres ``x·s + (s−1)/2``, clipping at W−1 and H−1, widths and heights in
            the IoU one pixel greater.

    Returns:
        `Detections` ``(boxes [B, K, 4] fp32, scores [B, K] fp32, labels [B, K] int64, count [B] int32,
        locations [B, K] int64)``, the best first; unused slots are zero with label and location −1. A location is an
        index over all levels, the first level's first, each row by row. There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, option or number outside the above.
        NotImplementedError: `reg_max` above 128, more than 8 levels, or more than 2^32 pairs in one level of an image.

    Note:
        Ranking is by fp32 logit (by probability if `activated`), since sigmoid saturates; ties go to the lower (level,
        location, class), location being ``y·W + x``. Arithmetic is in fp32; fp64 maps are rounded to it first.
        Repeatable bit for bit. B = 0 and levels without a location are taken. `nms_pre` ≤ 0 means all, where mmdet's
        −1 drops one pair.
    """
    reg_max, levels = _check_maps(cls_scores, reg_preds, reg_max)
    cls, batch = cls_scores[0], cls_scores[0].shape[0]
    stride_list = check_strides(OP, strides, levels)
    offsets = per_level(OP, "center_offset", center_offset, levels)
    score_threshold = checks.number(OP, "score_threshold", score_threshold)
    nms_pre = checks.number(OP, "nms_pre", nms_pre, integer=True)
    iou_threshold = checks.number(OP, "iou_threshold", iou_threshold)
    max_detections = checks.number(OP, "max_detections", max_detections, 0, MAX_SLOTS, integer=True)
    checks.choice(OP, "topk_mode", topk_mode, ("pair", "anchor"))
    sizes = _pairs("image_sizes", image_sizes, cls, batch)
    factors = None if scale_factors is None else _pairs("scale_factors", scale_factors, cls, batch)
    # Detections have no gradient, and the dispatcher would warn of that at every call with maps that want one.
    with torch.no_grad():
        results = POSTPROCESS(
            device_type(cls),
            list(cls_scores),
            list(reg_preds),
            stride_list,
            sizes,
            factors,
            reg_max,
            score_threshold,
            nms_pre,
            iou_threshold,
            max_detections,
            offsets,
            topk_mode == "anchor",
            checks.flag(OP, "activated", activated),
            checks.flag(OP, "legacy", legacy),
        )
    return Detections(*results)


def _check_maps(cls_scores: Sequence[Tensor], reg_preds: Sequence[Tensor], reg_max: int) -> tuple[int, int]:
    """Both lists of maps against each other. Returns R and the number of levels."""
    reg_max = check_reg_max(OP, "reg_max", reg_max)
    for name, value in (("cls_scores", cls_scores), ("reg_preds", reg_preds)):
        if not isinstance(value, (list, tuple)):
            rule = "must be a list or tuple of tensors, one per level"
            raise TypeError(checks.message(OP, name, rule, type(value).__name__))
    levels = len(cls_scores)
    if levels == 0:
        raise ValueError(checks.message(OP, "cls_scores", "must have at least one level", "an empty list"))
    if levels > MAX_LEVELS:
        rule = f"with more than {MAX_LEVELS} levels is not supported"
        raise NotImplementedError(checks.message(OP, "cls_scores", rule, levels))
    if len(reg_preds) != levels:
        raise ValueError(
            checks.message(OP, "reg_preds", f"must have as many levels as `cls_scores`, {levels}", len(reg_preds))
        )
    first_cls, first_reg = cls_scores[0], reg_preds[0]
    for level, (cls, reg) in enumerate(zip(cls_scores, reg_preds, strict=True)):
        cls_name, reg_name = f"cls_scores[{level}]", f"reg_preds[{level}]"
        checks.tensor(OP, cls_name, cls)
        checks.tensor(OP, reg_name, reg)
        for name, level_map, first in ((cls_name, cls, first_cls), (reg_name, reg, first_reg)):
            if level_map.dtype != first.dtype:
                raise TypeError(
                    checks.message(OP, name, f"must have the dtype of the first level, {first.dtype}", level_map.dtype)
                )
            checks.same_device(OP, name, level_map, "cls_scores[0]", first_cls)
        batch, classes = (None, None) if level == 0 else first_cls.shape[:2]
        checks.shape(OP, cls_name, cls, "[B, C, H, W]", (batch, classes, None, None))
        expected = (cls.shape[0], 4 * (reg_max + 1), cls.shape[2], cls.shape[3])
        checks.shape(OP, reg_name, reg, "[B, 4(R+1), H, W]", expected)
        pairs = cls.shape[1] * cls.shape[2] * cls.shape[3]
        if pairs > MAX_PAIRS:
            rule = "with more than 2^32 pairs of location and class is not supported"
            raise NotImplementedError(checks.message(OP, cls_name, rule, pairs))
    return reg_max, levels


def _pairs(name: str, value: Tensor | Sequence[Sequence[float]], like: Tensor, batch: int) -> Tensor:
    """`value` as fp32 [B, 2] on the maps' device."""
    if isinstance(value, Tensor):
        checks.tensor(OP, name, value, checks.FLOATING + checks.INTEGER)
        if value.is_meta:
            checks.same_device(OP, name, value, "cls_scores", like)
        pairs = value
    else:
        pairs = _tensor_of_pairs(name, value, batch)
    checks.shape(OP, name, pairs, "[B, 2]", (batch, 2))
    # Sizes come from the host as a rule. Capture wants them on the device, and says so itself.
    pairs = pairs.to(device=like.device, dtype=torch.float32)
    if checks.SYNCHRONISING and not bool(((pairs > 0) & pairs.isfinite()).all()):
        raise ValueError(checks.message(OP, name, "must be positive and finite", pairs.tolist()))
    return pairs


def _tensor_of_pairs(name: str, value: Sequence[Sequence[float]], batch: int) -> Tensor:
    if not isinstance(value, (list, tuple)):
        rule = "must be a tensor or a list or tuple of pairs"
        raise TypeError(checks.message(OP, name, rule, type(value).__name__))
    if len(value) != batch:
        raise ValueError(checks.message(OP, name, f"must have one pair per image, {batch}", len(value)))
    numbers: list[float] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(checks.message(OP, f"{name}[{i}]", "must be a pair of numbers", repr(pair)))
        numbers += [checks.number(OP, f"{name}[{i}]", x, dtype=torch.float32) for x in pair]
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 2)
