# SPDX-License-Identifier: Apache-2.0
"""The oracle of `postprocess`: plain Python loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def loops(
    cls_scores: list[Tensor],
    reg_preds: list[Tensor],
    strides: list[float],
    image_sizes: list[tuple[float, float]],
    reg_max: int,
    score_threshold: float,
    nms_pre: int,
    iou_threshold: float,
    max_detections: int,
    center_offset: list[float],
    topk_mode: str,
    scale_factors: list[tuple[float, float]] | None,
    activated: bool,
    legacy: bool,
) -> list[list[tuple[float, int, list[float], int]]]:
    """(score, label, box, location) of every image, by the contract's words: one candidate at a time, in double."""
    results = []
    grow = 1.0 if legacy else 0.0
    for image, (height, width) in enumerate(image_sizes):
        candidates, first = [], 0
        for level, (cls, reg) in enumerate(zip(cls_scores, reg_preds, strict=True)):
            scores, bins = cls[image].tolist(), reg[image].tolist()
            rows, columns = cls.shape[2:]
            above, best = [], {}
            for y in range(rows):
                for x in range(columns):
                    for c in range(cls.shape[1]):
                        value = scores[c][y][x]
                        if math.isnan(value) or value == -math.inf:
                            continue
                        probability = value if activated else 1 / (1 + math.exp(-min(max(value, -700), 700)))
                        if probability > score_threshold:
                            above.append((value, level, y * columns + x, c))
                            best[y * columns + x] = max(best.get(y * columns + x, -math.inf), value)
            above.sort(key=lambda a: (-a[0], a[2], a[3]))
            if nms_pre > 0 and topk_mode == "pair":
                above = above[:nms_pre]
            elif nms_pre > 0:
                chosen = set(sorted(best, key=lambda location: (-best[location], location))[:nms_pre])
                above = [a for a in above if a[2] in chosen]
            for value, _, location, c in above:
                x, y = location % columns, location // columns
                distances = []
                for side in range(4):
                    logits = [bins[side * (reg_max + 1) + j][y][x] for j in range(reg_max + 1)]
                    weights = [math.exp(logit - max(logits)) for logit in logits]
                    distances.append(sum(j * w for j, w in enumerate(weights)) / sum(weights) * strides[level])
                if legacy:
                    cx, cy = (v * strides[level] + (strides[level] - 1) / 2 for v in (x, y))
                else:
                    cx, cy = ((v + center_offset[level]) * strides[level] for v in (x, y))
                box = [cx - distances[0], cy - distances[1], cx + distances[2], cy + distances[3]]
                limits = [width - grow, height - grow] * 2
                box = [min(max(b, 0.0), limit) for b, limit in zip(box, limits, strict=True)]
                if box[2] > box[0] and box[3] > box[1]:
                    candidates.append((value, level, location, c, box, first + location))
            first += rows * columns
        candidates.sort(key=lambda a: (-a[0], a[1], a[2], a[3]))
        kept: list[tuple[float, int, list[float], int]] = []
        for value, _, _, c, box, place in candidates:
            if len(kept) < max_detections and all(
                other != c or overlap(box, b, grow) <= float(torch.tensor(iou_threshold)) for _, other, b, _ in kept
            ):
                score = value if activated else 1 / (1 + math.exp(-min(max(value, -700), 700)))
                kept.append((score, c, box, place))
        if scale_factors is not None:
            factors = [*scale_factors[image]] * 2
            kept = [(s, c, [v / f for v, f in zip(box, factors, strict=True)], i) for s, c, box, i in kept]
        results.append(kept)
    return results


def overlap(a: list[float], b: list[float], grow: float) -> float:
    w = max(min(a[2], b[2]) - max(a[0], b[0]) + grow, 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]) + grow, 0)
    areas = [(box[2] - box[0] + grow) * (box[3] - box[1] + grow) for box in (a, b)]
    return w * h / (sum(areas) - w * h)
