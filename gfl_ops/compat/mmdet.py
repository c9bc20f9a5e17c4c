# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="import-not-found,import-untyped"
"""mmdet 3 with our losses, decoding, assignment and suppression inside; configs and checkpoints stay as they are.

``patch()`` exchanges the methods of mmdet's own classes, so that objects built before it, subclasses of other packages
(mmyolo) and names in configs are served too, and ``unpatch()`` puts the old ones back. A config can also ask for it:
``custom_imports = dict(imports=["gfl_ops.compat.mmdet_patch"])``. Single classes under names of their own are in
`gfl_ops.compat.mmdet_registry`.

What is not ours to serve (soft-NMS, rotated boxes, priors that are no grid, DDOD's cost) goes on to mmdet's own code.

Differences, beside those of the modules in `gfl_ops.losses`: losses and `Integral` are fp32 for fp16 and bf16 input and
under autocast; NMS compares classes and takes no boxes at all; ATSS breaks ties of distance by the lower index.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses
from ..functional import atss_assign, nms, postprocess
from ..functional import batched_nms as classwise_nms
from ..ops.bins.integral import MAX_REG_MAX
from ..ops.head.atss import centres
from ..ops.select.postprocess import MAX_LEVELS
from ._dynamic_k import NO_OVERLAP, batch_soft_label_forward, plain_iou, simota_by, soft_label_assign
from ._patch import Change, Patch, Replaced, graft, stand_in
from ._task_aligned import mmdet_assign, mmyolo_forward

__all__ = ["patch", "unpatch"]

_LOSSES = (
    "QualityFocalLoss",
    "DistributionFocalLoss",
    "FocalLoss",
    "VarifocalLoss",
    "KnowledgeDistillationKLDivLoss",
)
_BOX_LOSSES = ("GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss")


def batched_nms_by(original: Any) -> Any:
    """mmcv's `batched_nms`, served by ours where it is plain NMS of boxes, else by `original`."""

    def batched_nms(
        boxes: Tensor, scores: Tensor, idxs: Tensor, nms_cfg: dict[str, Any] | None, class_agnostic: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``(boxes with scores [K, 5], indices [K])`` of the boxes that stay, the best first; mmcv's call."""
        config = dict(nms_cfg or {})
        threshold = config.pop("iou_threshold", config.pop("iou_thr", None))
        plain = config.pop("type", "nms") == "nms" and threshold is not None
        agnostic = config.pop("class_agnostic", class_agnostic)
        offset, least, most = config.pop("offset", 0), config.pop("score_threshold", 0), config.pop("max_num", -1)
        config.pop("split_thr", None)
        if not plain or config or boxes.dim() != 2 or boxes.shape[1] != 4 or offset not in (0, 1):
            return original(boxes, scores, idxs, nms_cfg, class_agnostic)

        chosen = (scores > least).nonzero()[:, 0] if least > 0 else None
        if chosen is not None:
            found, rank = boxes[chosen], scores[chosen]
        else:
            found, rank = boxes, scores
        if agnostic:
            keep = nms(found, rank, float(threshold), legacy=offset == 1)
        else:
            classes = idxs if chosen is None else idxs[chosen]
            keep = classwise_nms(found, rank, classes, float(threshold), legacy=offset == 1)
        keep = keep if chosen is None else chosen[keep]
        keep = keep[:most] if most > 0 else keep
        return torch.cat([boxes[keep], scores[keep, None]], -1), keep

    return batched_nms


class Grid(NamedTuple):
    """Square priors of one size a level, one a cell, row by row: what `atss_assign` makes for itself."""

    sizes: list[tuple[int, int]]
    strides: list[float]
    offsets: list[float]
    scale: float


def grid_of(priors: Tensor, counts: list[int]) -> Grid | None:
    """The grid that `priors` ``[A, 4]`` are, `counts` of them a level; None if they are none. Waits for the device."""
    filled = [level for level, count in enumerate(counts) if count]
    starts = [sum(counts[:level]) for level in filled]
    ends = [start + counts[level] - 1 for start, level in zip(starts, filled)]
    seconds = [min(start + 1, end) for start, end in zip(starts, ends)]
    if not filled or sum(counts) != len(priors):
        return None
    rows = priors[torch.tensor([starts, seconds, ends], device=priors.device)].tolist()
    centre = [[((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in row] for row in rows]
    sides = [x1 - x0 for x0, _, x1, _ in rows[0]]
    steps = [max(b[0] - a[0], b[1] - a[1]) for a, b in zip(centre[0], centre[1])]
    scale = next((side / step for side, step in zip(sides, steps) if step > 0), 8.0)
    if scale <= 0 or min(sides) <= 0:
        return None

    # A level without priors has no stride; any will do.
    sizes, strides, offsets = [(0, 0)] * len(counts), [1.0] * len(counts), [0.0] * len(counts)
    for i, level in enumerate(filled):
        stride = steps[i] if steps[i] > 0 else sides[i] / scale
        (first_x, first_y), (last_x, last_y) = centre[0][i], centre[2][i]
        sizes[level] = round((last_y - first_y) / stride) + 1, round((last_x - first_x) / stride) + 1
        strides[level], offsets[level] = stride, first_x / stride
        if sizes[level][0] * sizes[level][1] != counts[level]:
            return None
    made = []
    for (height, width), stride, offset in zip(sizes, strides, offsets):
        points = centres(height, width, stride, offset, False, priors.device)
        made.append(torch.cat([points - scale * stride / 2, points + scale * stride / 2], -1))
    return Grid(sizes, strides, offsets, scale) if torch.equal(torch.cat(made), priors) else None


def assign_by(original: Any) -> Any:
    """ATSSAssigner's `assign`, served by ours for fp32 priors that form a grid, else by `original`."""

    def assign(
        self: Any, pred_instances: Any, num_level_priors: Any, gt_instances: Any, gt_instances_ignore: Any = None
    ) -> Any:
        """mmdet's call and its AssignResult: 1-based box of each prior, 0 for none."""
        from mmdet.models.task_modules.assigners import AssignResult

        priors, boxes, labels = pred_instances.priors, gt_instances.bboxes, gt_instances.labels
        ignoring = self.ignore_iof_thr > 0 and gt_instances_ignore is not None and len(gt_instances_ignore)
        ours = (
            self.alpha is None
            and not ignoring
            and not {"scores", "bboxes"} & set(pred_instances.keys())
            and plain_iou(self, priors, boxes)
        )
        grid = grid_of(priors[:, :4], list(num_level_priors)) if ours else None
        if grid is None:
            return original(self, pred_instances, num_level_priors, gt_instances, gt_instances_ignore)
        slots = torch.zeros(1, len(boxes), dtype=torch.int64, device=boxes.device)
        found = atss_assign(
            grid.sizes,
            grid.strides,
            boxes[None],
            slots,
            topk=self.topk,
            anchor_scale=grid.scale,
            center_offset=grid.offsets,
        )
        matched, overlap = found.matched[0], found.iou[0]
        positive = matched >= 0
        return AssignResult(
            len(boxes),
            matched + 1,
            torch.where(positive, overlap, NO_OVERLAP),
            labels=torch.where(positive, labels[matched.clamp(min=0)].long(), -1),
        )

    return assign


# Their assigners by name, and what makes our method of theirs: `assign` of mmdet's, `forward` of mmyolo's.
ASSIGNERS: dict[str, Callable[[Any], Any]] = {
    "ATSSAssigner": assign_by,
    "TaskAlignedAssigner": mmdet_assign,
    "DynamicSoftLabelAssigner": soft_label_assign,
    "SimOTAAssigner": simota_by,
}
BATCH_ASSIGNERS: dict[str, Callable[[Any], Any]] = {
    "BatchDynamicSoftLabelAssigner": batch_soft_label_forward,
    "BatchTaskAlignedAssigner": mmyolo_forward,
}


def _test_options(head: Any, config: Any, levels: int) -> dict[str, Any] | None:
    """`postprocess`'s options for a head and its test config; None if it can't serve them."""
    from mmdet.models.task_modules.prior_generators import AnchorGenerator

    generator, suppression = head.prior_generator, dict(config.get("nms") or {})
    threshold = suppression.pop("iou_threshold", suppression.pop("iou_thr", None))
    suppression.pop("split_thr", None)
    if suppression.pop("type", "nms") != "nms" or threshold is None or suppression:
        return None
    strides = [float(s[0]) for s in generator.strides]
    served = (
        type(generator) is AnchorGenerator
        and not generator.use_box_type
        and generator.centers is None
        and generator.num_base_priors == [1] * len(strides)
        and all(s[0] == s[1] == base for s, base in zip(generator.strides, generator.base_sizes))
        and head.use_sigmoid_cls
        and head.reg_max <= MAX_REG_MAX
        and levels == len(strides) <= MAX_LEVELS
        and config.get("min_bbox_size", -1) == 0
        and config.get("max_per_img", -1) > 0
    )
    if not served:
        return None
    return {
        "strides": strides,
        "center_offset": float(generator.center_offset),
        "reg_max": head.reg_max,
        "score_threshold": float(config.score_thr),
        "nms_pre": int(config.get("nms_pre", -1)),
        "iou_threshold": float(threshold),
        "max_detections": int(config.max_per_img),
    }


def predict_by(original: Any, single: Any) -> Any:
    """GFLHead's `predict_by_feat`, the whole batch at once by ours, or by `original` what that can't serve.

    `single` is GFLHead's method for one image: a subclass that has another goes its own way.
    """

    def predict_by_feat(
        self: Any,
        cls_scores: list[Tensor],
        bbox_preds: list[Tensor],
        score_factors: list[Tensor] | None = None,
        batch_img_metas: list[dict[str, Any]] | None = None,
        cfg: Any = None,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> list[Any]:
        """mmdet's call: one InstanceData an image with `bboxes`, `scores` and `labels`, the best first."""
        from mmengine.structures import InstanceData

        config = self.test_cfg if cfg is None else cfg
        own = type(self)._predict_by_feat_single is single and score_factors is None and with_nms
        options = _test_options(self, config, len(cls_scores)) if own and batch_img_metas else None
        if options is None:
            return original(self, cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms)
        metas = batch_img_metas or []
        sizes = torch.tensor([[float(x) for x in meta["img_shape"][:2]] for meta in metas])
        factors = None
        if rescale:
            factors = torch.tensor([[float(x) for x in meta["scale_factor"][:2]] for meta in metas])
        found = postprocess(cls_scores, bbox_preds, image_sizes=sizes, scale_factors=factors, **options)
        results = []
        for image, count in enumerate(found.count.tolist()):
            results.append(
                InstanceData(
                    bboxes=found.boxes[image, :count],
                    scores=found.scores[image, :count],
                    labels=found.labels[image, :count],
                )
            )
        return results

    return predict_by_feat


def _plan() -> Iterator[Change]:
    import mmcv.ops
    from mmdet.models import losses as their_losses
    from mmdet.models.dense_heads import gfl_head
    from mmdet.models.task_modules import assigners

    for name in (*_LOSSES, *_BOX_LOSSES, "IoULoss"):
        needed = ["forward", "_loss"]
        needed += ["_pairs", "_kind", "_options"] if name in _BOX_LOSSES else []
        needed += ["_pairs", "_AREA_EPS"] if name == "IoULoss" else []
        yield from graft(getattr(their_losses, name), getattr(losses, name), needed)
    yield from graft(gfl_head.Integral, losses.Integral)
    original = mmcv.ops.batched_nms
    suppression = stand_in(batched_nms_by(original), original)
    yield Change("mmcv.ops.batched_nms", mmcv.ops, "batched_nms", suppression, everywhere=True)
    for name, by in ASSIGNERS.items():
        yield _method(getattr(assigners, name), "assign", by)
    head = gfl_head.GFLHead
    predict = stand_in(predict_by(head.predict_by_feat, head._predict_by_feat_single), head.predict_by_feat)
    yield Change("mmdet.models.dense_heads.gfl_head.GFLHead.predict_by_feat", head, "predict_by_feat", predict)
    if batch := mmyolo_assigners():
        for name, by in BATCH_ASSIGNERS.items():
            yield _method(getattr(batch, name), "forward", by)


def _method(theirs: Any, name: str, by: Callable[[Any], Any]) -> Change:
    """The method `name` of their class, by ours, which falls back on it."""
    original = getattr(theirs, name)
    return Change(f"{theirs.__module__}.{theirs.__qualname__}", theirs, name, stand_in(by(original), original))


def mmyolo_assigners() -> Any:
    """mmyolo's module of assigners; None without mmyolo, and where it refuses the installed mmcv."""
    if importlib.util.find_spec("mmyolo") is None:
        return None
    try:
        from mmyolo.models.task_modules import assigners
    except (AssertionError, ImportError):
        return None
    return assigners


_PATCH = Patch(_plan)


def patch() -> Replaced:
    """Let mmdet and mmcv call ours, from now on and for objects built before.

    Returns:
        The names of what is replaced, a list: the losses `QualityFocalLoss`, `DistributionFocalLoss`, `FocalLoss`,
        `VarifocalLoss`, `KnowledgeDistillationKLDivLoss`, `GIoULoss`, `DIoULoss`, `CIoULoss`, `EIoULoss`, `SIoULoss`
        and `IoULoss`, `Integral`, mmcv's `batched_nms` wherever it was imported to, `ATSSAssigner`, TOOD's
        `TaskAlignedAssigner`, RTMDet's `DynamicSoftLabelAssigner`, YOLOX's `SimOTAAssigner`, GFLHead's prediction and,
        where mmyolo is installed, its `BatchDynamicSoftLabelAssigner` and `BatchTaskAlignedAssigner`. As a context
        manager (``with patch():``) it is undone at the end of the block. A call while all is replaced
        changes nothing, at the end of its block neither.

    Raises:
        ImportError: mmdet or mmcv is not installed; nothing is replaced then.
    """
    return _PATCH.apply()


def unpatch() -> list[str]:
    """Give mmdet and mmcv their own back. Returns the names of what was replaced; an empty list if nothing was."""
    return _PATCH.remove()
