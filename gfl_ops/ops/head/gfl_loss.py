# SPDX-License-Identifier: Apache-2.0
"""The whole loss of a GFL head: quality focal, GIoU and distribution focal loss over all levels and images."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.registry import OnePass, OpSpec, Sample, register
from ..bins.dfl import two_bin_cross_entropy
from ..bins.integral import MAX_REG_MAX, bounded_logits, expectation
from ..boxes.distance import box_of, reference_box_to_distance
from ..boxes.iou import reference as box_loss
from ..score.terms import absolute_power, binary_cross_entropy
from .atss import Assignment, centres, check_strides, per_level
from .head_inputs import check_gt_boxes, check_maps, check_weights, draw_head, with_one_accumulator
from .one_pass import define_head_loss

# Of the union and of the enclosing box, in cells squared: the value of mmdet's head.
IOU_EPS = 1e-6
# Keeps the target of the distribution below its last bin.
TARGET_MARGIN = 0.1


class HeadLoss(NamedTuple):
    """The scalars that `gfl_loss` returns; see there."""

    cls: Tensor
    box: Tensor
    dfl: Tensor
    num_pos: Tensor
    box_weight: Tensor


def rows(level: Tensor) -> Tensor:
    """``[B, C, H, W] -> [B, H·W, C]``."""
    return level.flatten(2).transpose(1, 2)


def positives(labels: Tensor, matched: Tensor, classes: int, slots: int) -> Tensor:
    """Locations with a class and a box. The others are background, but for label −2, which no loss counts."""
    return (labels >= 0) & (labels < classes) & (matched >= 0) & (matched < slots)


def distribution_losses(logits: Tensor, distance: Tensor, margin: float) -> Tensor:
    """DFL of ``[..., 4, bins]`` against distances in bins ``[..., 4]``, the mean over the sides; 0 for a NaN."""
    position = distance.nan_to_num(0.0).clamp(0, logits.shape[-1] - 1 - margin)
    left = position.long()
    losses = two_bin_cross_entropy(
        logits.flatten(0, -2),
        left.flatten(),
        left.flatten() + 1,
        (left + 1 - position).flatten(),
        (position - left).flatten(),
    )
    return torch.where(distance.isnan(), 0.0, losses.view_as(distance)).mean(-1)


def _level(
    cls_score: Tensor,
    reg_pred: Tensor,
    stride: float,
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    reg_max: int,
    beta: float,
    offset: float,
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of the three losses and of w over one level, and the positives of each image."""
    images, classes, height, width = cls_score.shape
    slots = gt_boxes.shape[1] - 1
    positive = positives(labels, matched, classes, slots)

    # Masked before the softmax rather than after the loss, so that no NaN outside the positives reaches a gradient.
    logits = bounded_logits(rows(reg_pred).unflatten(2, (4, reg_max + 1)))
    logits = torch.where(positive[..., None, None], logits, 0.0)
    distance = expectation(logits)
    centre = (centres(height, width, stride, offset, legacy, labels.device) / stride).to(distance.dtype)
    decoded = box_of(centre, distance, None)
    slot = torch.where(positive, matched, slots)[..., None].expand(-1, -1, 4)
    target = gt_boxes.gather(1, slot) / stride
    grown = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=target.dtype, device=target.device) if legacy else 0.0
    pair = (decoded + grown).flatten(0, 1), (target + grown).flatten(0, 1)
    quality = box_loss(pair[0].detach(), pair[1], "overlap", IOU_EPS).view(images, height * width)
    giou = box_loss(*pair, "giou", IOU_EPS).view(images, height * width)

    dfl = distribution_losses(logits, reference_box_to_distance(centre, target, None, 0.0), TARGET_MARGIN)

    counted = labels != -2
    x = torch.where(counted[..., None], rows(cls_score).to(distance.dtype), 0.0)
    is_label = positive[..., None] & (labels[..., None] == torch.arange(classes, device=labels.device))
    score = torch.where(is_label, quality[..., None], 0.0)
    p, entropy = binary_cross_entropy(x, score, activated=False)
    quality_focal = torch.where(counted, (absolute_power(score - p, beta) * entropy).sum(-1), 0.0)

    weight = torch.where(positive, x.detach().amax(-1).sigmoid(), 0.0)
    return (
        quality_focal.sum(),
        torch.where(positive, giou * weight, 0.0).sum(),
        torch.where(positive, dfl * weight, 0.0).sum(),
        weight.sum(),
        positive.sum(1),
    )


def reference(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    cls_norm: Tensor | None,
    box_norm: Tensor | None,
    reg_max: int,
    loss_weights: Sequence[float],
    beta: float,
    center_offset: Sequence[float],
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decodes every location and masks those that are not positive; in fp32, or in fp64 for fp64 maps."""
    acc = accumulator(cls_scores[0].dtype)
    # One more slot, for locations without a box.
    slots = torch.cat([gt_boxes.to(acc), gt_boxes.new_zeros((gt_boxes.shape[0], 1, 4), dtype=acc)], 1)
    found = []
    start = 0
    for cls_score, reg_pred, stride, offset in zip(cls_scores, reg_preds, strides, center_offset):
        here = slice(start, start + cls_score.shape[2] * cls_score.shape[3])
        start = here.stop
        found.append(
            _level(
                cls_score,
                reg_pred,
                stride,
                labels[:, here],
                matched[:, here],
                slots,
                reg_max,
                beta,
                offset,
                legacy,
            )
        )
    quality_focal, box, dfl, weight, counts = (torch.stack(parts).sum(0) for parts in zip(*found))
    if cls_norm is None:
        cls_norm = counts.clamp(min=1).sum().clamp(min=1).to(acc)
    if box_norm is None:
        box_norm = weight.clamp(min=1)
    # Not numbers of Python, which turn the tangent of a single number into fp64 under torch.func.
    for_cls, for_box, for_dfl = (torch.full_like(weight, w) for w in loss_weights)
    return (
        for_cls * quality_focal / cls_norm,
        for_box * box / box_norm,
        for_dfl * dfl / box_norm,
        counts.sum().to(acc),
        weight,
    )


def fake(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    labels: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    cls_norm: Tensor | None,
    box_norm: Tensor | None,
    reg_max: int,
    loss_weights: Sequence[float],
    beta: float,
    center_offset: Sequence[float],
    legacy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = [cls_scores[0].new_empty((), dtype=accumulator(cls_scores[0].dtype)) for _ in range(5)]
    return scalar[0], scalar[1], scalar[2], scalar[3], scalar[4]


def samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, large: bool = False
) -> Iterator[Sample]:
    acc = accumulator(dtype)

    def drawn(images: int, classes: int, reg_max: int, *others: Any) -> list:
        return draw_head(device, dtype, generator, images, classes, 4 * (reg_max + 1), *others)

    def rest(reg_max: int, levels: int, beta: float = 2.0, legacy: bool = False, offset: float = 0.0) -> list:
        return [reg_max, [1.0, 2.0, 0.25], beta, [offset] * levels, legacy]

    if large:
        # More tiles than the threads that add up their sums.
        yield Sample("b4-a17171", (*drawn(4, 2, 2, [(131, 129), (17, 16)], 9), None, None, *rest(2, 2)))
        return
    # "detached": the IoU and w are constants to the gradient, but not to a numerical difference.
    yield Sample("background", (*drawn(1, 3, 2, [(3, 4), (2, 2)], 0, 0.0), None, None, *rest(2, 2)))
    pyramid = [(9, 14), (5, 7), (3, 4), (2, 2), (1, 1)]
    case = drawn(2, 80, 16, pyramid, 7)
    norms = [torch.tensor(v, dtype=acc, device=device) for v in (37.5, 11.25)]
    yield Sample("detached-pyramid", (*case, None, None, *rest(16, 5)))
    yield Sample("detached-norms", (*case, *norms, *rest(16, 5)))
    yield Sample("detached-legacy", (*case, None, None, *rest(16, 5, legacy=True)))
    yield Sample("detached-beta1.5-offset", (*case, norms[0], None, *rest(16, 5, beta=1.5, offset=0.5)))
    channels_last = [[m.contiguous(memory_format=torch.channels_last) for m in maps] for maps in case[:2]]
    yield Sample("detached-channels-last", (*channels_last, *case[2:], None, None, *rest(16, 5)))
    sliced = [[torch.cat([m, m], 1)[:, : m.shape[1]] for m in maps] for maps in case[:2]]
    yield Sample("detached-sliced", (*sliced, *case[2:], None, None, *rest(16, 5)))
    yield Sample("detached-one-cell", (*drawn(1, 1, 1, [(1, 1)], 1, 1.0), None, None, *rest(1, 1)))
    yield Sample("detached-long-rows", (*drawn(1, 5, 7, [(3, 401)], 3), None, None, *rest(7, 1)))
    yield Sample("detached-all-positive", (*drawn(3, 20, 8, [(4, 4), (2, 2)], 5, 0.9), None, None, *rest(8, 2)))
    yield Sample("detached-images0", (*drawn(0, 3, 2, [(3, 4), (2, 2)], 2), None, None, *rest(2, 2)))
    background = drawn(2, 7, 16, [(6, 6)], 3, 0.0)
    yield Sample("background-with-boxes", (*background, None, None, *rest(16, 1)))
    outside = [*background[:3], torch.full_like(background[3], -2), *background[4:]]
    yield Sample("background-outside", (*outside, None, None, *rest(16, 1)))
    extreme = drawn(2, 7, 4, [(6, 6)], 3)
    extreme[:2] = [[(m * 2000).clamp(-1e4, 1e4) for m in maps] for maps in extreme[:2]]
    yield Sample("detached-extreme", (*extreme, None, None, *rest(4, 1)))


_SCHEMA = (
    "(Tensor[] cls_scores, Tensor[] reg_preds, float[] strides, Tensor labels, Tensor matched, Tensor gt_boxes,"
    " Tensor? cls_norm, Tensor? box_norm, int reg_max, float[] loss_weights, float beta, float[] center_offset,"
    " bool legacy) -> (Tensor cls, Tensor box, Tensor dfl, Tensor num_pos, Tensor box_weight)"
)
head_loss = define_head_loss("gfl_loss", _SCHEMA)

GFL_LOSS = register(
    OpSpec(
        stem="gfl_loss",
        schema=_SCHEMA,
        reference=reference,
        fake=fake,
        samples=samples,
        large=functools.partial(samples, large=True),
        one_pass=OnePass(head_loss, ("cls_scores", "reg_preds")),
        summary="the whole head loss over all levels and images",
        public=("gfl_loss",),
        differentiable=("cls_scores", "reg_preds"),
        grad_outputs=(0, 1, 2),
    )
)


def check_assignment(
    op: str, assignment: Assignment | Sequence[Tensor], images: int, cells: int, device: Tensor
) -> tuple[Tensor, Tensor]:
    if not isinstance(assignment, (tuple, list)) or len(assignment) < 2:
        raise TypeError(checks.message(op, "assignment", "must be what atss_assign returns", type(assignment).__name__))
    for name, value in zip(("labels", "matched"), assignment):
        argument = f"assignment.{name}"
        checks.tensor(op, argument, value, checks.INTEGER)
        checks.shape(op, argument, value, "[B, A]", (images, cells))
        checks.same_device(op, argument, value, "cls_scores", device)
    return assignment[0].long(), assignment[1].long()


def _norm(op: str, argument: str, value: float | Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        number = checks.number(op, argument, value, dtype=dtype)
        return torch.full((), number, dtype=dtype, device=like.device)
    checks.tensor(op, argument, value, checks.FLOATING + checks.INTEGER)
    if value.numel() != 1:
        raise ValueError(checks.message(op, argument, "must hold one number", list(value.shape)))
    checks.same_device(op, argument, value, "cls_scores", like)
    return value.detach().reshape(()).to(dtype)


def gfl_loss(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    strides: Sequence[float],
    assignment: Assignment,
    gt_boxes: Tensor,
    *,
    reg_max: int = 16,
    loss_weights: Sequence[float] = (1.0, 2.0, 0.25),
    beta: float = 2.0,
    cls_norm: float | Tensor | None = None,
    box_norm: float | Tensor | None = None,
    center_offset: float | Sequence[float] = 0.0,
    legacy: bool = False,
) -> HeadLoss:
    r"""The whole loss of a GFL head, weighted and normalised: classification, box and distribution.

    .. math::
        L_{cls} = \frac{w_0}{n_{cls}} \sum_{\text{locations}} \mathrm{QFL}, \quad
        L_{box} = \frac{w_1}{n_{box}} \sum_{\text{positives}} w \, (1 - \mathrm{GIoU}), \quad
        L_{dfl} = \frac{w_2}{n_{box}} \sum_{\text{positives}} w \, \frac14 \sum_{\text{sides}} \mathrm{DFL}

    Equation 8 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), as the published detectors compute
    it: boxes in units of the stride, the quality target the IoU of the decoded box, w the location's largest class
    probability, the target of a distribution clamped to [0, R − 0.1].

    Args:
        cls_scores: one tensor per level, fp32, fp16, bf16 or fp64 ``[B, C, H, W]``: class logits.
        reg_preds: one tensor per level, ``[B, 4(R+1), H, W]``: distribution logits, sides left, top, right, bottom,
            bins innermost. The dtype may differ from that of `cls_scores`. Any memory format; nothing is copied.
        strides: pixels per cell of each level, > 0.
        assignment: what `atss_assign` returned: `labels` ``[B, A]`` and `matched` ``[B, A]`` over the A cells of all
            levels. A label in [0, C) with a slot in [0, G) is a positive; −2 is left out; anything else is background.
        gt_boxes: ``[B, G, 4]`` xyxy in pixels, the boxes that `matched` counts.
        reg_max: R, in [1, 128].
        loss_weights: of the classification, box and distribution loss.
        beta: exponent of the quality focal loss, >= 0.
        cls_norm: :math:`n_{cls}`, a number or a tensor of one element, which is not read by the host; by default the
            sum over the images of max(positives, 1).
        box_norm: :math:`n_{box}`, the same; by default max(Σ w, 1). A norm that is given is used as it is: with several
            ranks, pass the means of what `head_loss_norms` gives, the second at least 1.
        center_offset: position of a centre within its cell, in cells; one number, or one per level.
        legacy: GFocal v1's geometry: centres (stride − 1)/2 pixels further, + 1 on widths and heights in IoU and GIoU.

    Returns:
        ``HeadLoss(cls, box, dfl, num_pos, box_weight)``: the three losses, the number of positives and Σ w, as scalars
        on the maps' device; fp32, or fp64 for fp64 maps.

    The gradient reaches `cls_scores` and `reg_preds`, through the losses alone: not through the norms, w or the IoU
    that the quality focal loss aims at.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. Without positives `box` and
        `dfl` are 0 and still attached to the graph. Gradients have the memory format of the maps. Agrees with mmdet
        3.3.0's GFLHead, which divides by its norms plus 1.19e-07.
    """
    op = "gfl_loss"
    reg_max = checks.number(op, "reg_max", reg_max, 1, MAX_REG_MAX, integer=True)
    images, _classes = check_maps(op, cls_scores, reg_preds, "4(R+1)", 4 * (reg_max + 1))
    first = cls_scores[0]
    stride_list = check_strides(op, strides, len(cls_scores))
    offsets = per_level(op, "center_offset", center_offset, len(cls_scores))
    cells = sum(m.shape[2] * m.shape[3] for m in cls_scores)
    labels, matched = check_assignment(op, assignment, images, cells, first)
    check_gt_boxes(op, gt_boxes, images, first)
    legacy = checks.flag(op, "legacy", legacy)
    cls_maps, reg_maps, acc = with_one_accumulator(cls_scores, reg_preds)
    cls, box, dfl, num_pos, box_weight = head_loss(
        cls_maps,
        reg_maps,
        stride_list,
        labels,
        matched,
        gt_boxes.detach().to(acc),
        _norm(op, "cls_norm", cls_norm, first, acc),
        _norm(op, "box_norm", box_norm, first, acc),
        reg_max,
        check_weights(op, "loss_weights", loss_weights, "three", acc),
        checks.number(op, "beta", beta, 0, dtype=acc),
        offsets,
        legacy,
    )
    return HeadLoss(cls, box, dfl, num_pos.detach(), box_weight.detach())
