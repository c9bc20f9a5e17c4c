# SPDX-License-Identifier: Apache-2.0
"""From which location a box was read, and the four learned distributions that stand there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig


class Edges(NamedTuple):
    """The distributions of n boxes' edges.

    Attributes:
        probabilities: fp32 ``[n, 4, R+1]``, sides in the order left, top, right, bottom.
        locations: fp32 ``[n, 2]``, (x, y) that the distances are measured from, in pixels.
        bins: fp32 ``[n, 2]``, width and height of a bin in the same pixels: left and right edge lie at
            ``x ∓ expected bin · width``, top and bottom edge at ``y ∓ expected bin · height``.
    """

    probabilities: Tensor
    locations: Tensor
    bins: Tensor

    def doubt(self) -> Tensor:
        """Standard deviation of each edge in bins, ``[n, 4]``, less what an edge that is known exactly must have.

        Such an edge is spread over the two bins around it, with variance f·(1−f) at the fraction f between them, and
        no distribution of that mean has less.
        """
        bins = torch.arange(self.probabilities.shape[-1], device=self.probabilities.device)
        mean = (self.probabilities * bins).sum(-1)
        variance = (self.probabilities * (bins - mean[..., None]) ** 2).sum(-1)
        return (variance - mean.frac() * (1 - mean.frac())).clamp(min=0).sqrt()


def find_edges(
    cls_scores: Sequence[Tensor],
    reg_preds: Sequence[Tensor],
    config: ModelConfig,
    image_size: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
) -> Edges:
    """Decode every location of one image and find those that gave the boxes.

    Among the locations whose score of the box's class is its score, the one whose box is nearest; two such locations
    with the same box would have the same distributions but for their place.

    Args:
        cls_scores: levels of ``[C, H, W]``, logits of one image.
        reg_preds: levels of ``[4(R+1), H, W]``.
        config: of the network that gave them.
        image_size: ``[2]`` (h, w) that boxes were clipped to, in the network's pixels.
        boxes: fp32 ``[n, 4]`` xyxy in the network's pixels, as `gfl_ops.postprocess` read them off these maps.
        scores: fp32 ``[n]``.
        labels: int64 ``[n]``.

    Returns:
        On the maps' device.
    """
    logits, sides, points, strides = [], [], [], []
    for cls_score, reg_pred, step in zip(cls_scores, reg_preds, config.strides, strict=True):
        height, width = cls_score.shape[1:]
        shift = (step - 1) / 2 if config.legacy else config.center_offset * step
        y, x = torch.meshgrid(
            torch.arange(height, device=cls_score.device) * step + shift,
            torch.arange(width, device=cls_score.device) * step + shift,
            indexing="ij",
        )
        points.append(torch.stack([x, y], -1).reshape(-1, 2).float())
        strides.append(torch.full((height * width,), float(step), device=cls_score.device))
        logits.append(cls_score.flatten(1).t().float())
        sides.append(reg_pred.flatten(1).t().float().unflatten(1, (4, config.reg_max + 1)).softmax(-1))
    logit, side, point, stride = (torch.cat(parts) for parts in (logits, sides, points, strides))
    distance = (side * torch.arange(config.reg_max + 1, device=side.device)).sum(-1) * stride[:, None]
    limit = image_size.float().flip(0).repeat(2) - float(config.legacy)
    decoded = torch.cat([point - distance[:, :2], point + distance[:, 2:]], 1)
    decoded = torch.minimum(decoded.clamp(min=0), limit)
    # [n, A]; the operator's exp may differ from torch's in the last places.
    far = (logit[:, labels].t().sigmoid() - scores[:, None]).abs() > 1e-5
    difference = (decoded[None] - boxes[:, None]).abs().amax(-1)
    chosen = difference.masked_fill(far, torch.inf).argmin(1)
    return Edges(side[chosen], point[chosen], stride[chosen, None].expand(-1, 2))
