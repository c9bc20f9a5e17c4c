# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""ultralytics' losses, decoding, suppression and task-aligned assigner, by ours; and ultralytics with ours inside.

All of it can be used without ultralytics. ``patch()`` lets an installed ultralytics (8.3 and 8.4) call it, models and
checkpoints stay as they are; ``unpatch()`` takes it out again.

Here `reg_max` counts *bins* (16 in YOLOv8: distances 0 to 15), where it is the last bin in mmdet and in `gfl_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import accumulator
from ..functional import batched_nms, distribution_focal_loss, integral
from ..ops.bins.integral import MAX_REG_MAX
from ..ops.boxes.iou import pairs
from ._patch import Change, Patch, Replaced, graft, stand_in
from ._task_aligned import TaskAlignedAssigner, enlarges, ultralytics_forward
from ._yolo_loss import detection_loss

__all__ = [
    "DFL",
    "BboxLoss",
    "DFLoss",
    "TaskAlignedAssigner",
    "complete_iou_loss",
    "non_max_suppression",
    "patch",
    "unpatch",
]

# How far a target stays below the last bin.
_MARGIN = 0.01
_EPS = 1e-7


def complete_iou_loss(pred: Tensor, target: Tensor) -> Tensor:
    r"""1 − CIoU as ultralytics has it, whose term of the sides' ratio counts at every IoU.

    .. math:: L = 1 - \frac{I}{U} + \frac{\rho^2}{c^2} + \frac{v}{1 - I/U + v} v

    Zheng et al., TCYB 2022 (arXiv 2005.03572); `gfl_ops.box_iou_loss` has mmdet's, without the last term up to an IoU
    of 1/2.

    Args:
        pred, target: floating ``[N, 4]``, boxes xyxy.

    Returns:
        ``[N]``, fp32, or fp64 for fp64 `pred`. The gradient reaches both, the factor of the last v excepted.

    Raises:
        TypeError, ValueError: a dtype or a shape other than these.
    """
    op = "complete_iou_loss"
    loss = pairs(op, pred, target, "diou", _EPS)
    acc = accumulator(pred.dtype)
    p, t = pred.to(acc), target.to(acc)
    with torch.no_grad():
        iou = pairs(op, p, t, "overlap", _EPS)
    size_p, size_t = p[:, 2:] - p[:, :2], t[:, 2:] - t[:, :2]
    angle = (size_t[:, 0] / (size_t[:, 1] + _EPS)).atan() - (size_p[:, 0] / (size_p[:, 1] + _EPS)).atan()
    v = 4 / math.pi**2 * angle**2
    alpha = (v / (1 - iou + v + _EPS)).detach()
    return loss + alpha * v


def _side_losses(pred: Tensor, target: Tensor, bins: int) -> Tensor:
    """DFL of the rows of `pred` ``[M, bins]`` against as many positions, ``[M]``; `target` is left as it is."""
    # bf16 would round the upper bound to the last bin itself.
    position = target.detach().reshape(-1).to(accumulator(target.dtype)).clamp(0, bins - 1 - _MARGIN)
    return distribution_focal_loss(pred, position, reduction="none")


class DFLoss(nn.Module):
    """Distribution focal loss (arXiv 2006.04388, eq. 6) of boxes, the mean over their sides.

    Args:
        reg_max: number of bins, 2 to 129.
    """

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        self.reg_max = checks.number("DFLoss", "reg_max", reg_max, 2, MAX_REG_MAX + 1, integer=True)

    def __call__(self, pred_dist: Tensor, target: Tensor) -> Tensor:
        """Loss of `pred_dist` ``[N·S, bins]`` (logits) against `target` ``[N, S]`` in bins: ``[N, 1]``, at least fp32.

        A target is held within [0, bins − 1.01], in a copy: ultralytics does that to the caller's tensor.
        """
        loss = _side_losses(pred_dist, target, pred_dist.shape[-1])
        return loss.reshape(target.shape).mean(-1, keepdim=True)


def _targets(anchor_points: Tensor, boxes: Tensor) -> Tensor:
    """Distances l, t, r, b of the points to the sides of the boxes, ``[..., 4]``."""
    return torch.cat([anchor_points - boxes[..., :2], boxes[..., 2:] - anchor_points], -1)


class BboxLoss(nn.Module):
    """CIoU and distribution focal losses of the boxes at the positives.

    Args:
        reg_max: number of bins; with 1 the distances are predicted themselves and have an L1 loss.
    """

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        self.dfl_loss = DFLoss(reg_max) if reg_max > 1 else None

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor | float,
        fg_mask: Tensor,
        imgsz: Tensor | None = None,
        stride: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two losses, scalars, each positive weighted by its summed score and all divided by `target_scores_sum`.

        Args:
            pred_dist: ``[B, A, 4·bins]`` logits, or ``[B, A, 4]`` distances with one bin.
            pred_bboxes: ``[B, A, 4]`` xyxy, in units of the stride.
            anchor_points: ``[A, 2]``, in units of the stride.
            target_bboxes: ``[B, A, 4]`` xyxy, in units of the stride.
            target_scores: ``[B, A, C]``.
            target_scores_sum: a number, or a tensor of one, which is not read by the host.
            fg_mask: bool ``[B, A]``, the positives.
            imgsz: ``[2]``, height and width; only for one bin. Older ultralytics passes neither this
            nor stride: ``[A, 1]``, pixels a unit; then the second loss is 0 with one bin.
        """
        chosen = fg_mask.nonzero(as_tuple=True)
        weight = target_scores[chosen].sum(-1)
        boxes = target_bboxes[chosen]
        weight = weight.to(accumulator(weight.dtype))
        loss_iou = (complete_iou_loss(pred_bboxes[chosen], boxes) * weight).sum() / target_scores_sum

        points = anchor_points.expand(*fg_mask.shape, 2)[chosen]
        distance, target = pred_dist[chosen], _targets(points, boxes)
        if self.dfl_loss is not None:
            bins = self.dfl_loss.reg_max
            losses = _side_losses(distance.reshape(-1, bins), target, bins)
        elif imgsz is None or stride is None:
            return loss_iou, loss_iou.new_zeros(())
        else:
            pixels = stride.expand(*fg_mask.shape, 1)[chosen] / imgsz.flip(0).repeat(2)
            losses = ((distance - target) * pixels).abs()
        return loss_iou, (losses.reshape(-1, 4).mean(-1) * weight).sum() / target_scores_sum


class DFL(nn.Module):
    """Expected distances of a head's distributions; takes the place of ultralytics' module, state dict included.

    Args:
        c1: number of bins, 2 to 129.
    """

    def __init__(self, c1: int = 16) -> None:
        super().__init__()
        c1 = checks.number("DFL", "c1", c1, 2, MAX_REG_MAX + 1, integer=True)
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data.copy_(torch.arange(c1).reshape(1, c1, 1, 1))
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 4·bins, A]`` -> distances ``[B, 4, A]`` in bins, in the input's dtype, computed in fp32."""
        return integral(x.transpose(1, 2), self.c1 - 1).transpose(1, 2).to(x.dtype)


def non_max_suppression(
    prediction: Tensor | list[Any] | tuple[Any, ...],
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    classes: list[int] | None = None,
    agnostic: bool = False,
    multi_label: bool = False,
    max_det: int = 300,
    nc: int = 0,
    max_nms: int = 30000,
    return_idxs: bool = False,
) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Detections of a batch from a YOLO head's decoded output, all images in one suppression.

    ultralytics stops after 2 seconds and a bit, with a warning and without the remaining images; this does not.

    Args:
        prediction: floating ``[B, 4 + C + M, A]``: boxes x, y, w, h, C scores, M more values; or a list with it first.
        conf_thres: only scores above it count; in [0, 1].
        iou_thres: an IoU above it suppresses; in [0, 1].
        classes: only these count.
        agnostic: boxes of different classes suppress each other.
        multi_label: a box may be found under several classes, else under its best.
        max_det: how many an image has at most.
        nc: C; 0 stands for all values after the box.
        max_nms: only so many of an image's candidates, the best, take part.
        return_idxs: also return which of the A boxes were taken.

    Returns:
        One tensor ``[K, 6 + M]`` an image, x1, y1, x2, y2, score, class and the M more, the best first; fp32 (fp64 for
        fp64). With `return_idxs` also a list of int64 ``[K]``. Classes are compared: no offset costs low bits.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or number outside the above.
    """
    op = "non_max_suppression"
    maps = prediction[0] if isinstance(prediction, (list, tuple)) else prediction
    checks.tensor(op, "prediction", maps)
    conf_thres, iou_thres = (
        checks.number(op, name, value, 0, 1) for name, value in (("conf_thres", conf_thres), ("iou_thres", iou_thres))
    )
    count, max_det, max_nms = (
        checks.number(op, name, value, integer=True)
        for name, value in (("nc", nc), ("max_det", max_det), ("max_nms", max_nms))
    )
    count = count or (maps.shape[1] - 4 if maps.dim() == 3 else 0)
    if maps.dim() != 3 or maps.shape[1] < 4 + count or count < 1:
        raise ValueError(checks.message(op, "prediction", "must have shape [B, 4 + C + M, A]", list(maps.shape)))
    maps = maps.detach()
    scores = maps[:, 4 : 4 + count].transpose(1, 2)
    if multi_label and count > 1:
        image, place, label = (scores > conf_thres).nonzero(as_tuple=True)
    else:
        best, classes_of = scores.max(2)
        image, place = (best > conf_thres).nonzero(as_tuple=True)
        label = classes_of[image, place]
    if classes is not None:
        wanted = torch.isin(label, torch.as_tensor(classes, device=label.device))
        image, place, label = image[wanted], place[wanted], label[wanted]
    found = maps[image, :, place]
    score = scores[image, place, label]
    centre, half = found[:, :2], found[:, 2:4] / 2
    rows = torch.cat(
        [
            centre - half,
            centre + half,
            score[:, None],
            label[:, None].to(accumulator(maps.dtype)),
            found[:, 4 + count :],
        ],
        1,
    )
    # The best first, so that what is kept of an image is a prefix; equal scores by lower place and class.
    order = score.sort(descending=True, stable=True).indices
    if len(order) > max_nms:
        chosen = [order[image[order] == i][:max_nms] for i in range(maps.shape[0])]
        order = torch.cat(chosen)
    rows, image, place, label = rows[order], image[order], place[order], label[order]
    group = image if agnostic else image * count + label
    keep = batched_nms(rows[:, :4], rows[:, 4], group, iou_thres)
    kept = [keep[image[keep] == i][:max_det] for i in range(maps.shape[0])]
    output = [rows[k] for k in kept]
    return (output, [place[k] for k in kept]) if return_idxs else output


def _suppression_by(original: Any) -> Any:
    """ultralytics' function, served by ours for upright boxes that need suppression, else by `original`, unhurried."""

    def suppression(
        prediction: Any,
        conf_thres: float = 0.25,
        iou_thres: float = 0.45,
        classes: Any = None,
        agnostic: bool = False,
        multi_label: bool = False,
        *others: Any,
        **named: Any,
    ) -> Any:
        """ultralytics' call; `max_time_img` and `max_wh` are of no account."""
        # In some versions a seventh argument is `labels`, so what stands there is not for us to tell.
        maps = prediction[0] if isinstance(prediction, (list, tuple)) else prediction
        special = named.get("rotated") or named.get("end2end") or named.get("labels")
        if others or special or maps.dim() != 3 or maps.shape[-1] == 6:
            if not others:
                named["max_time_img"] = math.inf
            return original(prediction, conf_thres, iou_thres, classes, agnostic, multi_label, *others, **named)
        taken = {k: named[k] for k in ("max_det", "nc", "max_nms", "return_idxs") if k in named}
        chosen = None if classes is None else torch.as_tensor(classes).reshape(-1).tolist()
        return non_max_suppression(prediction, conf_thres, iou_thres, chosen, agnostic, multi_label, **taken)

    return suppression


def _decode_by(original: Any) -> Any:
    """`DFL.forward`, served by ours."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Logits ``[B, 4·bins, A]`` -> distances ``[B, 4, A]`` in bins."""
        if not 2 <= self.c1 <= MAX_REG_MAX + 1:
            return original(self, x)
        return DFL.forward(self, x)

    return forward


def _plan() -> Iterator[Change]:
    from ultralytics.nn.modules import block
    from ultralytics.utils import loss, tal

    if not hasattr(loss, "DFLoss"):
        raise ImportError("gfl_ops.compat.ultralytics.patch: this ultralytics has no DFLoss; 8.3 is the oldest served")
    yield from graft(loss.DFLoss, DFLoss, ["__call__"])
    yield from graft(loss.BboxLoss, BboxLoss)
    assigner = tal.TaskAlignedAssigner
    aligned = stand_in(ultralytics_forward(assigner), assigner.forward)
    yield Change("ultralytics.utils.tal.TaskAlignedAssigner", assigner, "forward", aligned)
    decode = stand_in(_decode_by(block.DFL.forward), block.DFL.forward)
    yield Change("ultralytics.nn.modules.block.DFL", block.DFL, "forward", decode)
    try:
        from ultralytics.utils import nms as holder
    except ImportError:
        # Before 8.3.200 it is among the other functions.
        from ultralytics.utils import ops as holder
    new = stand_in(_suppression_by(holder.non_max_suppression), holder.non_max_suppression)
    name = f"{holder.__name__}.non_max_suppression"
    yield Change(name, holder, "non_max_suppression", new, everywhere=True)


def _plan_of_loss() -> Iterator[Change]:
    from ultralytics.utils import loss, tal

    theirs, enlarged = loss.v8DetectionLoss, enlarges(tal.TaskAlignedAssigner)
    if enlarged is None:
        return
    # Before 8.4 the call itself computes the loss.
    method = "loss" if hasattr(theirs, "loss") else "__call__"
    new = detection_loss(theirs, method, tal.TaskAlignedAssigner, loss.BboxLoss, enlarged)
    name = "ultralytics.utils.loss.v8DetectionLoss"
    yield Change(name, theirs, method, stand_in(new, getattr(theirs, method)))


_PATCH, _LOSS = Patch(_plan), Patch(_plan_of_loss)


def patch(loss: bool = True) -> Replaced:
    """Let ultralytics call ours, from now on and for models built before.

    Args:
        loss: also the whole detection loss, as one operator (`gfl_ops.yolo_loss`). With False, and in the losses of
            masks, poses and rotated boxes, ultralytics calls our parts one after another. So it does with class
            weights, and in subclasses that define a step of the loss anew.

    Returns:
        The names of what is replaced, a list: `DFLoss`, `BboxLoss`, `TaskAlignedAssigner`, `DFL`,
        `non_max_suppression`, this one wherever it was imported to, and `v8DetectionLoss`. The assigners of rotated
        boxes, poses and masks stay ultralytics'. As a context manager (``with patch():``) it is undone at the end of
        the block. A call while all is replaced changes nothing, at the end of its block neither; with ``loss=False`` it
        gives the whole loss back. Rotated and end-to-end boxes, and export, go on to ultralytics' own code, without its
        time limit.

    Raises:
        ImportError: ultralytics is not installed, or before 8.3; nothing is replaced then.
    """
    whole = checks.flag("compat.ultralytics.patch", "loss", loss)
    parts = _PATCH.apply()
    if not whole:
        _LOSS.remove()
    added = _LOSS.apply() if whole else Replaced((), lambda: None)

    def undo() -> None:
        added.undo()
        parts.undo()

    return Replaced([*parts, *added], undo)


def unpatch() -> list[str]:
    """Give ultralytics its own back. Returns the names of what was replaced; an empty list if nothing was."""
    whole = _LOSS.remove()
    return [*_PATCH.remove(), *whole]
