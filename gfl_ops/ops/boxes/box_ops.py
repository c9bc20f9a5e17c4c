# SPDX-License-Identifier: Apache-2.0
"""Overlap of boxes xyxy in torch: operation by operation what csrc/terms/box.h computes, so that decisions agree.

Everything is in fp32, or in fp64 for fp64 boxes. `legacy` adds 1 to widths and heights (GFocal v1's inclusive pixels).
A union of 0 and any NaN coordinate give a NaN IoU, which never compares greater: such a pair does not suppress.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.dtypes import accumulator


def area(boxes: Tensor, legacy: bool = False) -> Tensor:
    """``[…, 4] -> […]``, width times height, not clamped."""
    boxes = boxes.to(accumulator(boxes.dtype))
    offset = 1.0 if legacy else 0.0
    return (boxes[..., 2] - boxes[..., 0] + offset) * (boxes[..., 3] - boxes[..., 1] + offset)


def overlap(a: Tensor, b: Tensor, legacy: bool = False) -> tuple[Tensor, Tensor]:
    """Intersection and union of boxes ``[…, 4]`` whose leading dimensions broadcast."""
    offset = 1.0 if legacy else 0.0
    union = area(a, legacy) + area(b, legacy)
    a, b = a.to(accumulator(a.dtype)), b.to(accumulator(b.dtype))
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2]) + offset).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    return intersection, union - intersection


def aligned_iou(a: Tensor, b: Tensor, legacy: bool = False) -> Tensor:
    """IoU of boxes ``[…, 4]`` whose leading dimensions broadcast."""
    intersection, union = overlap(a, b, legacy)
    return intersection / union


def pairwise_iou(a: Tensor, b: Tensor, legacy: bool = False) -> Tensor:
    """IoU of every box of ``a [..., N, 4]`` with every one of ``b [..., M, 4]``: ``[..., N, M]``."""
    return aligned_iou(a[..., :, None, :], b[..., None, :, :], legacy)


def rounded(threshold: float, dtype: torch.dtype) -> float:
    """`threshold` as the arithmetic for boxes of `dtype` sees it."""
    return torch.tensor(threshold, dtype=accumulator(dtype)).item()
