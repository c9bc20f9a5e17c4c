# SPDX-License-Identifier: Apache-2.0
"""A valid call of every public function, and what a program may put in the place of any of its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = dict[str, Any]


def valid_calls(seed: int) -> dict[str, Call]:
    """One small call of each function, every argument named."""
    g = torch.Generator().manual_seed(seed)
    normal, uniform = (lambda *s: torch.randn(s, generator=g)), (lambda *s: torch.rand(s, generator=g))
    boxes = torch.cat([corner := uniform(6, 2) * 20, corner + 2 + uniform(6, 2) * 20], 1)
    near, scores = boxes + uniform(6, 4), uniform(6)
    labels = torch.tensor([0, 1, 2, 3, -1, 1])
    maps, bins = [normal(2, 3, 3, 4), normal(2, 3, 2, 2)], [normal(2, 20, 3, 4), normal(2, 20, 2, 2)]
    matched = torch.tensor([[-1, 0, 1, -1] * 4, [1, -1, -1, 0] * 4])
    assigned = torch.where(matched >= 0, matched, -1)
    truth = torch.stack([boxes[:2], boxes[2:4]])
    reduced: Call = {"reduction": "mean", "avg_factor": 3.0}
    sparse: Call = {
        "pred": normal(6, 3),
        "target": (labels, scores),
        "weight": uniform(6),
        **reduced,
        "activated": False,
    }
    rows: Call = {
        "pred": normal(6, 5),
        "target": uniform(6) * 4,
        "weight": uniform(6),
        **reduced,
        "out_of_range": "clamp",
    }
    pairs: Call = {"pred": boxes, "target": near, "weight": uniform(6), "eps": 1e-6, **reduced}
    found: Call = {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}
    objects: Call = {
        "boxes": uniform(2, 16, 4) * 20 + torch.tensor([-10.0, -10, 10, 10]),
        "level_sizes": [(3, 4), (2, 2)],
        "strides": [8.0, 16.0],
        "gt_boxes": truth,
        "gt_labels": labels[:4].view(2, 2),
        "center_offset": 0.5,
    }
    return {
        "quality_focal_loss": {**sparse, "beta": 2.0},
        "matchability_aware_loss": {**sparse, "gamma": 1.5},
        "soft_target_bce": sparse,
        "varifocal_loss": {
            "pred": normal(6, 3),
            "target": uniform(6, 3),
            "weight": uniform(6),
            "alpha": 0.75,
            "gamma": 2.0,
            "iou_weighted": True,
            **reduced,
            "activated": False,
        },
        "sigmoid_focal_loss": {
            "inputs": normal(6, 3),
            "targets": (uniform(6, 3) < 0.4).float(),
            "alpha": 0.25,
            "gamma": 2.0,
            "reduction": "sum",
        },
        "distribution_focal_loss": rows,
        "dfl_integral": rows,
        "distillation_loss": {
            "pred": normal(6, 5),
            "teacher": normal(6, 5),
            "weight": uniform(6),
            "temperature": 2.0,
            **reduced,
        },
        "integral": {"pred": normal(6, 20), "reg_max": 4},
        "decode": {
            "pred": normal(6, 20),
            "points": uniform(6, 2) * 20,
            "stride": 8.0,
            "reg_max": 4,
            "max_shape": (30.0, 40.0),
        },
        "distance_to_box": {"points": uniform(6, 2) * 20, "distance": uniform(6, 4) * 9, "max_shape": (20.0, 15.0)},
        "box_to_distance": {"points": uniform(6, 2) * 20, "boxes": boxes, "max_distance": 7.0, "eps": 0.1},
        "box_iou_loss": {**pairs, "kind": "siou", "smooth_point": 0.1, "neg_gamma": False},
        "giou_loss": pairs,
        "nms": {**found, "legacy": False},
        "batched_nms": {**found, "idxs": labels, "legacy": False},
        "soft_nms": {**found, "idxs": labels, "sigma": 0.5, "min_score": 0.1, "method": "linear"},
        "multiclass_nms": {
            "boxes": boxes,
            "scores": uniform(6, 3),
            "score_threshold": 0.3,
            "iou_threshold": 0.5,
            "max_detections": 4,
        },
        "postprocess": {
            "cls_scores": maps,
            "reg_preds": bins,
            "strides": [8.0, 16.0],
            "image_sizes": torch.tensor([[24.0, 32.0]] * 2),
            "reg_max": 4,
            "score_threshold": 0.05,
            "nms_pre": 9,
            "iou_threshold": 0.6,
            "max_detections": 5,
            "center_offset": 0.5,
            "topk_mode": "pair",
            "activated": False,
            "legacy": False,
        },
        "atss_assign": {
            "level_sizes": [(3, 4), (2, 2)],
            "strides": [8.0, 16.0],
            "gt_boxes": truth,
            "gt_labels": labels[:4].view(2, 2),
            "valid_sizes": torch.tensor([[24.0, 32.0]] * 2),
            "topk": 3,
            "anchor_scale": 8.0,
            "center_offset": 0.5,
            "legacy": False,
        },
        "task_aligned_assign": {
            "scores": uniform(2, 16, 3),
            **objects,
            "topk": 3,
            "topk2": 2,
            "alpha": 0.5,
            "beta": 6.0,
            "min_side": 16.0,
            "eps": 1e-9,
            "variant": "ultralytics",
            "overlap": "ciou",
        },
        "dynamic_soft_label_assign": {
            "logits": uniform(2, 16, 3) * 8 - 6,
            **objects,
            "topk": 5,
            "iou_weight": 3.0,
            "soft_center_radius": 3.0,
            "variant": "mmdet",
        },
        "simota_assign": {
            "scores": uniform(2, 16, 3),
            **objects,
            "center_radius": 2.5,
            "candidate_topk": 5,
            "iou_weight": 3.0,
            "cls_weight": 1.0,
        },
        "gfl_loss": {
            "cls_scores": maps,
            "reg_preds": bins,
            "strides": [8.0, 16.0],
            "assignment": (assigned, matched),
            "gt_boxes": truth,
            "reg_max": 4,
            "loss_weights": (1.0, 2.0, 0.25),
            "beta": 2.0,
            "cls_norm": 3.0,
            "box_norm": 2.0,
            "center_offset": 0.5,
            "legacy": False,
        },
        "yolo_loss": {
            "reg_preds": bins,
            "cls_scores": maps,
            "strides": [8.0, 16.0],
            "gt_boxes": truth,
            "gt_labels": labels[:4].view(2, 2),
            "bins": 5,
            "topk": 3,
            "topk2": 2,
            "alpha": 0.5,
            "beta": 6.0,
            "gains": (7.5, 0.5, 1.5),
            "min_side": 16.0,
        },
        "rtmdet_loss": {
            "cls_scores": maps,
            "reg_preds": [m[:, :4].abs() * 8 for m in bins],
            "strides": [8.0, 16.0],
            "gt_boxes": truth,
            "gt_labels": labels[:4].view(2, 2),
            "topk": 3,
            "iou_weight": 3.0,
            "soft_center_radius": 3.0,
            "center_offset": 0.5,
            "beta": 2.0,
            "loss_weights": (1.0, 2.0),
            "variant": "mmdet",
        },
        "head_loss_norms": {"cls_scores": maps, "assignment": (assigned, matched)},
        "group_norm_relu": {
            "inputs": [normal(2, 6, 3, 4), normal(2, 6, 2, 2)],
            "num_groups": 2,
            "weight": uniform(6),
            "bias": normal(6),
            "eps": 1e-5,
            "relu": True,
        },
        "side_distributions": {"reg_preds": bins, "locations": torch.tensor([[0, 5, -1], [15, 3, 2]]), "reg_max": 4},
        "side_uncertainty": {"distributions": uniform(6, 5).softmax(1)},
    }


NUMBERS: dict[str, Any] = {
    "2**63": 2**63,
    "-2**63 - 1": -(2**63) - 1,
    "2**62": 2**62,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "1e400": 1e400,
    "-1e400": -1e400,
    "1e300": 1e300,
    "1e38": 1e38,
    "1e-45": 1e-45,
    "1e-320": 1e-320,
    "NaN": float("nan"),
    "-0.0": -0.0,
    "-1": -1,
    "0": 0,
    "1j": 1j,
    "True": True,
    "text": "0.5",
    "None": None,
    "bytes": b"1",
    "list": [0.5],
    "numpy.float32": np.float32(0.5),
    "numpy.int8": np.int8(2),
    "numpy.bool": np.bool_(True),
    "numpy.complex": np.complex64(1),
    "numpy array": np.array(1.5),
    "numpy pair": np.array([1.0, 2.0]),
    "tensor": torch.tensor(0.5),
    "tensor of 1": torch.ones(1),
    "tensor of 2": torch.ones(2),
    "empty tensor": torch.ones(0),
    "complex tensor": torch.tensor(1j),
    "meta tensor": torch.empty((), device="meta"),
    "bool tensor": torch.tensor(True),
}
OTHERS: dict[str, Any] = {
    "None": None,
    "number": 3,
    "text": "none",
    "object": object(),
    "list": [],
    "dict": {},
    "array": np.ones((6, 3)),
    "numpy.bool": np.bool_(True),
    "1": 1,
    "2": 2,
    "array of 2": np.ones(2),
}


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value) if t.is_floating_point() else t


def _first(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        if t.is_floating_point() and t.numel():
            t.view(-1)[0] = value
        return t

    return change


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0,
    "int64": lambda t: t.long(),
    "uint8": lambda t: t.abs().to(torch.uint8),
    "fp64": lambda t: t.double(),
    "fp16": lambda t: t.half(),
    "bf16": lambda t: t.bfloat16(),
    "fp8": lambda t: t.float().to(torch.float8_e5m2),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t.flatten(0, 1) if t.dim() > 1 else t[0],
    "no rows": lambda t: t[:0],
    "one row": lambda t: t[:1],
    "no columns": lambda t: t[..., :0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "stepped": lambda t: torch.stack([t, t], -1)[..., 0],
    "leaf": lambda t: t.detach().requires_grad_(t.is_floating_point()),
    "numpy": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "0": _filled(0.0),
    "inf": _first(float("inf")),
    "-inf": _first(float("-inf")),
    "NaN": _first(float("nan")),
    "1e38": _filled(1e38),
    "negative": lambda t: -t,
}


def mutated(call: Call, rnd: random.Random, arguments: int = 1) -> tuple[Call, str]:
    """The call with some arguments, or an item of each, replaced; and what was done."""
    changed, told = dict(call), []
    for name in rnd.sample(list(call), min(arguments, len(call))):
        changed[name], how = _replaced(call[name], rnd)
        told.append(f"`{name}` {how}")
    return changed, " and ".join(told)


def _replaced(value: Any, rnd: random.Random) -> tuple[Any, str]:
    if isinstance(value, Tensor) and rnd.random() < 0.9:
        form = rnd.choice(list(TENSORS))
        return TENSORS[form](value), form
    if isinstance(value, (list, tuple)) and rnd.random() < 0.8:
        at = rnd.randrange(len(value))
        if rnd.random() < 0.2:
            shorter = list(value[:at]) + list(value[at + 1 :])
            return shorter, f"without item {at}"
        item, how = _replaced(value[at], rnd)
        return type(value)((*value[:at], item, *value[at + 1 :])), f"item {at} {how}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rnd.random() < 0.9:
        form = rnd.choice(list(NUMBERS))
        return NUMBERS[form], f"= {form}"
    form = rnd.choice(list(OTHERS))
    return OTHERS[form], f"= {form}"
