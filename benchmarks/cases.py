# SPDX-License-Identifier: Apache-2.0
"""What is timed of each operator: `CASES[stem]` makes the cases from a scene, a dtype and a device.

Operators, backends and dtypes come from the registry. One that has no entry here is timed on the largest of its own
samples, against no one; that is enough for a new operator to appear in the table.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

import formulas
import formulas_head
import gfl_ops
from gfl_ops.core.registry import SPECS
from harness import Case, tensors
from inputs import CLASSES, REG_MAX, STRIDES, Scene, boxes_for_nms, centres, flatten, level_sizes

try:
    import torchvision
except (ImportError, RuntimeError):  # the latter where it was built for another torch
    torchvision = None

Maker = Callable[[Scene, torch.dtype], Iterator[Case]]
CASES: dict[str, Maker] = {}


def case(stem: str) -> Callable[[Maker], Maker]:
    def keep(maker: Maker) -> Maker:
        CASES[stem] = maker
        return maker

    return keep


def order() -> list[str]:
    """All operators of the registry: as they stand in this file, then those that don't."""
    return [s for s in CASES if s in SPECS] + [s for s in SPECS if s not in CASES]


def make(stem: str, scene: Scene, dtype: torch.dtype, device: str) -> list[Case]:
    """The operator's cases with their inputs on the device."""
    made = list(CASES[stem](scene, dtype)) if stem in CASES else [from_sample(stem, dtype)]
    return [replace(c, inputs=tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, c.inputs)) for c in made]


def from_sample(stem: str, dtype: torch.dtype) -> Case:
    spec = SPECS[stem]
    samples = list(spec.samples(torch.device("cpu"), dtype, torch.Generator().manual_seed(0)))
    sample = max(samples, key=lambda s: sum(t.numel() for t in tensors(s.args)))
    inputs = dict(zip(spec.arguments, sample.args))
    device_of = next(iter(tensors(sample.args)))

    def ours(**arguments: Any) -> Any:
        device = next(iter(tensors(arguments)), device_of).device.type
        return spec(device, *arguments.values())

    agree = None if spec.differentiable else different
    return Case(stem, stem, f"sample {sample.id}", inputs, ours, gradients=spec.differentiable, agree=agree)


def different(got: Any, want: Any) -> float:
    """Share of the elements that differ, by more than rounding where they are floats."""
    wrong = total = 0
    for g, w in zip(tensors(got), tensors(want)):
        if g.shape != w.shape:
            return 1.0
        equal = torch.isclose(g.double(), w.double(), rtol=1e-4, atol=1e-4) if w.is_floating_point() else g == w
        wrong, total = wrong + int((~equal).sum()), total + w.numel()
    return wrong / max(total, 1)


def different_sets(got: Tensor, want: Tensor) -> float:
    """Share of the indices that only one of the two holds."""
    ours, theirs = set(got.tolist()), set(want.tolist())
    return len(ours ^ theirs) / max(len(theirs), 1)


def different_detections(got: Any, want: Any) -> float:
    """By counts and ranked scores: equal scores may come in another order."""
    return different((got[1], got[3]), (want[1], want[3]))


def logits_of(scene: Scene) -> str:
    return f"{scene.pred.shape[0]}×{CLASSES} logits, {scene.positives} positives"


def class_inputs(scene: Scene, dtype: torch.dtype) -> dict[str, Any]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    images = (scene.labels >= 0).sum(1).clamp(min=1).sum()
    return {"pred": scene.pred.to(dtype), "label": scene.label, "score": scene.score.to(acc), "factor": images.to(acc)}


def dense_target(scene: Scene, value: Tensor) -> Tensor:
    """`value` at each positive's class, 0 elsewhere."""
    target = F.one_hot(scene.label, CLASSES + 1)[:, :CLASSES].to(value)
    return target * value[:, None]


@case("qfl")
def qfl(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs = class_inputs(scene, dtype)
    inputs["weight"] = torch.ones_like(inputs["score"])

    def ours(pred: Tensor, label: Tensor, score: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        return gfl_ops.quality_focal_loss(pred, (label, score), weight, avg_factor=factor)

    yield Case(
        "qfl", "qfl", logits_of(scene), inputs, ours, {"eager": formulas.qfl}, formulas.dense_qfl, gradients=("pred",)
    )


@case("focal")
def focal(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"pred": scene.pred.to(dtype), "target": dense_target(scene, torch.ones_like(scene.score)).to(acc)}

    def ours(pred: Tensor, target: Tensor) -> Tensor:
        return gfl_ops.sigmoid_focal_loss(pred, target, reduction="sum")

    def summed(pred: Tensor, target: Tensor) -> Tensor:
        return formulas.focal(pred, target).sum()

    def theirs(pred: Tensor, target: Tensor) -> Tensor:
        return torchvision.ops.sigmoid_focal_loss(formulas.widen(pred), target, reduction="sum")

    peers = {"eager": summed, "torchvision": theirs if torchvision else None}
    yield Case("focal", "focal", logits_of(scene), inputs, ours, peers, summed, gradients=("pred",))


@case("vfl")
def vfl(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    given = class_inputs(scene, dtype)
    inputs = {"pred": given["pred"], "target": dense_target(scene, given["score"]), "factor": given["factor"]}

    def ours(pred: Tensor, target: Tensor, factor: Tensor) -> Tensor:
        return gfl_ops.varifocal_loss(pred, target, avg_factor=factor)

    peers = {"eager": formulas.varifocal}
    yield Case("vfl", "vfl", logits_of(scene), inputs, ours, peers, formulas.varifocal, gradients=("pred",))


def side_inputs(scene: Scene, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weight = scene.weight.repeat_interleave(4).to(acc)
    inputs = {"pred": scene.rows.to(dtype), "target": scene.target.to(acc), "weight": weight, "factor": weight.sum()}
    return inputs, f"{len(scene.rows)}×{REG_MAX + 1} logits, the positives' sides"


@case("dfl")
def dfl(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs, what = side_inputs(scene, dtype)

    def ours(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        return gfl_ops.distribution_focal_loss(pred, target, weight, avg_factor=factor)

    yield Case("dfl", "dfl", what, inputs, ours, {"eager": formulas.dfl}, formulas.dense_dfl, gradients=("pred",))


@case("dfl_two_bin")
def dfl_two_bin(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs, what = side_inputs(scene, dtype)
    target = inputs.pop("target")
    left = target.long()
    inputs |= {"left": left, "weight_left": left + 1 - target, "weight_right": target - left}

    def ours(
        pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor, weight: Tensor, factor: Tensor
    ) -> Tensor:
        bins = (left, weight_left, weight_right)
        return gfl_ops.distribution_focal_loss(pred, bins, weight, avg_factor=factor)

    peers = {"eager": formulas.two_bin_dfl}
    yield Case("dfl_two_bin", "dfl two bins", what, inputs, ours, peers, formulas.two_bin_dfl, gradients=("pred",))


@case("integral")
def integral(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    rows = scene.rows.reshape(-1, 4 * (REG_MAX + 1)).to(dtype)
    inputs = {"pred": rows, "reg_max": REG_MAX}
    what = f"{len(rows)}×{rows.shape[1]} logits, the positives"
    peers = {"eager": formulas.integral}
    yield Case("integral", "integral", what, inputs, gfl_ops.integral, peers, formulas.dense_integral, ("pred",))
    # What mmdet and others do before they know which boxes are worth it.
    everywhere = flatten(scene.head.reg_preds).flatten(0, 1).to(dtype)
    inputs = {"pred": everywhere, "reg_max": REG_MAX}
    what = f"{len(everywhere)}×{everywhere.shape[1]} logits, all locations"
    yield Case("integral", "integral of all", what, inputs, gfl_ops.integral, peers, formulas.dense_integral)


@case("dfl_integral")
def dfl_integral(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs, what = side_inputs(scene, dtype)

    def ours(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return gfl_ops.dfl_integral(pred, target, weight, avg_factor=factor)

    peers, dense = {"eager": formulas.dfl_integral}, formulas.dense_dfl_integral
    yield Case("dfl_integral", "dfl+integral", what, inputs, ours, peers, dense, ("pred",))


@case("ld")
def ld(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs, _ = side_inputs(scene, dtype)
    del inputs["target"]
    # Another side's distribution: as far away as a teacher ever is.
    inputs |= {"teacher": inputs["pred"].roll(1, 0), "temperature": 10.0}

    def ours(pred: Tensor, teacher: Tensor, weight: Tensor, factor: Tensor, temperature: float) -> Tensor:
        return gfl_ops.distillation_loss(pred, teacher, weight, temperature, avg_factor=factor)

    what = f"{len(scene.rows)}×{REG_MAX + 1} logits of each of the two"
    peers = {"eager": formulas.distillation}
    yield Case("ld", "distillation", what, inputs, ours, peers, formulas.distillation, ("pred",))


@case("iou")
def iou(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    # Rounded boxes of 16 bits may touch no longer; those of training are fp32, and so is the target.
    inputs = {"pred": scene.pred_boxes.to(dtype), "target": scene.true_boxes.to(acc), "weight": scene.weight.to(acc)}
    inputs["factor"] = inputs["weight"].sum()
    for kind in ("iou", "giou", "diou", "ciou"):

        def ours(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor, kind: str = kind) -> Tensor:
            return gfl_ops.box_iou_loss(pred, target, weight, kind, avg_factor=factor)

        def eager(pred: Tensor, target: Tensor, weight: Tensor, factor: Tensor, kind: str = kind) -> Tensor:
            return formulas.box_iou_loss(pred, target, weight, factor, kind)

        yield Case("iou", kind, f"{scene.positives} pairs of boxes", inputs, ours, {"eager": eager}, eager, ("pred",))


@case("distance_to_box")
def distance_to_box(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    distance = scene.target.reshape(-1, 4).to(dtype)
    inputs = {"points": scene.points.to(dtype), "distance": distance}
    what = f"{scene.positives} locations"
    peers = {"eager": formulas.box_from_distance}
    ours, dense = gfl_ops.distance_to_box, formulas.box_from_distance
    yield Case("distance_to_box", "distance to box", what, inputs, ours, peers, dense, ("distance",))


@case("box_to_distance")
def box_to_distance(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    inputs = {"points": scene.points.to(dtype), "boxes": scene.true_boxes.to(dtype), "max_distance": float(REG_MAX)}
    peers = {"eager": formulas.distance_from_box}
    ours, dense = gfl_ops.box_to_distance, formulas.distance_from_box
    yield Case("box_to_distance", "box to distance", f"{scene.positives} boxes", inputs, ours, peers, dense)


@case("decode")
def decode(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    found = scene.candidates
    inputs = {
        "pred": found.rows.to(dtype),
        "points": found.points,
        "stride": found.stride,
        "reg_max": scene.trained.reg_max,
        "max_shape": tuple(float(s) for s in scene.size),
    }
    what = f"{len(found.rows)}×{found.rows.shape[1]} logits, candidates"
    peers = {"eager": formulas.decode}
    yield Case("decode", "decode", what, inputs, gfl_ops.decode, peers, formulas.dense_decode)
    # For those who bring their own selection: all locations of the batch.
    head = scene.head
    points, stride = centres(scene.size)
    inputs |= {
        "pred": flatten(head.reg_preds).flatten(0, 1).to(dtype),
        "points": points.repeat(scene.batch, 1),
        "stride": stride.repeat(scene.batch),
        "reg_max": head.reg_max,
    }
    what = f"{len(inputs['pred'])}×{inputs['pred'].shape[1]} logits, all locations"
    yield Case("decode", "decode of all", what, inputs, gfl_ops.decode, peers, formulas.dense_decode)


def kept_boxes(scene: Scene, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"boxes": scene.candidates.boxes.to(dtype), "scores": scene.candidates.scores.to(dtype)}


def widened(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda boxes, scores, **rest: call(formulas.widen(boxes), formulas.widen(scores), **rest)


@case("nms")
def nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    first = scene.candidates.images == 0
    whole = kept_boxes(scene, dtype)
    inputs = {name: value[first] for name, value in whole.items()} | {"iou_threshold": 0.6}
    what = f"{int(first.sum())} boxes"
    peers = {"eager": widened(formulas.nms), "torchvision": widened(torchvision.ops.nms) if torchvision else None}
    yield Case("nms", "nms", f"{what} of an image", inputs, gfl_ops.nms, peers, agree=different_sets)
    # Two images at once: plain Python loops, which are among the providers, would take minutes for more.
    few = scene.candidates.images < 2
    idxs = (scene.candidates.images * CLASSES + scene.candidates.labels)[few]
    inputs = {name: value[few] for name, value in whole.items()} | {"idxs": idxs, "iou_threshold": 0.6}
    peers = {"eager": widened(formulas.batched_nms)} | torchvision_batched_nms()
    what = f"{len(idxs)} boxes, {len(idxs.unique())} groups"
    yield Case("nms", "batched_nms", what, inputs, gfl_ops.batched_nms, peers, agree=different_sets)


def torchvision_batched_nms() -> dict[str, Callable[..., Any] | None]:
    """What it chooses, and both of its strategies whatever the number of boxes is."""
    if torchvision is None:
        return {"torchvision": None}
    module = torchvision.ops.boxes
    peers = {"torchvision": torchvision.ops.batched_nms}
    for name, strategy in (("shifted", "_batched_nms_coordinate_trick"), ("by class", "_batched_nms_vanilla")):
        peers[f"tv {name}"] = getattr(module, strategy, None)
    return {name: widened(call) if call is not None else None for name, call in peers.items()}


def suppression(count: int, clustered: bool, size: tuple[int, int], seed: int) -> Case:
    """`batched_nms` of drawn boxes."""
    how = "clustered" if clustered else "uniform"
    given = boxes_for_nms(count, clustered, size, seed) | {"iou_threshold": 0.6}
    return Case(
        "nms", f"batched_nms {count} {how}", f"{CLASSES} classes", given, gfl_ops.batched_nms,
        torchvision_batched_nms(), agree=different_sets,
    )  # fmt: skip


def one_class() -> dict[str, Any]:
    """The NMS inside a peer's chain: a compiled one where there is one."""
    return {"one_class": torchvision.ops.nms} if torchvision else {}


@case("multiclass_nms")
def multiclass_nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    found = scene.candidates
    first = found.images == 0
    labels, values = found.labels[first][:, None], found.scores[first][:, None]
    scores = torch.zeros((len(labels), CLASSES)).scatter(1, labels, values)
    inputs = {"boxes": found.boxes[first].to(dtype), "scores": scores.to(dtype)}

    def ours(boxes: Tensor, scores: Tensor) -> Any:
        return gfl_ops.multiclass_nms(boxes, scores, 0.05, 0.6, 100)

    def eager(boxes: Tensor, scores: Tensor) -> Any:
        boxes, scores = formulas.widen(boxes), formulas.widen(scores)
        return formulas.multiclass_nms(boxes, scores, 0.05, 0.6, 100, **one_class())

    def agree(got: Any, want: Any) -> float:
        return different(got[1], want[1])

    what = f"{len(scores)} boxes, {CLASSES} classes"
    yield Case("multiclass_nms", "multiclass_nms", what, inputs, ours, {"eager": eager}, agree=agree)


@case("soft_nms")
def soft_nms(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    # As many as one class of an image has: no one decays thousands.
    best = scene.candidates.scores.topk(min(500, len(scene.candidates.scores))).indices
    inputs = {name: value[best] for name, value in kept_boxes(scene, dtype).items()}

    def ours(boxes: Tensor, scores: Tensor) -> Any:
        return gfl_ops.soft_nms(boxes, scores, None, 0.3, 0.5, 1e-3, "linear")

    def eager(boxes: Tensor, scores: Tensor) -> Any:
        return formulas.soft_nms(formulas.widen(boxes), formulas.widen(scores), 0.3, 1e-3)

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


@case("postprocess")
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
        return formulas.postprocess(cls_scores, reg_preds, head.strides, scene.size, head.reg_max, **one_class())

    def ultralytics(cls_scores: list[Tensor], reg_preds: list[Tensor], image_sizes: Tensor) -> Any:
        suppress = ultralytics_nms()
        return formulas.ultralytics_postprocess(cls_scores, reg_preds, head.strides, scene.size, head.reg_max, suppress)

    peers = {"eager": eager, "ultralytics": ultralytics if ultralytics_nms() else None}
    # All scores are read, but of the distributions only the candidates'.
    reads = sum(m.numel() * m.element_size() for m in inputs["cls_scores"])
    reads += scene.candidates.rows.numel() * inputs["reg_preds"][0].element_size()
    what = f"{scene.batch} images, {len(scene.candidates.rows)} candidates"
    yield Case("postprocess", "postprocess", what, inputs, ours, peers, agree=different_detections, reads=reads)


@case("atss")
def atss(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    if dtype != torch.float32:
        return
    sizes, strides = level_sizes(scene.size), [float(s) for s in STRIDES]
    inputs = {"gt_boxes": scene.gt_boxes, "gt_labels": scene.gt_labels}

    def ours(gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return gfl_ops.atss_assign(sizes, strides, gt_boxes, gt_labels)

    def eager(gt_boxes: Tensor, gt_labels: Tensor) -> Any:
        return formulas_head.atss(sizes, strides, gt_boxes, gt_labels)

    def agree(got: Any, want: Any) -> float:
        """Of the positives; exact ties of distance are broken otherwise by torch's top-k."""
        return int((got[1] != want[1]).sum()) / max(int((want[0] >= 0).sum()), 1) / 10

    what = f"{scene.labels.shape[1]} locations, {int((scene.gt_labels >= 0).sum())} boxes"
    yield Case("atss", "atss", what, inputs, ours, {"eager": eager}, agree=agree)


@case("gfl_loss")
def gfl_loss(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    head, acc = scene.head, torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        "cls_scores": [m.to(dtype) for m in head.cls_scores],
        "reg_preds": [m.to(dtype) for m in head.reg_preds],
        "labels": scene.labels,
        "matched": scene.matched,
        "iou": scene.iou,
        "gt_boxes": scene.gt_boxes.to(acc),
    }

    def ours(
        cls_scores: list[Tensor],
        reg_preds: list[Tensor],
        labels: Tensor,
        matched: Tensor,
        iou: Tensor,
        gt_boxes: Tensor,
    ) -> Any:
        assignment = gfl_ops.Assignment(labels, matched, iou)
        return tuple(gfl_ops.gfl_loss(cls_scores, reg_preds, head.strides, assignment, gt_boxes))[:3]

    def peer(formula: Callable[..., Any]) -> Callable[..., Any]:
        def call(
            cls_scores: list[Tensor],
            reg_preds: list[Tensor],
            labels: Tensor,
            matched: Tensor,
            iou: Tensor,
            gt_boxes: Tensor,
        ) -> Any:
            return formula(cls_scores, reg_preds, head.strides, labels, matched, gt_boxes, head.reg_max)

        return call

    reads = sum(m.numel() * m.element_size() for m in inputs["cls_scores"]) + scene.labels.numel() * 16
    reads += scene.rows.numel() * inputs["reg_preds"][0].element_size()
    peers, dense = {"eager": peer(formulas_head.gfl_loss)}, peer(formulas_head.dense_gfl_loss)
    gradients = ("cls_scores", "reg_preds")
    what = f"{scene.batch} images, {scene.positives} positives"
    yield Case("gfl_loss", "gfl_loss", what, inputs, ours, peers, dense, gradients, reads=reads)


@case("group_norm_relu")
def group_norm_relu(scene: Scene, dtype: torch.dtype) -> Iterator[Case]:
    """One layer of a head's tower: 256 channels in 32 groups, all levels."""
    channels, groups, generator = 256, 32, torch.Generator().manual_seed(0)
    sizes = level_sizes(scene.size)
    # Nothing is near a group's mean, where a rounding decides whether ReLU lets the gradient pass.
    drawn = [torch.randn((scene.batch, channels, h, w), generator=generator) for h, w in sizes]
    maps = [(m + 0.3 * m.sign()).to(dtype) for m in drawn]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    parameters = {"weight": torch.rand(channels, generator=generator).to(acc), "bias": torch.zeros(channels, dtype=acc)}

    def ours(maps: list[Tensor], weight: Tensor, bias: Tensor) -> Any:
        return gfl_ops.group_norm_relu(maps, groups, weight, bias)

    def eager(maps: list[Tensor], weight: Tensor, bias: Tensor) -> Any:
        return [F.relu(F.group_norm(m, groups, weight.to(m.dtype), bias.to(m.dtype))) for m in maps]

    for name, layout in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        inputs = {"maps": [m.contiguous(memory_format=layout) for m in maps], **parameters}
        what = f"{scene.batch} images, {channels} channels, {name.upper()}"
        label, reached = f"norm+relu {name}", ("maps", "weight", "bias")
        yield Case("group_norm_relu", label, what, inputs, ours, {"eager": eager}, eager, reached)
