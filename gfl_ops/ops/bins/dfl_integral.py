# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss and the expected distance from one softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core.dtypes import accumulator, as_dtype, device_type
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import OpSpec, Sample, register
from . import dfl, kept_softmax
from .integral import bounded_logits, expectation, spread


def reference(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> tuple[Tensor, Tensor]:
    return dfl.reference(pred, target, ignore_out_of_range), expectation(bounded_logits(pred))


def fake(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty(pred.shape[0], dtype=accumulator(pred.dtype))
    return loss, torch.empty_like(loss)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    yield from dfl.samples(device, dtype, generator)


DFL_INTEGRAL = register(
    OpSpec(
        stem="dfl_integral",
        schema="(Tensor pred, Tensor target, bool ignore_out_of_range) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="distribution focal loss and expected distance from one softmax",
        public=("dfl_integral",),
        differentiable=("pred", "target"),
        magnitude=lambda pred, target, ignore_out_of_range: spread(pred.shape[1] - 1),
    )
)


def dfl_integral(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    out_of_range: str = "clamp",
) -> tuple[Tensor, Tensor]:
    r"""Distribution focal loss together with the expected distance, both from one softmax.

    .. math:: L(x, y) = -(l+1-y) \log p_l - (y-l) \log p_{l+1}, \qquad \hat y = \sum_j p_j \, j, \qquad
              p = \mathrm{softmax}(x),\; l = \lfloor y \rfloor

    Equations 6 and 5 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), with unit bins.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[M, R+1]``, logits of the bins 0 to R, R from 1 to 128. A logit beyond a
            quarter of fp32's range (8.5e37; an infinite one too) counts as that, without gradient.
        target: floating ``[M]``, positions in bins, [0, R].
        weight: ``[M]``, multiplies the loss of each row, not the distance.
        reduction: "none", "mean" or "sum", of the loss.
        avg_factor: as in :func:`distribution_focal_loss`.
        out_of_range: as in :func:`distribution_focal_loss`; the distance does not depend on the target.

    Returns:
        (loss, distance): the loss ``[M]`` for "none", else a scalar; the distance ``[M]`` in bins. Both fp32, or fp64
        for fp64 `pred`.

    The gradient reaches `pred` from both, `target` and `weight` from the loss.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`distribution_focal_loss`.

    Note:
        Accumulator, repeatability and empty input as in :func:`distribution_focal_loss`.
    """
    op = "dfl_integral"
    reg_max = dfl.check_bins(op, pred)
    dfl.check_position(op, target, pred, reg_max, out_of_range)
    check_reduction(op, pred.shape[:1], "[M]", pred, weight, reduction, avg_factor)
    arguments = (pred, as_dtype(target, accumulator(pred.dtype)), out_of_range == "ignore")
    kept = kept_softmax.dfl("dfl_integral", *arguments, weight, reduction, avg_factor)
    if kept is not None:
        return kept
    loss, distance = DFL_INTEGRAL(device_type(pred), *arguments)
    return reduce_loss(loss, weight, reduction, avg_factor), distance
