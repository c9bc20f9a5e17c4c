# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of detections by their score threshold, from what a COCO evaluation accumulated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The score thresholds at which they are computed.
THRESHOLDS = torch.linspace(0, 1, 101, dtype=torch.float64)
AREAS = ("all", "small", "medium", "large")
POINT = ("precision", "recall", "F1", "threshold")


class Curves(NamedTuple):
    """At an IoU of 0.5, for detections above each of the `THRESHOLDS`; NaN where there is no object to find."""

    precision: Tensor  # fp64 [101, K, 4], thresholds, classes, `AREAS`
    recall: Tensor

    @property
    def f1(self) -> Tensor:
        total = self.precision + self.recall
        return torch.where(total > 0, 2 * self.precision * self.recall / total, total)

    def best(self) -> dict[str, float]:
        """The threshold of the highest F1 as a mean over the classes, and the means there; NaN without objects."""
        mean = self.f1[:, :, 0].nanmean(1)
        if bool(mean.isnan().all()):
            return dict.fromkeys(POINT, math.nan)
        at = int(mean.argmax())
        values = (curve[at, :, 0].nanmean().item() for curve in (self.precision, self.recall))
        return dict(zip(POINT, (*values, float(mean[at]), float(THRESHOLDS[at]))))

    def at(self, threshold: float) -> Tensor:
        """Precision, recall and F1, fp64 ``[3, K, 4]``, at the threshold of the list that is nearest."""
        row = round(threshold * (len(THRESHOLDS) - 1)) if math.isfinite(threshold) else 0
        return torch.stack([self.precision[row], self.recall[row], self.f1[row]])


def curves(evaluation: Any) -> Curves:
    """Of pycocotools' ``COCOeval``, or one like it, evaluated and accumulated.

    COCO's tables have precision, not falling with recall, and the lowest score at each of 101 recalls: those whose
    score is above a threshold are what detections above it reach, to a hundredth of the objects.
    """
    # [IoU thresholds, recalls, classes, areas, limits of detections]; the first IoU is 0.5, the last limit the highest.
    precision, scores = (
        torch.as_tensor(evaluation.eval[name])[0, :, :, :, -1].double() for name in ("precision", "scores")
    )
    absent = (precision < 0).all(0)  # no object
    reached = (scores[None] >= THRESHOLDS[:, None, None, None]) & (precision > 0)[None]
    count = reached.sum(1)
    last = (count - 1).clamp(min=0)
    found = precision.gather(0, last)
    # Above the highest score nothing is found and nothing wrong; but a class that is never found has no precision.
    nothing = (count[:1] > 0).double()
    result = Curves(torch.where(count > 0, found, nothing), last.double() / (len(precision) - 1))
    return Curves(*(curve.masked_fill(absent, math.nan) for curve in result))
