# SPDX-License-Identifier: Apache-2.0
"""Quality focal loss: classification against a soft target, the localisation quality of the box."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype, clamp_infinite, device_type
from ...core.random_inputs import normal, uniform
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import OpSpec, Sample, register
from .score_loss import QUALITY, score_loss


def binary_cross_entropy(pred: Tensor, target: Tensor, activated: bool) -> tuple[Tensor, Tensor]:
    """Probability and element-wise binary cross entropy of logits, or of probabilities if `activated`."""
    if not activated:
        pred = clamp_infinite(pred)
        # −log q and −log p, between them by the target: one of them alone is a one-hot target's loss. torch's own takes
        # (1 − t)x − log p, where two terms of x's size leave the e^x of a logit far below 0. Linear above 40, where
        # fp64 does not tell log(1 + e^x) from x.
        negative, positive = (F.softplus(x, threshold=40.0) for x in (pred, -pred))
        return pred.sigmoid(), torch.lerp(negative, positive, target)
    # torch's own cross entropy stops the program where input or target leave [0, 1], refuses autocast, and floors the
    # logarithms at −100 in the value but not in its derivative by the target, infinite where a bf16 sigmoid saturates.
    # It is linear in the target, so that the two ends of the line serve any target, floored in both.
    valid = (pred >= 0) & (pred <= 1)
    with torch.autocast(pred.device.type, enabled=False):
        inside = torch.where(valid, pred, 0.5)
        positive = F.binary_cross_entropy(inside, torch.ones_like(inside), reduction="none")
        negative = F.binary_cross_entropy(inside, torch.zeros_like(inside), reduction="none")
        loss = target * positive + (1 - target) * negative
    # Multiplied, not chosen by `where`, whose other branch would hand NaN to every gradient.
    return pred, loss * torch.where(valid, 1.0, float("nan"))


def absolute_power(difference: Tensor, exponent: float) -> Tensor:
    """|difference|^exponent, with derivative 0 at 0 also for exponents below 1."""
    return finite_power(difference.abs(), exponent)


def finite_power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent with derivative 0 at 0; subnormal bases, where the derivative would overflow, count as 0."""
    zero = base.abs() < torch.finfo(base.dtype).tiny
    return torch.where(zero, 0.0 if exponent > 0 else 1.0, torch.where(zero, 1.0, base).pow(exponent))


def reference(pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool) -> Tensor:
    """Dense formula in fp32, or in fp64 for fp64 input; a sparse target is written out first."""
    x = pred.to(accumulator(pred.dtype))
    if label is not None:
        classes = torch.arange(pred.shape[1], device=pred.device)
        target = torch.where(label[:, None] == classes, target[:, None], 0.0)
    p, loss = binary_cross_entropy(x, target, activated)
    return (absolute_power(target - p, beta) * loss).sum(1)


def fake(pred: Tensor, label: Tensor | None, target: Tensor, beta: float, activated: bool) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=accumulator(pred.dtype))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)
    for n, c in ((0, 80), (1, 1), (7, 3), (129, 80), (1025, 20)):
        pred = normal((n, c), device, dtype, generator, scale=3.0)
        # Background comes as C, as −1 and as anything else outside [0, C).
        label = torch.randint(-2, c + 3, (n,), generator=generator).to(device)
        score = uniform((n,), device, acc, generator)
        yield Sample(f"sparse-n{n}-c{c}", (pred, label, score, 2.0, False))
        if n in (7, 129):
            yield Sample(f"strided-n{n}", (normal((c, n), device, dtype, generator).t(), label, score, 2.0, False))
            yield Sample(f"beta1.5-n{n}", (pred, label, score, 1.5, False))
            # Below 1 the derivative grows without bound at score = σ, and with it every rounding: stay a tenth away.
            sigmoid = pred.sigmoid().gather(1, label.clamp(0, c - 1)[:, None])[:, 0].to(acc)
            apart = (sigmoid + uniform((n,), device, acc, generator, 0.1, 0.9)) % 1.0
            yield Sample(f"beta0.5-n{n}", (pred, label, apart, 0.5, False))
            yield Sample(f"all-background-n{n}", (pred, torch.full_like(label, c), score, 2.0, False))
            yield Sample(f"activated-n{n}", (pred.sigmoid(), label, score, 2.0, True))
            dense = uniform((n, c), device, acc, generator)
            yield Sample(f"dense-n{n}", (pred, None, dense, 2.0, False))
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0]], device=device).to(dtype)
    label = torch.tensor([0, 2], device=device)
    yield Sample("extreme", (extreme, label, uniform((2,), device, acc, generator), 2.0, False))


QFL = register(
    OpSpec(
        stem="qfl",
        schema="(Tensor pred, Tensor? label, Tensor target, float beta, bool activated) -> Tensor",
        reference=reference,
        fake=fake,
        samples=samples,
        summary="quality focal loss, summed over the classes",
        public=("quality_focal_loss",),
        differentiable=("pred", "target"),
    )
)


def quality_focal_loss(
    pred: Tensor,
    target: Tensor | tuple[Tensor, Tensor] | list[Tensor],
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
    checks.number(op, "beta", beta, 0)
    acc = accumulator(pred.dtype)
    if isinstance(target, (tuple, list)):
        checks.shape(op, "pred", pred, "[N, C]", (None, None))
        if len(target) != 2:
            rule = "must be (label, score) or one tensor"
            raise ValueError(checks.message(op, "target", rule, f"{len(target)} items"))
        label, score = target
        checks.tensor(op, "target[0]", label, checks.INTEGER)
        checks.tensor(op, "target[1]", score)
        rows = pred.shape[:1]
        for name, value in (("target[0]", label), ("target[1]", score)):
            checks.shape(op, name, value, "[N]", rows)
            checks.same_device(op, name, value, "pred", pred)
        check_reduction(op, rows, "[N]", pred, weight, reduction, avg_factor)
        arguments = (pred, as_dtype(label, torch.int64), as_dtype(score, acc))
        reduced = score_loss("qfl", QUALITY, *arguments, 1.0, float(beta), activated, weight, reduction, avg_factor)
        if reduced is not None:
            return reduced
        loss = QFL(device_type(pred), *arguments, float(beta), activated)
        return reduce_loss(loss, weight, reduction, avg_factor)

    if pred.dim() < 2:
        raise ValueError(checks.message(op, "pred", "must have shape [N, C, …]", list(pred.shape)))
    checks.tensor(op, "target", target)
    checks.shape(op, "target", target, "[N, C]" if pred.dim() == 2 else "[N, C, …]", tuple(pred.shape))
    checks.same_device(op, "target", target, "pred", pred)
    rows = pred.shape[:1] + pred.shape[2:]
    check_reduction(op, rows, "[N]" if pred.dim() == 2 else "[N, …]", pred, weight, reduction, avg_factor)
    if pred.numel() > 0:
        planes, targets = (pred, target) if pred.dim() == 2 else (pred.flatten(2), target.flatten(2))
        flat_weight = weight if weight is None or pred.dim() == 2 else weight.flatten(1)
        constants = (1.0, float(beta), activated)
        reduced = score_loss(
            "qfl", QUALITY, planes, None, targets.to(acc), *constants, flat_weight, reduction, avg_factor
        )
        if reduced is not None:
            return reduced
    flat_pred = pred.movedim(1, -1).reshape(-1, pred.shape[1])
    flat_target = target.movedim(1, -1).reshape(-1, pred.shape[1]).to(acc)
    loss = QFL(device_type(pred), flat_pred, None, flat_target, float(beta), activated).reshape(rows)
    return reduce_loss(loss, weight, reduction, avg_factor)
