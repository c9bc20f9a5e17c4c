# SPDX-License-Identifier: Apache-2.0
"""Quality focal loss: classification against a soft target, the localisation quality of the box."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.random_inputs import uniform
from ...core.registry import Sample
from .score_loss import Target, row_loss, row_samples, score_spec
from .terms import absolute_power, binary_cross_entropy


def term(pred: Tensor, target: Tensor, beta: float, activated: bool) -> Tensor:
    p, loss = binary_cross_entropy(pred, target, activated)
    return absolute_power(target - p, beta) * loss


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, label, target, activated in row_samples(device, dtype, generator):
        yield Sample(name, (pred, label, target, [2.0], activated))
        if name.startswith("strided"):
            assert label is not None
            yield Sample(f"beta1.5-{name}", (pred, label, target, [1.5], activated))
            # Below 1 the derivative grows without bound at score = σ, and with it every rounding: stay a tenth away.
            own = pred.sigmoid().gather(1, label.clamp(0, pred.shape[1] - 1)[:, None])[:, 0].to(target.dtype)
            apart = (own + uniform(own.shape, device, target.dtype, generator, 0.1, 0.9)) % 1.0
            yield Sample(f"beta0.5-{name}", (pred, label, apart, [0.5], activated))


QFL = score_spec("qfl", term, samples, "quality focal loss, summed over the classes", "quality_focal_loss", summed=True)


def quality_focal_loss(
    pred: Tensor,
    target: Target,
    weight: Tensor | None = None,
    beta: float = 2.0,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    r"""Quality focal loss of class scores against the quality of the predicted box.

    .. math:: L(x, t) = \sum_c |t_c - \sigma(x_c)|^\beta \; \mathrm{BCE}(\sigma(x_c), t_c)

    Equation 2 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388).

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, C]``, logits; probabilities in [0, 1] if `activated` (NaN outside).
            With a dense target also ``[N, C, …]``. An infinite logit counts as the largest finite one.
        target: either ``(label, score)``, a tuple or list of an integer ``[N]`` and a floating ``[N]``: the target is
            `score` at class `label` and 0 elsewhere, and a label outside [0, C) is background; or a floating tensor of
            pred's shape, the target of every class. Scores are IoUs in [0, 1].
        weight: ``[N]`` (``[N, …]`` for ``[N, C, …]``), multiplies the loss of each row.
        beta: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by N. A number, or a tensor
            of one element, which is not read by the host.
        activated: `pred` holds probabilities.

    Returns:
        ``[N]`` (``[N, …]``) for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, the scores and `weight`; the modulating factor is part of it.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. N = 0 gives 0 for "sum" and
        with an `avg_factor`, still attached to the graph, and NaN for a plain mean, as torch's own losses. Differs from
        mmdet's in refusing a ``[N, 1]`` weight, which there becomes N×N.
    """
    op = "quality_focal_loss"
    checks.tensor(op, "pred", pred)
    beta = checks.number(op, "beta", beta, 0, dtype=accumulator(pred.dtype))
    return row_loss(op, QFL, [beta], pred, target, weight, reduction, avg_factor, activated)
