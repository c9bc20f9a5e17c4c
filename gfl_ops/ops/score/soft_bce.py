# SPDX-License-Identifier: Apache-2.0
"""Binary cross entropy against soft targets, given as a label and a score per row or densely."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.registry import Sample
from .score_loss import Target, row_loss, row_samples, score_spec
from .terms import binary_cross_entropy


def term(pred: Tensor, target: Tensor, activated: bool) -> Tensor:
    return binary_cross_entropy(pred, target, activated)[1]


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, label, target, activated in row_samples(device, dtype, generator):
        yield Sample(name, (pred, label, target, [], activated))


SOFT_BCE = score_spec(
    "soft_bce",
    term,
    samples,
    "cross entropy with soft targets, summed over the classes",
    "soft_target_bce",
    summed=True,
)


def soft_target_bce(
    pred: Tensor,
    target: Target,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    r"""Binary cross entropy of class scores against soft targets, which need no ``[N, C]`` tensor.

    .. math:: L(x, t) = \sum_c \mathrm{BCE}(\sigma(x_c), t_c)

    The classification loss of YOLOv8 and its kin, and :func:`quality_focal_loss` with ``beta=0``.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, C]``, logits; probabilities in [0, 1] if `activated` (NaN outside).
            With a dense target also ``[N, C, …]``. An infinite logit counts as the largest finite one.
        target: ``(label, score)``, an integer ``[N]`` and a floating ``[N]``, or a dense floating tensor of pred's
            shape, as :func:`quality_focal_loss` has them. Scores are in [0, 1].
        weight: ``[N]`` (``[N, …]`` for ``[N, C, …]``), multiplies the loss of each row.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N. A number, or a tensor
            of one element, which is not read by the host.
        activated: `pred` holds probabilities.

    Returns:
        ``[N]`` (``[N, …]``) for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, the scores and `weight`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        The mean is over rows, where torch's own is over elements. Arithmetic, repeatability and empty input as in
        :func:`quality_focal_loss`.
    """
    op = "soft_target_bce"
    checks.tensor(op, "pred", pred)
    return row_loss(op, SOFT_BCE, [], pred, target, weight, reduction, avg_factor, activated)
