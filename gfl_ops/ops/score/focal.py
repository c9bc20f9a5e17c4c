# SPDX-License-Identifier: Apache-2.0
"""Focal loss: binary cross entropy in which easy elements count little."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, device_type
from ...core.random_inputs import normal, uniform
from ...core.reduction import reduce_loss
from ...core.registry import OpSpec, Sample, register
from .qfl import binary_cross_entropy, finite_power
from .score_loss import FOCAL as FOCAL_KIND
from .score_loss import score_loss

TARGETS = checks.FLOATING + checks.INTEGER + (torch.bool,)


def reference(pred: Tensor, target: Tensor, alpha: float, gamma: float, activated: bool) -> Tensor:
    """The formula, linear in a soft target, in fp32, or in fp64 for fp64 input."""
    p, loss = binary_cross_entropy(pred.to(accumulator(pred.dtype)), target, activated)
    miss = (1 - p) * target + p * (1 - target)
    loss = loss * finite_power(miss, gamma)
    if alpha >= 0:
        loss = loss * (alpha * target + (1 - alpha) * (1 - target))
    return loss.contiguous()


def fake(pred: Tensor, target: Tensor, alpha: float, gamma: float, activated: bool) -> Tensor:
    return pred.new_empty(pred.shape, dtype=accumulator(pred.dtype))


def element_samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """(id, pred, soft target, activated) of a loss that looks at each element by itself."""
    acc = accumulator(dtype)
    for shape in ((0, 80), (1, 1), (7, 3), (129, 4), (1025, 20), (2, 5, 3, 7)):
        name = "x".join(map(str, shape))
        pred = normal(shape, device, dtype, generator, scale=3.0)
        positive = uniform(shape, device, acc, generator) < 0.2
        target = uniform(shape, device, acc, generator, 0.05) * positive
        yield f"soft-{name}", pred, target, False
        if shape[0] not in (7, 129):
            continue
        yield f"one-hot-{name}", pred, positive.to(acc), False
        yield f"all-negative-{name}", pred, torch.zeros_like(target), False
        yield f"all-positive-{name}", pred, torch.ones_like(target), False
        yield f"strided-{name}", normal(shape[::-1], device, dtype, generator).t(), target, False
        # Away from 0 and 1, where logarithms and denominators of probabilities have their floors.
        yield f"activated-{name}", uniform(shape, device, dtype, generator, 0.02, 0.98), target, True
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0]], device=device).to(dtype)
    yield "extreme", extreme, torch.tensor([[1, 0, 1], [1, 0.5, 0]], device=device, dtype=acc), False


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for name, pred, target, activated in element_samples(device, dtype, generator):
        yield Sample(name, (pred, target, 0.25, 2.0, activated))
        if name.endswith("7x3"):
            yield Sample(f"gamma1.5-{name}", (pred, target, 0.6, 1.5, activated))
            # The root of 1 - p_t has no bounded derivative at 0, where a last bit of p decides all of the gradient.
            inside = 0.1 + 0.8 * target if name.startswith("soft") else target
            yield Sample(f"gamma0.5-{name}", (pred, inside, 0.25, 0.5, activated))
            yield Sample(f"unbalanced-{name}", (pred, target, -1.0, 2.0, activated))


FOCAL = register(
    OpSpec(
        stem="focal",
        schema="(Tensor pred, Tensor target, float alpha, float gamma, bool activated) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="focal loss, element by element",
        public=("sigmoid_focal_loss",),
        differentiable=("pred", "target"),
    )
)


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
    checks.tensor(op, names[0], pred)
    checks.tensor(op, names[1], target, TARGETS)
    if target.shape != pred.shape:
        raise ValueError(
            checks.message(op, names[1], f"must have the shape of `{names[0]}`, {list(pred.shape)}", list(target.shape))
        )
    checks.same_device(op, names[1], target, names[0], pred)
    checks.number(op, "gamma", gamma, 0)
    if alpha != -1:
        checks.number(op, "alpha", alpha, 0, 1)
    target, constants = target.to(accumulator(pred.dtype)), (float(alpha), float(gamma), activated)
    reduced = score_loss("focal", FOCAL_KIND, pred, None, target, *constants, weight, reduction, avg_factor)
    if reduced is not None:
        return reduced
    return reduce_loss(FOCAL(device_type(pred), pred, target, *constants), weight, reduction, avg_factor)


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
        alpha: balance of positives against negatives in [0, 1]; −1 for none.
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
