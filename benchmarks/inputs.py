# SPDX-License-Identifier: Apache-2.0
"""Inputs of the benchmarks: real boxes, their assignment, a head's outputs; random ones like them where there are none.

Real data is the folder that `--data` or ``GFL_TEST_DATA`` names, by default ``../shared/data`` as seen from the
project's root: ``coco_val2017_47/instances_val2017_47.json`` (boxes) and ``nanodet_plus_416_head_<id>.npz`` next to it
(all outputs of a trained head of the same family: distances up to 7, strides 8 to 64).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import gfl_ops

CLASSES = 80
STRIDES = (8, 16, 32, 64, 128)
REG_MAX = 16
ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GFL_TEST_DATA", ROOT.parent / "shared" / "data"))
TRAINED_STRIDES, TRAINED_REG_MAX, TRAINED_SIDES = (8, 16, 32, 64), 7, (52, 26, 13, 7)


@dataclass(frozen=True)
class Head:
    """A head's outputs for a batch: levels of ``[B, 80, H, W]`` logits and of ``[B, 4(R+1), H, W]`` distributions."""

    cls_scores: list[Tensor]
    reg_preds: list[Tensor]
    strides: tuple[int, ...]
    reg_max: int
    image_sizes: Tensor
    source: str


@dataclass(frozen=True)
class Candidates:
    """What post-processing keeps of a head before suppression, over all images: N rows.

    Attributes:
        rows: ``[N, 4(R+1)]`` distribution logits.
        points: ``[N, 2]`` centres in pixels.
        stride: ``[N]``.
        boxes: ``[N, 4]``, decoded and clipped.
        scores: ``[N]`` probabilities.
        labels: int64 ``[N]``.
        images: int64 ``[N]``, which image of the batch.
    """

    rows: Tensor
    points: Tensor
    stride: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    images: Tensor


@dataclass(frozen=True)
class Scene:
    """A batch in the middle of training: ground truth, its assignment, and the head's outputs there.

    Attributes:
        size: height and width of the padded input.
        gt_boxes: ``[B, G, 4]``, xyxy in pixels.
        gt_labels: int64 ``[B, G]``, −1 in unused slots.
        labels, matched, iou: the assignment, ``[B, A]``.
        head: random outputs with the statistics of a trained head's: background logits, higher ones at the positives.
        pred, label, score: all locations: ``[B·A, C]`` logits, class (C for background), IoU of the predicted box.
        rows, target, weight: the P positives' sides: ``[4P, R+1]`` logits, distance in bins, weight.
        pred_boxes, true_boxes: the positives' boxes ``[P, 4]`` in strides, as the head's loss compares them.
        trained: a trained head's outputs where there are any, else `head`.
    """

    size: tuple[int, int]
    boxes_from: str
    gt_boxes: Tensor
    gt_labels: Tensor
    labels: Tensor
    matched: Tensor
    iou: Tensor
    head: Head
    pred: Tensor
    label: Tensor
    score: Tensor
    rows: Tensor
    target: Tensor
    weight: Tensor
    points: Tensor
    pred_boxes: Tensor
    true_boxes: Tensor
    trained: Head
    candidates: Candidates

    @property
    def batch(self) -> int:
        return self.gt_boxes.shape[0]

    @property
    def positives(self) -> int:
        return self.pred_boxes.shape[0]


def level_sizes(size: tuple[int, int], strides: tuple[int, ...] = STRIDES) -> list[tuple[int, int]]:
    return [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in strides]


def centres(size: tuple[int, int], strides: tuple[int, ...] = STRIDES) -> tuple[Tensor, Tensor]:
    """Centres ``[A, 2]`` of all locations in pixels, and the stride ``[A]`` of each."""
    points, stride = [], []
    for (height, width), s in zip(level_sizes(size, strides), strides):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points.append(torch.stack([x, y], -1).reshape(-1, 2).float() * s)
        stride.append(torch.full((height * width,), float(s)))
    return torch.cat(points), torch.cat(stride)


def flatten(maps: list[Tensor]) -> Tensor:
    """Levels of ``[B, K, H, W]`` -> ``[B, A, K]``."""
    return torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)


def unflatten(rows: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """``[B, A, K]`` -> levels of ``[B, K, H, W]``, contiguous."""
    parts = rows.split([h * w for h, w in sizes], 1)
    return [p.transpose(1, 2).reshape(p.shape[0], -1, h, w).contiguous() for p, (h, w) in zip(parts, sizes)]


def coco_boxes(data: Path, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Boxes and labels of each image that has any, scaled to `size`; portrait images are turned on their side."""
    path = data / "coco_val2017_47" / "instances_val2017_47.json"
    if not path.is_file():
        return []
    file = json.loads(path.read_text())
    classes = {c: i for i, c in enumerate(sorted(c["id"] for c in file["categories"]))}
    images = []
    for image in sorted(file["images"], key=lambda i: i["id"]):
        found = [a for a in file["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        if not found:
            continue
        boxes = torch.tensor([a["bbox"] for a in found])
        boxes[:, 2:] += boxes[:, :2]
        width, height = image["width"], image["height"]
        if height > width:
            boxes, width, height = boxes[:, [1, 0, 3, 2]], height, width
        # As for testing: short side to the input's, unless the long one gets too long.
        scale = min(size[0] / height, size[1] / width)
        images.append((boxes * scale, torch.tensor([classes[a["category_id"]] for a in found])))
    return images


def random_boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Images with COCO's statistics: 7.3 boxes on average, half of them below 47 pixels in an image 480 high."""
    images = []
    for _ in range(count):
        n = int(torch.randn((), generator=generator).mul(0.95).add(1.55).exp().clamp(1, 60).round())
        side = torch.randn(n, generator=generator).mul(1.05).add(math.log(47)).exp() * size[0] / 480
        aspect = torch.randn(n, generator=generator).mul(0.38).exp()
        extent = torch.stack([side * aspect, side / aspect], 1).clamp(min=4.0)
        extent = torch.minimum(extent, torch.tensor([size[1], size[0]]) * 0.95)
        corner = torch.rand((n, 2), generator=generator) * (torch.tensor([size[1], size[0]]) - extent)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        images.append((torch.cat([corner, corner + extent], 1), labels))
    return images


def trained_head(data: Path, batch: int, size: tuple[int, int]) -> Head | None:
    """A trained head's outputs for mosaics: images of 416×416 side by side that fill `size`, cut at its edge."""
    folder = data / "coco_val2017_47"
    paths = sorted(p for p in folder.glob("nanodet_plus_416_head_*.npz") if "sparse" not in p.name)
    if not paths:
        return None
    try:
        import numpy as np
    except ImportError:
        return None
    parts = []
    for path in paths:
        with np.load(path) as file:
            parts.append(torch.from_numpy(file["head"]).float())
    across, down = (math.ceil(extent / 416) for extent in (size[1], size[0]))
    maps: list[Tensor] = []
    start = 0
    for side, (height, width) in zip(TRAINED_SIDES, level_sizes(size, TRAINED_STRIDES)):
        level = torch.stack([p[start : start + side * side].reshape(side, side, -1) for p in parts])
        start += side * side
        images = []
        for image in range(batch):
            # Each mosaic of the batch begins with another image.
            order = [(image * across * down + i) % len(parts) for i in range(across * down)]
            mosaic = level[order].reshape(down, across, side, side, -1).permute(4, 0, 2, 1, 3)
            images.append(mosaic.reshape(-1, down * side, across * side)[:, :height, :width])
        maps.append(torch.stack(images))
    return Head(
        [m[:, :CLASSES].contiguous() for m in maps],
        [m[:, CLASSES:].contiguous() for m in maps],
        TRAINED_STRIDES,
        TRAINED_REG_MAX,
        torch.tensor([size] * batch).float(),
        f"a trained head's outputs, {len(parts)} images in mosaics",
    )


def select(head: Head, size: tuple[int, int], threshold: float = 0.05, best: int = 1000) -> Candidates:
    """The best (location, class) pairs of each level above the threshold, decoded."""
    points, stride = centres(size, head.strides)
    limit = math.log(threshold / (1 - threshold))
    rows, where, labels, scores, images = [], [], [], [], []
    start = 0
    for cls, reg in zip(head.cls_scores, head.reg_preds):
        cells = cls.shape[2] * cls.shape[3]
        for image in range(cls.shape[0]):
            logits = cls[image].flatten(1).t().reshape(-1)
            value, index = logits.topk(min(best, logits.numel()))
            index, value = index[value > limit], value[value > limit]
            cell = index // CLASSES
            rows.append(reg[image].flatten(1).t()[cell])
            where.append(cell + start)
            labels.append(index % CLASSES)
            scores.append(value.sigmoid())
            images.append(torch.full_like(index, image))
        start += cells
    place, row = torch.cat(where), torch.cat(rows)
    point, step = points[place], stride[place]
    distance = expected_bin(row, head.reg_max) * step[:, None]
    boxes = torch.cat([point - distance[:, :2], point + distance[:, 2:]], 1)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([size[1], size[0]] * 2).float())
    return Candidates(row, point, step, boxes, torch.cat(scores), torch.cat(labels), torch.cat(images))


def expected_bin(rows: Tensor, reg_max: int) -> Tensor:
    """``[…, 4(R+1)] -> […, 4]``: the mean of each side's distribution."""
    bins = torch.arange(reg_max + 1, dtype=rows.dtype)
    return (rows.unflatten(-1, (4, reg_max + 1)).softmax(-1) * bins).sum(-1)


def make_scene(batch: int, size: tuple[int, int] = (800, 1344), data: Path = DATA, seed: int = 0) -> Scene:
    """The inputs of all benchmarks, on the CPU in fp32. The same seed gives the same scene."""
    generator = torch.Generator().manual_seed(seed)
    chosen_from = coco_boxes(data, size)
    boxes_from = (
        f"boxes of {len(chosen_from)} images of COCO val2017" if chosen_from else "random boxes with COCO's statistics"
    )
    chosen_from = chosen_from or random_boxes(47, size, generator)
    # Images of every kind, sparse and crowded ones, so that a small batch has about the average number of boxes too.
    chosen_from.sort(key=lambda image: len(image[1]))
    chosen = [chosen_from[int((i + 0.5) / batch * len(chosen_from))] for i in range(batch)]
    slots = max(len(labels) for _, labels in chosen)
    gt_boxes, gt_labels = torch.zeros((batch, slots, 4)), torch.full((batch, slots), -1)
    for image, (boxes, labels) in enumerate(chosen):
        gt_boxes[image, : len(labels)], gt_labels[image, : len(labels)] = boxes, labels
    labels, matched, iou = assign(size, gt_boxes, gt_labels)

    points, stride = centres(size)
    positive = labels >= 0
    images = positive.nonzero()[:, 0]
    true = gt_boxes[images, matched[positive]]
    point, step = points.expand(batch, -1, -1)[positive], stride.expand(batch, -1)[positive]
    target = (torch.cat([point - true[:, :2], true[:, 2:] - point], 1) / step[:, None]).clamp(0, REG_MAX - 0.1)

    # Like a trained head's: background logits N(−6, 1.25), as measured on the real one; logits near 0 at the classes of
    # positives; distributions that peak about half a bin from their target.
    shape = (*labels.shape,)
    pred = torch.randn((*shape, CLASSES), generator=generator) * 1.25 - 6.0
    found = torch.randn(images.shape, generator=generator) * 1.2 - 0.3
    pred[positive] = pred[positive].scatter(1, labels[positive][:, None], found[:, None])
    middle = torch.rand((*shape, 4), generator=generator) * 6.0
    middle[positive] = target + torch.randn(target.shape, generator=generator) * 0.5
    bins = torch.arange(REG_MAX + 1.0)
    reg = torch.randn((*shape, 4, REG_MAX + 1), generator=generator) * 0.5
    reg -= ((bins - middle[..., None]).abs() * 1.2).clamp(max=7.0)
    reg = reg.flatten(2)

    rows = reg[positive]
    scaled, distance = point / step[:, None], expected_bin(rows, REG_MAX)
    pred_boxes = torch.cat([scaled - distance[:, :2], scaled + distance[:, 2:]], 1)
    true_boxes = true / step[:, None]
    score = torch.zeros(shape)
    score[positive] = overlap(pred_boxes, true_boxes)
    label = torch.where(labels < 0, CLASSES, labels)
    sizes = level_sizes(size)
    head = Head(
        unflatten(pred, sizes), unflatten(reg, sizes), STRIDES, REG_MAX, torch.tensor([size] * batch).float(), "random"
    )
    trained = trained_head(data, batch, size) or head
    return Scene(
        size, boxes_from, gt_boxes, gt_labels, labels, matched, iou, head,
        pred.flatten(0, 1), label.flatten(), score.flatten(),
        rows.reshape(-1, REG_MAX + 1), target.flatten(), pred[positive].sigmoid().amax(1), scaled,
        pred_boxes, true_boxes, trained, select(trained, size),
    )  # fmt: skip


def assign(size: tuple[int, int], gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    strides = [float(s) for s in STRIDES]
    return tuple(gfl_ops.atss_assign(level_sizes(size), strides, gt_boxes, gt_labels))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of aligned boxes."""
    common = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    return common / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common).clamp(min=1e-6)


def boxes_for_nms(count: int, clustered: bool, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Boxes of 16 to 200 pixels of CLASSES classes: spread evenly, or in clusters of twenty of one class."""
    generator = torch.Generator().manual_seed(seed)
    places = max(1, count // 20) if clustered else count
    extent = torch.tensor([float(size[1]), float(size[0])])
    centre, idxs = (
        torch.rand((places, 2), generator=generator) * extent,
        torch.randint(CLASSES, (places,), generator=generator),
    )
    side = torch.rand((places, 2), generator=generator) * 184 + 16
    if clustered:
        which = torch.arange(count) % places
        jitter = torch.randn((count, 4), generator=generator) * 0.15 * side[which].repeat(1, 2)
        centre, side, idxs = centre[which] + jitter[:, :2], (side[which] + jitter[:, 2:]).clamp(min=4), idxs[which]
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1)
    return {
        "boxes": boxes,
        "scores": torch.rand(count, generator=generator),
        "idxs": idxs,
    }
