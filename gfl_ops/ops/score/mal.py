# SPDX-License-Identifier: Apache-2.0
"""Matchability-aware loss: cross entropy against a power of the quality, negatives weighted by their probability."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.registry import Sample
from .score_loss import Target, row_loss, row_samples, score_spec
from .terms import binary_cross_entropy, finite_power


def term(pred: Tensor, target: Tensor, gamma: float, activated: bool) -> Tensor:
    negative = target <= 0
    aim = torch.where(negative, 0.0, finite_power(torch.where(negative, 1.0, target), gamma))
    p, loss = binary_cross_entropy(pred, aim, activated)
    return torch.where(negative, finite_power(p.detach(), gamma), 1.0) * loss


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, label, target, activated in row_samples(device, dtype, generator):
        # The weight of a negative is no part of the gradient. Dense targets have none.
        name = name if label is None else f"detached-{name}"
        yield Sample(name, (pred, label, target, [1.5], activated))
        if "n7" in name:
            yield Sample(f"gamma2.5-{name}", (pred, label, target, [2.5], activated))


MAL = score_spec(
    "mal", term, samples, "matchability-aware loss, summed over the classes", "matchability_aware_loss", summed=True
)


def matchability_aware_loss(
    pred: Tensor,
    target: Target,
    gamma: float = 1.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    r"""Matchability-aware loss of class scores against the quality of the matched box.

    .. math:: L(x, t) = \sum_c w_c \; \mathrm{BCE}(\sigma(x_c), t_c^\gamma), \quad
        w_c = 1 \text{ where } t_c > 0, \text{ else } \sigma(x_c)^\gamma

    Huang et al., DEIM: DETR with Improved Matching for Fast Convergence, CVPR 2025 (arXiv 2412.04234).

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, C]``, logits; probabilities in [0, 1] if `activated` (NaN outside).
            With a dense target also ``[N, C, …]``. An infinite logit counts as the largest finite one.
        target: ``(label, score)``, an integer ``[N]`` and a floating ``[N]``, or a dense floating tensor of pred's
            shape, as :func:`quality_focal_loss` has them. Scores are IoUs in [0, 1].
        gamma: exponent of the scores and of the weight of negatives, >= 0.
        weight: ``[N]`` (``[N, …]`` for ``[N, C, …]``), multiplies the loss of each row.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N. A number, or a tensor
            of one element, which is not read by the host.
        activated: `pred` holds probabilities.

    Returns:
        ``[N]`` (``[N, …]``) for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, the scores and `weight`. The weight of a negative counts as a constant, as in DEIM's
    code; a score receives that of BCE times γ·score^(γ−1), and none where it is 0. DEIM's code detaches the IoU: pass
    ``score.detach()`` for the same.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        A class is a negative where its target is 0: a matched box of IoU 0 is one, where DEIM's code gives it weight 1.
        Arithmetic, repeatability and empty input as in :func:`quality_focal_loss`.
    """
    op = "matchability_aware_loss"
    checks.tensor(op, "pred", pred)
    gamma = checks.number(op, "gamma", gamma, 0, dtype=accumulator(pred.dtype))
    return row_loss(op, MAL, [gamma], pred, target, weight, reduction, avg_factor, activated)
