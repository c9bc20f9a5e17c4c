# SPDX-License-Identifier: Apache-2.0
"""Calls of every function that `gfl_ops.compat` replaces or stands for, and the forms that their arguments come in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What each of these is as a plain number, or as a tensor of the usual dtype, is the same to every function.
Forms = dict[str, Any]


def numbers(value: float) -> Forms:
    """Forms of a number that all of them hold exactly."""
    forms: Forms = {
        "numpy.float32": np.float32(value),
        "numpy.float64": np.float64(value),
        "numpy array": np.array(value),
        "tensor": torch.tensor(value),
        "fp64 tensor": torch.tensor(value, dtype=torch.float64),
    }
    return forms | (integers(int(value)) if value == int(value) else {})


def integers(value: int) -> Forms:
    return {
        "int": value,
        "numpy.int64": np.int64(value),
        "numpy.int32": np.int32(value),
        "integer array": np.array(value),
        "integer tensor": torch.tensor(value),
    }


def dtypes(value: Tensor, *kinds: torch.dtype) -> Forms:
    return {str(kind): value.to(kind) for kind in kinds}


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Made:
    """An object of a package that need not be installed, made when it is passed: a dict, or one argument."""

    path: str
    values: Any

    def __call__(self) -> Any:
        function = find(self.path)
        return function(**self.values) if isinstance(self.values, dict) else function(self.values)


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass
class Entry:
    """One function or class.

    Attributes:
        ours: where ours is, below `gfl_ops`; None where it exists in the place of theirs only.
        theirs: where the one is that ``patch()`` replaces, or that ours is written after; None where it is not on PyPI.
        patch: the module of `gfl_ops.compat` that replaces it; None where it is imported from ours.
        call: its arguments.
        forms: other forms of single arguments. "init.x" is an argument of the constructor, "x.y" item y of a dict or
            of a `Made`.
        init: arguments of the constructor, of a class.
        method: what is called of the object, if not itself.
    """

    ours: str | None
    theirs: str | None
    patch: str | None
    call: dict[str, Any]
    forms: dict[str, Forms]
    init: dict[str, Any] | None = None
    method: str = "__call__"

    def __str__(self) -> str:
        return self.ours or f"{self.theirs}.{self.method}"


def entries() -> Iterator[Entry]:
    g = torch.Generator().manual_seed(5)
    boxes = torch.rand(9, 4, generator=g) * 20
    boxes[:, 2:] += boxes[:, :2] + 1
    scores = torch.rand(9, generator=g)
    classes = torch.arange(9) % 2
    target = boxes + 1.5
    yield from _torchvision(boxes, scores, classes, target, g)
    yield from _mmdet(boxes, target, g)
    yield from _mmdet_detection(boxes, scores, classes, g)
    yield from _ultralytics(boxes, g)
    yield from _others(boxes, scores, g)


def _torchvision(boxes: Tensor, scores: Tensor, classes: Tensor, target: Tensor, g: torch.Generator) -> Iterator[Entry]:
    where, ops = "compat.torchvision", "torchvision.ops"
    any_class = dtypes(classes, *INTEGERS, torch.bool, torch.float32, torch.float64, torch.float16)
    threshold = {"iou_threshold": numbers(0.25) | {"whole": 1, "zero": 0}}
    call = {"boxes": boxes, "scores": scores, "iou_threshold": 0.25}
    yield Entry(f"{where}.nms", f"{ops}.nms", "torchvision", call, threshold)
    call = {"boxes": boxes, "scores": scores, "idxs": classes, "iou_threshold": 0.25}
    yield Entry(f"{where}.batched_nms", f"{ops}.batched_nms", "torchvision", call, {"idxs": any_class, **threshold})
    logits, hot = torch.randn(7, 3, generator=g), (torch.rand(7, 3, generator=g) < 0.4).float()
    forms = {
        "alpha": numbers(0.25) | {"below 0": -1, "whole": 1},
        "gamma": numbers(2.0),
        "targets": dtypes(hot, torch.int64, torch.float64, torch.float16),
        "inputs": dtypes(logits, torch.float64),
    }
    call = {"inputs": logits, "targets": hot, "alpha": 0.25, "gamma": 2.0, "reduction": "sum"}
    yield Entry(f"{where}.sigmoid_focal_loss", f"{ops}.sigmoid_focal_loss", "torchvision", call, forms)
    whole = (boxes.round(), target.round())
    forms = {
        "eps": numbers(2.0**-20),
        "boxes1": dtypes(whole[0], torch.int64, torch.int32, torch.float16, torch.float64) | {"one": whole[0][:1]},
        "boxes2": dtypes(whole[1], torch.int64, torch.int32, torch.float16) | {"one": whole[1][0]},
    }
    call = {"boxes1": whole[0], "boxes2": whole[1], "eps": 2.0**-20}
    path = "generalized_box_iou_loss"
    yield Entry(f"{where}.{path}", f"{ops}.{path}", "torchvision", call, forms)


def _mmdet(boxes: Tensor, target: Tensor, g: torch.Generator) -> Iterator[Entry]:
    losses = "mmdet.models.losses"
    logits, labels = torch.randn(9, 3, generator=g), torch.arange(9) % 4
    quality, weight = torch.rand(9, generator=g), (torch.rand(9, generator=g) < 0.7).float()
    weights = {"weight": dtypes(weight, torch.int64, torch.bool, torch.float64, torch.float16)}
    average = {"avg_factor": numbers(4.0) | {"tensor of one": torch.tensor([4.0])}}
    factor = {"init.loss_weight": numbers(0.5)}
    usual = {"weight": weight, "avg_factor": 4.0}

    def loss(name: str, pred: Tensor, goal: Any, forms: dict[str, Forms], init: Any, calls: str = "target") -> Entry:
        call = {"pred": pred, calls: goal, **usual}
        return Entry(
            f"losses.{name}", f"{losses}.{name}", "mmdet", call, {**weights, **average, **factor, **forms}, init
        )

    one = {"loss_weight": 1.0}
    pairs = {"target": {"list": [labels, quality], "int32": (labels.int(), quality)}, "init.beta": numbers(2.0)}
    yield loss("QualityFocalLoss", logits, (labels, quality), pairs, {"beta": 2.0, **one})
    positions = torch.rand(9, generator=g) * 6
    whole = dtypes(positions.floor(), torch.int64, torch.float64)
    yield loss("DistributionFocalLoss", torch.randn(9, 8, generator=g), positions.floor(), {"target": whole}, dict(one))
    numbers_of = {"init.gamma": numbers(2.0), "init.alpha": numbers(0.25)}
    yield loss("FocalLoss", logits, labels, {**numbers_of}, {"gamma": 2.0, "alpha": 0.25, **one})
    soft = torch.rand(9, 3, generator=g) * (torch.rand(9, 3, generator=g) < 0.5)
    entry = loss("VarifocalLoss", logits, soft, {**numbers_of}, {"gamma": 2.0, "alpha": 0.25, **one})
    entry.call["weight"], entry.forms["weight"] = None, {}
    yield entry
    students = torch.randn(9, 5, generator=g)
    teacher = torch.randn(9, 5, generator=g)
    temperature = {"init.T": numbers(2.0), "soft_label": dtypes(teacher, torch.float64)}
    yield loss("KnowledgeDistillationKLDivLoss", students, teacher, temperature, {"T": 2, **one}, "soft_label")
    fours = dtypes(weight[:, None].expand(9, 4), torch.float32)
    for name in ("GIoULoss", "DIoULoss", "CIoULoss", "EIoULoss", "SIoULoss", "IoULoss"):
        own = {"init.eps": numbers(2.0**-20), "target": dtypes(target.round(), torch.float64)}
        entry = loss(name, boxes, target.round(), own, {"eps": 2.0**-20, **one})
        entry.forms["weight"] = entry.forms["weight"] | {"by coordinate": fours["torch.float32"]}
        yield entry
    distributions = torch.randn(6, 4 * 8, generator=g)
    forms = {"init.reg_max": integers(7), "x": dtypes(distributions, torch.float64) | {"3d": distributions[None]}}
    path = "mmdet.models.dense_heads.gfl_head.Integral"
    yield Entry("losses.Integral", path, "mmdet", {"x": distributions}, forms, {"reg_max": 7})


def _mmdet_detection(boxes: Tensor, scores: Tensor, classes: Tensor, g: torch.Generator) -> Iterator[Entry]:
    config, instances = "mmengine.config.ConfigDict", "mmengine.structures.InstanceData"
    suppression = {"type": "nms", "iou_threshold": 0.25, "score_threshold": 0.125, "max_num": 4}
    forms = {
        "boxes": dtypes(boxes, torch.float64),
        "scores": dtypes(scores, torch.float64),
        "idxs": dtypes(classes, *INTEGERS, torch.bool, torch.float32, torch.float64, torch.float16),
        "nms_cfg": {"none": None, "other name": {"type": "nms", "iou_thr": 0.25}, "config": Made(config, suppression)},
        "nms_cfg.iou_threshold": numbers(0.25) | {"whole": 1, "zero": 0},
        "nms_cfg.score_threshold": numbers(0.125) | {"zero": 0},
        "nms_cfg.max_num": integers(4) | {"none": -1},
        "nms_cfg.offset": integers(1),
        "nms_cfg.class_agnostic": {"bool": True, "numpy": np.bool_(True)},
        "class_agnostic": {"bool": True, "int": 1, "numpy": np.bool_(True), "tensor": torch.tensor(True)},
    }
    call = {"boxes": boxes, "scores": scores, "idxs": classes, "nms_cfg": suppression, "class_agnostic": False}
    yield Entry(None, "mmcv.ops.batched_nms", "mmdet", call, forms)

    sizes = ((6, 8), (3, 4), (2, 2))
    cells = [(x * s, y * s, s) for (h, w), s in zip(sizes, (8, 16, 32)) for y in range(h) for x in range(w)]
    x, y, side = torch.tensor(cells, dtype=torch.float32).unbind(1)
    priors = torch.stack([x - 4 * side, y - 4 * side, x + 4 * side, y + 4 * side], 1)
    truth = {"bboxes": boxes[:4] * 2, "labels": torch.tensor([2, 0, 1, 2])}
    aside = {"bboxes": boxes[4:5] * 2, "labels": torch.tensor([0])}
    counts = [h * w for h, w in sizes]
    forms = {
        "pred_instances.priors": {"with another column": torch.cat([priors, side[:, None]], 1)}
        | dtypes(priors, torch.float64, torch.float16),
        "num_level_priors": {"tuple": tuple(counts), "array": np.array(counts), "tensor": torch.tensor(counts)},
        "gt_instances.bboxes": {
            "none": torch.zeros(0, 4),
            "box type": Made("mmdet.structures.bbox.HorizontalBoxes", truth["bboxes"]),
        }
        | dtypes(truth["bboxes"], torch.float64),
        "gt_instances.labels": dtypes(truth["labels"], *INTEGERS, torch.float32),
        "gt_instances_ignore": {"some": Made(instances, aside), "none": Made(instances, {"bboxes": boxes[:0]})},
        "init.topk": integers(9),
        "init.ignore_iof_thr": numbers(0.5) | {"zero": 0},
    }
    call = {
        "pred_instances": Made(instances, {"priors": priors}),
        "num_level_priors": counts,
        "gt_instances": Made(instances, truth),
        "gt_instances_ignore": None,
    }
    path, init = "mmdet.models.task_modules.assigners.ATSSAssigner", {"topk": 9, "ignore_iof_thr": -1}
    yield Entry(None, path, "mmdet", call, forms, init, "assign")

    maps = [[torch.randn(2, c, *size, generator=g) for size in sizes] for c in (3, 20)]
    image = {"img_shape": (44, 60), "scale_factor": (0.5, 0.25)}
    test = {
        "nms_pre": 20, "min_bbox_size": 0, "score_thr": 0.25, "max_per_img": 7,
        "nms": {"type": "nms", "iou_threshold": 0.5},
    }  # fmt: skip
    anchors = {"type": "AnchorGenerator", "ratios": [1.0], "octave_base_scale": 8, "scales_per_octave": 1}
    init = {
        "num_classes": 3, "in_channels": 1, "stacked_convs": 0, "reg_max": 4, "test_cfg": Made(config, test),
        "anchor_generator": {**anchors, "strides": [8, 16, 32]},
        "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "beta": 2.0, "loss_weight": 1.0},
    }  # fmt: skip
    call = {
        "cls_scores": maps[0], "bbox_preds": maps[1], "score_factors": None, "batch_img_metas": [image, image],
        "cfg": Made(config, test), "rescale": True, "with_nms": True,
    }  # fmt: skip
    shapes = {
        "list": [44, 60], "with channels": (44, 60, 3), "size": torch.Size((44, 60)), "array": np.array([44, 60]),
        "tensor": torch.tensor([44, 60]), "floats": (44.0, 60.0),
    }  # fmt: skip
    factors = {"array": np.array([0.5, 0.25], np.float32), "list": [0.5, 0.25], "of v2": (0.5, 0.25, 0.5, 0.25)}
    forms = {
        "cls_scores": {"tuple": tuple(maps[0])},
        "bbox_preds": {"tuple": tuple(maps[1]), "fp64": [m.double() for m in maps[1]]},
        "score_factors": {"some": [torch.rand(2, 1, *size, generator=g) for size in sizes]},
        "batch_img_metas": {f"img_shape {k}": [{**image, "img_shape": v}] * 2 for k, v in shapes.items()}
        | {f"scale_factor {k}": [{**image, "scale_factor": v}] * 2 for k, v in factors.items()}
        | {"tuple": (image, image)},
        "cfg": {"none": None, "other name": Made(config, {**test, "nms": {"iou_thr": 0.5}})},
        "cfg.score_thr": numbers(0.25) | {"zero": 0},
        "cfg.nms_pre": integers(20) | {"all": -1},
        "cfg.max_per_img": integers(7),
        "cfg.min_bbox_size": {"some": 6, "negative": -1, "numpy": np.int64(6)},
        "cfg.nms": {"threshold of numpy": {"type": "nms", "iou_threshold": np.float32(0.5)}},
        "rescale": {"bool": False, "int": 1, "numpy": np.bool_(True)},
        "with_nms": {"int": 1, "bool": False},
    }
    yield Entry(None, "mmdet.models.dense_heads.GFLHead", "mmdet", call, forms, init, "predict_by_feat")


def _ultralytics(boxes: Tensor, g: torch.Generator) -> Iterator[Entry]:
    where = "compat.ultralytics"
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    head = torch.cat([centre, size, torch.rand(9, 4, generator=g)], 1).t()[None].contiguous()
    wanted = {"tuple": (0, 2, 3), "array": np.array([0, 2, 3]), "tensor": torch.tensor([0, 2, 3])}
    forms = {
        "conf_thres": numbers(0.25) | {"zero": 0},
        "iou_thres": numbers(0.5) | {"whole": 1},
        "classes": wanted,
        "max_det": integers(5),
        "max_nms": integers(20),
        "agnostic": {"int": 0, "numpy": np.bool_(False)},
        "multi_label": {"int": 1, "numpy": np.bool_(True)},
        "prediction": {"list": [head, None], "tuple": (head, None)} | dtypes(head, torch.float64),
    }
    call = {
        "prediction": head, "conf_thres": 0.25, "iou_thres": 0.5, "classes": [0, 2, 3], "agnostic": False,
        "multi_label": True, "max_det": 5, "max_nms": 20,
    }  # fmt: skip
    path = "ultralytics.utils.nms.non_max_suppression"
    yield Entry(f"{where}.non_max_suppression", path, "ultralytics", call, forms)
    pred, target = torch.randn(36, 8, generator=g), torch.rand(9, 4, generator=g) * 6
    call, loss = {"pred_dist": pred, "target": target}, "ultralytics.utils.loss"
    forms = {
        "init.reg_max": integers(8),
        "target": dtypes(target, torch.float64),
        "pred_dist": dtypes(pred, torch.float64),
    }
    yield Entry(f"{where}.DFLoss", f"{loss}.DFLoss", "ultralytics", call, forms, {"reg_max": 8})
    maps = torch.randn(2, 32, 5, generator=g)
    path = "ultralytics.nn.modules.block.DFL"
    yield Entry(f"{where}.DFL", path, "ultralytics", {"x": maps}, {"init.c1": integers(8)}, {"c1": 8})
    points = centre / 4
    call = {
        "pred_dist": torch.randn(2, 9, 32, generator=g), "pred_bboxes": (boxes / 4).expand(2, 9, 4),
        "anchor_points": points, "target_bboxes": (boxes / 4 + 0.3).expand(2, 9, 4),
        "target_scores": torch.rand(2, 9, 3, generator=g), "target_scores_sum": torch.tensor(4.0),
        "fg_mask": torch.rand(2, 9, generator=g) < 0.6, "imgsz": torch.tensor([64, 64]),
        "stride": torch.full((9, 1), 4.0),
    }  # fmt: skip
    forms = {"target_scores_sum": numbers(4.0)}
    yield Entry(f"{where}.BboxLoss", f"{loss}.BboxLoss", "ultralytics", call, forms, {"reg_max": 8})


def _others(boxes: Tensor, scores: Tensor, g: torch.Generator) -> Iterator[Entry]:
    per_class = torch.rand(9, 4, generator=g)
    call = {
        "multi_bboxes": boxes,
        "multi_scores": per_class,
        "score_thr": 0.25,
        "nms_cfg": {"iou_threshold": 0.5},
        "max_num": 6,
    }
    forms = {"score_thr": numbers(0.25), "nms_cfg.iou_threshold": numbers(0.5), "max_num": integers(6)}
    yield Entry("compat.nanodet.multiclass_nms", None, None, call, forms)
    yield Entry(
        "compat.nanodet.Integral",
        None,
        None,
        {"x": torch.randn(5, 32, generator=g)},
        {"init.reg_max": integers(7)},
        {"reg_max": 7},
    )
    logits, labels = torch.randn(9, 3, generator=g), torch.arange(9) % 4
    call = {"pred": logits, "label": labels, "score": scores, "weight": None, "beta": 2.0, "avg_factor": 4.0}
    forms = {"beta": numbers(2.0), "avg_factor": numbers(4.0), "label": dtypes(labels, *INTEGERS)}
    yield Entry("compat.gfocal_v1.quality_focal_loss", None, None, call, forms)
    p, hot = logits.sigmoid(), (torch.rand(9, 3, generator=g) < 0.4).float()
    call = {"pred_score": p, "gt_score": hot * 0.5, "label": hot, "alpha": 0.75, "gamma": 2.0}
    forms = {"alpha": numbers(0.75), "gamma": numbers(2.0), "label": dtypes(hot, torch.int64)}
    yield Entry("compat.yolov6.VarifocalLoss", "yolov6.models.losses.loss.VarifocalLoss", None, call, forms, {})
    near = (boxes + torch.rand(9, 4, generator=g)).expand(2, 9, 4)
    call = {
        "pred_dist": torch.randn(2, 9, 32, generator=g), "pred_bboxes": near.contiguous(),
        "anchor_points": (boxes[:, :2] + boxes[:, 2:]) / 2, "target_bboxes": boxes.expand(2, 9, 4),
        "target_scores": torch.rand(2, 9, 3, generator=g), "target_scores_sum": torch.tensor(4.0),
        "fg_mask": torch.rand(2, 9, generator=g) < 0.6,
    }  # fmt: skip
    forms = {
        "target_scores_sum": numbers(4.0) | {"zero": 0, "tensor of one": torch.tensor([4.0])},
        "anchor_points": dtypes(call["anchor_points"], torch.float64),
        "target_bboxes": dtypes(call["target_bboxes"], torch.float64),
        "target_scores": dtypes(call["target_scores"], torch.float64, torch.float16),
        "fg_mask": {"none": torch.zeros(2, 9, dtype=torch.bool), "uint8": call["fg_mask"].to(torch.uint8)},
        "init.num_classes": integers(3),
        "init.reg_max": integers(7),
        "init.use_dfl": {"bool": False, "int": 1, "numpy": np.bool_(True)},
        "init.iou_type": {"diou": "diou"},
    }
    init = {"num_classes": 3, "reg_max": 7, "use_dfl": True, "iou_type": "giou"}
    yield Entry("compat.yolov6.BboxLoss", "yolov6.models.losses.loss.BboxLoss", None, call, forms, init)
    up = torch.tensor([0.5])
    scale = numbers(4.0) | {"tensor of one": torch.tensor([4.0]), "negative": -4.0}
    curve = {"reg_max": integers(8), "reg_scale": scale, "up": dtypes(up, torch.float64) | {"negative": -up}}
    call = {"reg_max": 8, "up": up, "reg_scale": 4.0, "deploy": False}
    deploy = {"bool": True, "int": 1, "numpy": np.bool_(True)}
    yield Entry("compat.dfine.weighting_function", None, None, call, {**curve, "deploy": deploy})
    offsets = torch.randn(9, 4, generator=g) * 2
    call = {"gt": offsets, "reg_max": 8, "reg_scale": 4.0, "up": up}
    forms = {"gt": dtypes(offsets, torch.float64) | {"whole": offsets.long(), "none": offsets[:0]}, **curve}
    yield Entry("compat.dfine.translate_gt", None, None, call, forms)
    size = boxes[:, 2:] - boxes[:, :2]
    references = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, size], 1)
    call = {"points": references, "bbox": boxes + 0.5, "reg_max": 8, "reg_scale": 4.0, "up": up, "eps": 0.125}
    forms = {"points": dtypes(references, torch.float64), "bbox": dtypes(boxes, torch.float64), "eps": numbers(0.125)}
    yield Entry("compat.dfine.bbox2distance", None, None, call, forms | curve)
    call = {"points": references, "distance": offsets, "reg_scale": 4.0}
    forms = {"points": dtypes(references, torch.float64) | {"one": references[0]}, "reg_scale": scale}
    yield Entry("compat.dfine.distance2bbox", None, None, call, forms)
    pred = torch.randn(9, 9, generator=g)
    call = {
        "pred": pred,
        "label": torch.arange(9.0) * 0.8,
        "weight_right": scores,
        "weight_left": 1 - scores,
        "avg_factor": 4.0,
    }
    yield Entry("compat.dfine.unimodal_distribution_focal_loss", None, None, call, {"avg_factor": numbers(4.0)})
    call = {"pred": pred, "teacher": pred.flip(0), "weight": scores, "matched": scores > 0.5, "temperature": 2.0}
    yield Entry("compat.dfine.decoupled_distillation_loss", None, None, call, {"temperature": numbers(2.0)})
