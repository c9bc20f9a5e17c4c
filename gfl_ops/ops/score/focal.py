# SPDX-License-Identifier: Apache-2.0
"""Focal loss: binary cross entropy in which easy elements count little."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator
from ...core.registry import Sample
from .score_loss import check_element_target, element_loss, element_samples, score_spec
from .terms import binary_cross_entropy, finite_power


def term(pred: Tensor, target: Tensor, gamma: float, alpha: float, activated: bool) -> Tensor:
    """Linear in a soft target."""
    p, loss = binary_cross_entropy(pred, target, activated)
    loss = loss * finite_power((1 - p) * target + p * (1 - target), gamma)
    return loss * (alpha * target + (1 - alpha) * (1 - target)) if alpha >= 0 else loss


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, target, activated in element_samples(device, dtype, generator):
        yield Sample(name, (pred, None, target, [2.0, 0.25], activated))
        if name.endswith("7x3"):
            yield Sample(f"gamma1.5-{name}", (pred, None, target, [1.5, 0.6], activated))
            # The root of 1 - p_t has no bounded derivative at 0, where a last bit of p decides all of the gradient.
            inside = 0.1 + 0.8 * target if name.startswith("soft") else target
            yield Sample(f"gamma0.5-{name}", (pred, None, inside, [0.5, 0.25], activated))
            yield Sample(f"unbalanced-{name}", (pred, None, target, [2.0, -1.0], activated))


FOCAL = score_spec("focal", term, samples, "focal loss, element by element", "sigmoid_focal_loss", summed=False)


def focal_loss(
    op: str,
    names: tuple[str, str],
    pred: Tensor,
    target: Tensor,
    alpha: float,
    gamma: float,
    activated: bool,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
) -> Tensor:
    """The loss after the checks; `names` are what the caller calls the two, `weight` broadcasts to pred's shape."""
    check_element_target(op, names, pred, target)
    acc = accumulator(pred.dtype)
    params = [checks.number(op, "gamma", gamma, 0, dtype=acc), checks.number(op, "alpha", alpha, dtype=acc)]
    return element_loss(op, FOCAL, params, pred, target, weight, reduction, avg_factor, activated)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    r"""Focal loss of logits against a target of the same shape; torchvision's signature.

    .. math:: L(x, t) = \alpha_t (1 - p_t)^\gamma \; \mathrm{BCE}(\sigma(x), t), \quad
        p_t = pt + (1 - p)(1 - t), \; \alpha_t = \alpha t + (1 - \alpha)(1 - t), \; p = \sigma(x)

    Equation 5 of Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (arXiv 1708.02002).

    Args:
        inputs: fp32, fp16, bf16 or fp64 of any shape, logits. An infinite logit counts as the largest finite one.
        targets: of the same shape, any dtype: 1 for a positive, 0 for a negative; values between are taken too.
        alpha: balance of positives against negatives, usually in [0, 1]; below 0 for none.
        gamma: exponent of the modulating factor, >= 0.
        reduction: "none", "mean" (over all elements) or "sum".

    Returns:
        The shape of `inputs` for "none", else a scalar; fp32, or fp64 for fp64 `inputs`.

    The gradient reaches `inputs` and `targets`; the modulating factor is part of it.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above.

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. Empty input gives 0 for
        "sum" and NaN for "mean". mmdet's form, with labels, weights and an average factor, is the module `FocalLoss`.
    """
    op = "sigmoid_focal_loss"
    checks.choice(op, "reduction", reduction, checks.REDUCTIONS)
    return focal_loss(op, ("inputs", "targets"), inputs, targets, alpha, gamma, False, None, reduction, None)
