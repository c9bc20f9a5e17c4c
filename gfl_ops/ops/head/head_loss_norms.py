# SPDX-License-Identifier: Apache-2.0
"""The sums that the head's losses are divided by, for an all-reduce before the losses are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, detached, device_type
from ...core.registry import OpSpec, Sample, register
from . import gfl_loss
from .atss import Assignment

OP = "head_loss_norms"


def reference(cls_scores: Sequence[Tensor], labels: Tensor, matched: Tensor) -> Tensor:
    """The largest probability of every location, masked where it is not positive."""
    acc = accumulator(cls_scores[0].dtype)
    positive = (labels >= 0) & (labels < cls_scores[0].shape[1]) & (matched >= 0)
    largest = torch.cat([m.amax(1).flatten(1) for m in cls_scores], 1).to(acc)
    weight = torch.where(positive, largest.sigmoid(), 0.0).sum()
    return torch.stack([positive.sum(1).clamp(min=1).sum().to(acc), weight])


def fake(cls_scores: Sequence[Tensor], labels: Tensor, matched: Tensor) -> Tensor:
    return cls_scores[0].new_empty((2,), dtype=accumulator(cls_scores[0].dtype))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for sample in gfl_loss.samples(device, dtype, generator):
        cls_scores, _, _, labels, matched, *_ = sample.args
        # The others differ in what only the losses take.
        if not any(word in sample.id for word in ("norms", "legacy", "beta")):
            yield Sample(sample.id.removeprefix("detached-"), (cls_scores, labels, matched))


HEAD_LOSS_NORMS = register(
    OpSpec(
        stem=OP,
        schema="(Tensor[] cls_scores, Tensor labels, Tensor matched) -> Tensor norms",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="the normalisers of the head loss, for a mean over ranks",
        public=(OP,),
    )
)


def head_loss_norms(cls_scores: Sequence[Tensor], assignment: Assignment) -> Tensor:
    """The two sums that `gfl_loss` divides by, before their means over ranks: one tensor for one all-reduce.

    ``mean = all_reduce(head_loss_norms(...)) / ranks``, then ``gfl_loss(..., cls_norm=mean[0],
    box_norm=mean[1].clamp(min=1))``, as mmdet 3.3.0's GFLHead does.

    Args:
        cls_scores: one tensor per level, fp32, fp16, bf16 or fp64 ``[B, C, H, W]``: class logits.
        assignment: what `atss_assign` returned.

    Returns:
        fp32 (fp64 for fp64 maps) ``[2]`` on the maps' device: the sum over the images of max(positives, 1), and the sum
        over the positives of the location's largest class probability.

    There is no gradient.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or device outside the above.

    Note:
        The kernels read logits of the positives alone. Repeatable bit for bit.
    """
    images, _classes = checks.maps(OP, "cls_scores", cls_scores)
    first = cls_scores[0]
    cells = sum(m.shape[2] * m.shape[3] for m in cls_scores)
    labels, matched = gfl_loss.check_assignment(OP, assignment, images, cells, first)
    return HEAD_LOSS_NORMS(device_type(first), [detached(m) for m in cls_scores], labels, matched)
