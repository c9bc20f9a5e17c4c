# SPDX-License-Identifier: Apache-2.0
"""Varifocal loss: positives weighted by their quality, negatives by how wrong they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.reduction import check_element_reduction
from ...core.registry import Sample
from .score_loss import check_element_target, element_loss, element_samples, score_spec
from .terms import absolute_power, binary_cross_entropy


def term(pred: Tensor, target: Tensor, gamma: float, alpha: float, iou_weighted: float, activated: bool) -> Tensor:
    p, loss = binary_cross_entropy(pred, target, activated)
    positive = target if iou_weighted else torch.ones_like(target)
    return torch.where(target > 0, positive, alpha * absolute_power(p - target, gamma)) * loss


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, target, activated in element_samples(device, dtype, generator):
        # At a target of 0 the loss has a step that numerical differences of gradcheck would cross: a little below it.
        yield Sample(f"tie-{name}", (pred, None, target, [2.0, 0.75, 1.0], activated))
        if name.endswith("7x3"):
            apart = torch.where(target > 0, target, -0.01)
            yield Sample(name, (pred, None, apart, [2.0, 0.75, 1.0], activated))
            yield Sample(f"gamma1.5-{name}", (pred, None, apart, [1.5, 0.4, 1.0], activated))
            yield Sample(f"gamma0.5-{name}", (pred, None, apart, [0.5, 0.75, 1.0], activated))
            yield Sample(f"unweighted-{name}", (pred, None, apart, [2.0, 0.75, 0.0], activated))


VFL = score_spec("vfl", term, samples, "varifocal loss, element by element", "varifocal_loss", summed=False)


def varifocal_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    activated: bool = False,
) -> Tensor:
    r"""Varifocal loss of class scores against an IoU-aware target of the same shape.

    .. math:: L(x, t) = \begin{cases} t \; \mathrm{BCE}(\sigma(x), t) & t > 0 \\
        \alpha |\sigma(x) - t|^\gamma \; \mathrm{BCE}(\sigma(x), t) & t \le 0 \end{cases}

    Equation 2 of Zhang et al., VarifocalNet, CVPR 2021 (arXiv 2008.13367).

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[N, C]`` or of any shape, logits; probabilities in [0, 1] if `activated` (NaN
            outside). An infinite logit counts as the largest finite one.
        target: of pred's shape, any dtype: the IoU at the class of a positive, 0 elsewhere.
        weight: of pred's shape, or ``[N]`` or ``[N, 1]`` for every element of a row; multiplies the loss.
        alpha: weight of the negatives, >= 0.
        gamma: exponent of the negatives' modulating factor, >= 0.
        iou_weighted: a positive counts by its target; else by 1.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by the number of elements.
            A number, or a tensor of one element, which is not read by the host.
        activated: `pred` holds probabilities.

    Returns:
        pred's shape for "none", without a sum over the classes, else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, `target` and `weight`; the modulating factor is part of it.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. N = 0 gives 0 for "sum" and
        with an `avg_factor`, still attached to the graph, and NaN for a plain mean, as torch's own losses. Differs from
        mmdet's in that a ``[N]`` weight is one of the rows, where there it is stretched over the classes if N = C.
    """
    op = "varifocal_loss"
    check_element_target(op, ("pred", "target"), pred, target)
    acc = accumulator(pred.dtype)
    alpha, gamma = (checks.number(op, n, v, 0, dtype=acc) for n, v in (("alpha", alpha), ("gamma", gamma)))
    weight, avg_factor = check_element_reduction(op, pred, weight, reduction, avg_factor)
    params = [gamma, alpha, float(checks.flag(op, "iou_weighted", iou_weighted))]
    return element_loss(op, VFL, params, pred, target, weight, reduction, avg_factor, activated)
