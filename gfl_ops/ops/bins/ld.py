# SPDX-License-Identifier: Apache-2.0
"""Distillation of distributions with a temperature: of a box's sides, or of classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype
from ...core.random_inputs import normal
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import OpSpec, Sample, register
from .integral import bounded_logits, fake_rows


def reference(pred: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence by log-softmax, in fp32 or in fp64 for fp64 input; the teacher is constant."""
    share = min(temperature, 1.0)
    log_p = (bounded_logits(pred, share) / temperature).log_softmax(1)
    log_q = (bounded_logits(teacher.detach().to(log_p.dtype), share) / temperature).log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1) * (temperature * temperature / pred.shape[1])


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for m, bins in ((0, 17), (1, 2), (7, 17), (129, 33), (1025, 8), (5, 1), (7, 80), (3, 1203)):
        pair = [normal((m, bins), device, dtype, generator, scale=3.0) for _ in range(2)]
        yield Sample(f"m{m}-n{bins}", (*pair, 10.0))
    pair = [normal((31, 17), device, dtype, generator, scale=3.0) for _ in range(2)]
    yield Sample("temperature1", (*pair, 1.0))
    yield Sample("temperature0.5", (*pair, 0.5))
    yield Sample("equal", (pair[0], pair[0].clone(), 5.0))
    yield Sample("strided", (normal((17, 31), device, dtype, generator).t(), pair[1], 10.0))
    wide = [normal((9, 200), device, dtype, generator, scale=3.0)[:, i : i + 91] for i in (0, 101)]
    yield Sample("sliced", (*wide, 2.0))
    yield Sample("strided-n91", (wide[0], normal((91, 9), device, dtype, generator).t(), 2.0))
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0], [-6e4, -6e4, -6e4]], device=device).to(dtype)
    yield Sample("extreme", (extreme, extreme.flip(1), 2.0))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for m, bins in ((20_011, 17), (5, 2501)):
        pair = [normal((m, bins), device, dtype, generator, scale=3.0) for _ in range(2)]
        yield Sample(f"m{m}-n{bins}", (*pair, 10.0))


def _magnitude(pred: Tensor, teacher: Tensor, temperature: float) -> float:
    """Terms of both signs cancel in a divergence: log-probabilities times T²."""
    if not pred.numel():
        return 1.0
    largest = max(float(x.detach().double().abs().max()) for x in (pred, teacher))
    return max(1.0, temperature * temperature, temperature * largest)


LD = register(
    OpSpec(
        stem="ld",
        schema="(Tensor pred, Tensor teacher, float temperature) -> Tensor",
        reference=reference,
        fake=fake_rows,
        samples=samples,
        large=large,
        summary="distillation of distributions with a temperature",
        public=("distillation_loss",),
        differentiable=("pred",),
        triton="bins",
        magnitude=_magnitude,
    )
)


def distillation_loss(
    pred: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    temperature: float = 10.0,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    r"""Divergence of a teacher's distribution from the student's, both softened by a temperature.

    .. math:: L = \frac{T^2}{n} \sum_j q_j \log \frac{q_j}{p_j}, \qquad
        p = \mathrm{softmax}(x / T),\; q = \mathrm{softmax}(z / T)

    Over the bins of a box's side this is localisation distillation, Zheng et al., CVPR 2022 (arXiv 2102.12252); over
    classes it is Hinton's (arXiv 1503.02531). The mean over the n entries is mmdet's.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[M, n]``, the student's logits; n from 1, any strides. A logit beyond a quarter
            of fp32's range (8.5e37, times T where that is below 1; an infinite one too) counts as that, without
            gradient.
        teacher: floating ``[M, n]``, the teacher's logits, bounded likewise. If its dtype is not that of `pred`, both
            are widened first.
        weight: ``[M]``, multiplies the loss of each row.
        temperature: T > 0.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by M. A number, or a tensor
            of one element, which is not read by the host.

    Returns:
        ``[M]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred` and `weight`, not `teacher`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or number outside the above; an `avg_factor` with "sum".

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. M = 0 gives 0 for "sum" and
        with an `avg_factor`, still attached to the graph, and NaN for a plain mean, as torch's own losses.
    """
    op = "distillation_loss"
    checks.tensor(op, "pred", pred)
    if pred.dim() != 2 or pred.shape[1] < 1:
        raise ValueError(checks.message(op, "pred", "must have shape [M, n] with n >= 1", list(pred.shape)))
    checks.tensor(op, "teacher", teacher)
    checks.shape(op, "teacher", teacher, "[M, n]", tuple(pred.shape))
    checks.same_device(op, "teacher", teacher, "pred", pred)
    temperature = checks.number(op, "temperature", temperature, 0, exclusive=True, dtype=accumulator(pred.dtype))
    avg_factor = check_reduction(op, pred.shape[:1], "[M]", pred, weight, reduction, avg_factor)
    teacher = teacher.detach()
    if teacher.dtype != pred.dtype:
        acc = accumulator(pred.dtype)
        pred, teacher = as_dtype(pred, acc), as_dtype(teacher, acc)
    loss = LD(pred.device.type, pred, teacher, temperature)
    return reduce_loss(loss, weight, reduction, avg_factor)
