# SPDX-License-Identifier: Apache-2.0
"""Distribution focal loss: a distribution over bins against a position between two of them, against two given bins, or
together with the expected distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype, clamp_passing_grad, device_type
from ...core.random_inputs import normal, uniform
from ...core.reduction import check_reduction, reduce_loss
from ...core.registry import SPECS, OnePass, OpSpec, Sample, register
from . import kept_softmax
from .integral import bounded_logits, check_reg_max, expectation, fake_rows, rms_deviation

OUT_OF_RANGE = ("clamp", "ignore", "error")


def two_bin_cross_entropy(
    logits: Tensor, left: Tensor, right: Tensor, weight_left: Tensor, weight_right: Tensor
) -> Tensor:
    log_p = logits.log_softmax(-1)
    at_left = log_p.gather(1, left[:, None]).squeeze(1)
    at_right = log_p.gather(1, right[:, None]).squeeze(1)
    return -(at_left * weight_left + at_right * weight_right)


def reference(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> Tensor:
    """Log-softmax and two gathers, in fp32 or in fp64 for fp64 input."""
    reg_max = pred.shape[1] - 1
    counted = (target >= 0) & (target <= reg_max) if ignore_out_of_range else ~target.isnan()
    # Masked before the softmax: a row that doesn't count has no gradient, whatever its logits are.
    logits = torch.where(counted[:, None], bounded_logits(pred), 0.0)
    position = clamp_passing_grad(torch.where(counted, target, 0.0), 0.0, reg_max)
    left = position.detach().long().clamp(max=reg_max - 1)
    loss = two_bin_cross_entropy(logits, left, left + 1, left + 1 - position, position - left)
    return torch.where(counted, loss, 0.0)


def reference_two_bin(pred: Tensor, left: Tensor, weight_left: Tensor, weight_right: Tensor) -> Tensor:
    """The same with bins and weights given; each bin is moved to the nearest that exists."""
    reg_max = pred.shape[1] - 1
    # The first clamp keeps left + 1 from overflowing.
    right = (left.clamp(-1, reg_max) + 1).clamp(max=reg_max)
    return two_bin_cross_entropy(bounded_logits(pred), left.clamp(0, reg_max), right, weight_left, weight_right)


def reference_integral(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> tuple[Tensor, Tensor]:
    return reference(pred, target, ignore_out_of_range), expectation(bounded_logits(pred))


def fake_integral(pred: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_rows(pred), fake_rows(pred)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)
    for m, bins in ((0, 17), (1, 2), (7, 17), (129, 17), (1025, 8), (65, 129)):
        pred = normal((m, bins), device, dtype, generator, scale=3.0)
        target = uniform((m,), device, acc, generator, 0.0, bins - 1.0)
        yield Sample(f"m{m}-r{bins - 1}", (pred, target, False))
    pred = normal((31, 17), device, dtype, generator, scale=3.0)
    beyond = uniform((31,), device, acc, generator, -8.0, 24.0)
    yield Sample("clamp", (pred, beyond, False))
    yield Sample("ignore", (pred, beyond, True))
    target = uniform((31,), device, acc, generator, 0.0, 16.0)
    yield Sample("strided", (normal((17, 31), device, dtype, generator).t(), target, False))
    yield Sample("sliced", (normal((31, 40), device, dtype, generator)[:, 5:22], target, False))
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, -0.0], [-6e4, -6e4, -6e4]], device=device).to(dtype)
    yield Sample("extreme", (extreme, uniform((3,), device, acc, generator, 0.0, 2.0), False))


def samples_two_bin(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)
    for m, bins in ((0, 17), (1, 2), (7, 33), (129, 17), (65, 129)):
        pred = normal((m, bins), device, dtype, generator, scale=3.0)
        # From two below the first bin to two above the last.
        left = torch.randint(-2, bins + 2, (m,), generator=generator).to(device)
        # The weights of non-uniform bins need not add up to 1.
        weights = [uniform((m,), device, acc, generator, 0.0, 1.5) for _ in range(2)]
        yield Sample(f"m{m}-r{bins - 1}", (pred, left, *weights))
    left = torch.randint(0, 16, (31,), generator=generator).to(device)
    right_weight = uniform((31,), device, acc, generator)
    pred = normal((17, 31), device, dtype, generator, scale=3.0).t()
    yield Sample("strided", (pred, left, 1 - right_weight, right_weight))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    pred = normal((20_011, 17), device, dtype, generator, scale=3.0)
    yield Sample("m20011-r16", (pred, uniform((20_011,), device, accumulator(dtype), generator, 0.0, 16.0), False))


def large_two_bin(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for sample in large(device, dtype, generator):
        pred, position, _ = sample.args
        left = position.long()
        yield Sample(sample.id, (pred, left, left + 1 - position, position - left))


def _one_pass(stem: str) -> OnePass:
    def function(pred: Tensor, target: Tensor, ignore_out_of_range: bool) -> Any:
        found = kept_softmax.dfl(stem, pred, target, ignore_out_of_range, None, "none", None)
        return SPECS[stem](device_type(pred), pred, target, ignore_out_of_range) if found is None else found

    return OnePass(function, ("pred",))


DFL = register(
    OpSpec(
        stem="dfl",
        schema="(Tensor pred, Tensor target, bool ignore_out_of_range) -> Tensor",
        reference=reference,
        fake=fake_rows,
        samples=samples,
        large=large,
        one_pass=_one_pass("dfl"),
        summary="distribution focal loss with unit bins",
        public=("distribution_focal_loss",),
        differentiable=("pred", "target"),
        triton="bins",
    )
)

DFL_TWO_BIN = register(
    OpSpec(
        stem="dfl_two_bin",
        schema="(Tensor pred, Tensor left, Tensor weight_left, Tensor weight_right) -> Tensor",
        reference=reference_two_bin,
        fake=fake_rows,
        samples=samples_two_bin,
        large=large_two_bin,
        summary="distribution focal loss with bins and weights given",
        public=("distribution_focal_loss",),
        differentiable=("pred", "weight_left", "weight_right"),
        triton="bins",
    )
)


DFL_INTEGRAL = register(
    OpSpec(
        stem="dfl_integral",
        schema="(Tensor pred, Tensor target, bool ignore_out_of_range) -> (Tensor, Tensor)",
        reference=reference_integral,
        fake=fake_integral,
        samples=samples,
        large=large,
        one_pass=_one_pass("dfl_integral"),
        summary="distribution focal loss and expected distance from one softmax",
        public=("dfl_integral",),
        differentiable=("pred", "target"),
        triton="bins",
        magnitude=lambda pred, target, ignore_out_of_range: rms_deviation(pred.shape[1] - 1),
    )
)


def check_bins(op: str, pred: Tensor) -> int:
    """`pred` is floating ``[M, R+1]``. Returns R."""
    checks.tensor(op, "pred", pred)
    if pred.dim() != 2 or pred.shape[1] < 2:
        rule = "must have shape [M, R+1] with R >= 1"
        raise ValueError(checks.message(op, "pred", rule, list(pred.shape)))
    reg_max = pred.shape[1] - 1
    check_reg_max(op, "pred.shape[1] - 1", reg_max)
    return reg_max


def check_position(op: str, target: Tensor, pred: Tensor, reg_max: int, out_of_range: str) -> None:
    """`target` is real ``[M]``; under "error" and GFL_OPS_CHECK=1 also within [0, R]."""
    checks.tensor(op, "target", target, checks.FLOATING + checks.INTEGER)
    checks.shape(op, "target", target, "[M]", pred.shape[:1])
    checks.same_device(op, "target", target, "pred", pred)
    checks.choice(op, "out_of_range", out_of_range, OUT_OF_RANGE)
    if out_of_range == "error" and checks.SYNCHRONISING:
        wrong = ~((target >= 0) & (target <= reg_max))
        _raise_for_first(op, "target", f"must lie in [0, R] = [0, {reg_max}]", target, wrong)


def _raise_for_first(op: str, argument: str, rule: str, value: Tensor, wrong: Tensor) -> None:
    rows = wrong.nonzero()
    if rows.numel() > 0:
        row = int(rows[0])
        raise ValueError(checks.message(op, argument, rule, f"{value[row].item()} at row {row}"))


def distribution_focal_loss(
    pred: Tensor,
    target: Tensor | Sequence[Tensor],
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: float | Tensor | None = None,
    out_of_range: str = "clamp",
) -> Tensor:
    r"""Distribution focal loss: cross entropy of the two bins around the target, weighted by their nearness.

    .. math:: L(x, y) = -(l+1-y) \log p_l - (y-l) \log p_{l+1}, \qquad p = \mathrm{softmax}(x),\; l = \lfloor y \rfloor

    Equation 6 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), with unit bins. The form with
    given bins is the fine-grained localisation loss of D-FINE (arXiv 2410.13842) without its IoU weight, which goes
    into `weight`.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[M, R+1]``, logits of the bins 0 to R, R from 1 to 128. A logit beyond a
            quarter of fp32's range (8.5e37; an infinite one too) counts as that, without gradient.
        target: real ``[M]``, positions in bins, [0, R]; at R the whole weight is on the last bin. Or a tuple or
            list ``(left, weight_left, weight_right)`` of an integer ``[M]``, the lower bin, and two floating ``[M]``,
            the weights of the bins `left` and `left` + 1.
        weight: ``[M]``, multiplies the loss of each row.
        reduction: "none", "mean" or "sum".
        avg_factor: with "mean", the sum is divided by ``avg_factor + 1.19e-07`` instead of by M. A number, or a tensor
            of one element, which is not read by the host.
        out_of_range: what a target below 0, above R or NaN means. "clamp": the nearest of 0 and R, without gradient to
            the target; NaN has zero loss and gradient. "ignore": zero loss and gradient, still counted in the mean.
            "error": ValueError, checked only under the environment variable ``GFL_OPS_CHECK=1``, since the host has to
            wait for it; else as "clamp". With given bins, a row is out of range if a bin whose weight is not 0 does not
            exist; "clamp" takes the nearest bin in its place.

    Returns:
        ``[M]`` for "none", else a scalar; fp32, or fp64 for fp64 `pred`.

    The gradient reaches `pred`, `target` (or the two weights of the bins) and `weight`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device, reduction or option outside the above; an `avg_factor` with "sum".
        NotImplementedError: more than 129 bins.

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. M = 0 gives 0 for "sum" and
        with an `avg_factor`, still attached to the graph, and NaN for a plain mean, as torch's own losses. mmdet's loss
        fails at a target of exactly R or above, and extrapolates between −1 and 0.
    """
    op = "distribution_focal_loss"
    if not isinstance(target, (tuple, list)):
        return _at_position(op, DFL, pred, target, weight, reduction, avg_factor, out_of_range)
    reg_max = check_bins(op, pred)
    if len(target) != 3:
        rule = "must be one tensor or (left, weight_left, weight_right)"
        raise ValueError(checks.message(op, "target", rule, f"{len(target)} items"))
    left, weight_left, weight_right = target
    checks.tensor(op, "target[0]", left, checks.INTEGER)
    checks.tensor(op, "target[1]", weight_left)
    checks.tensor(op, "target[2]", weight_right)
    for i, value in enumerate(target):
        checks.shape(op, f"target[{i}]", value, "[M]", pred.shape[:1])
        checks.same_device(op, f"target[{i}]", value, "pred", pred)
    checks.choice(op, "out_of_range", out_of_range, OUT_OF_RANGE)
    avg_factor = check_reduction(op, pred.shape[:1], "[M]", pred, weight, reduction, avg_factor)
    left = left.long()
    if out_of_range == "ignore" or (out_of_range == "error" and checks.SYNCHRONISING):
        no_left = ((left < 0) | (left > reg_max)) & (weight_left != 0)
        no_right = ((left < -1) | (left >= reg_max)) & (weight_right != 0)
        wrong = no_left | no_right
        if out_of_range == "error":
            _raise_for_first(op, "target[0]", f"and the bin after it must lie in [0, R] = [0, {reg_max}]", left, wrong)
        weight_left, weight_right = (torch.where(wrong, 0.0, w) for w in (weight_left, weight_right))
    acc = accumulator(pred.dtype)
    loss = DFL_TWO_BIN(device_type(pred), pred, left, weight_left.to(acc), weight_right.to(acc))
    return reduce_loss(loss, weight, reduction, avg_factor)


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
        target: real ``[M]``, positions in bins, [0, R].
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
    return _at_position("dfl_integral", DFL_INTEGRAL, pred, target, weight, reduction, avg_factor, out_of_range)


def _at_position(
    op: str,
    spec: OpSpec,
    pred: Tensor,
    target: Any,
    weight: Tensor | None,
    reduction: str,
    avg_factor: float | Tensor | None,
    out_of_range: str,
) -> Any:
    """The checked results of `spec`, DFL or DFL_INTEGRAL, with the loss reduced."""
    reg_max = check_bins(op, pred)
    check_position(op, target, pred, reg_max, out_of_range)
    avg_factor = check_reduction(op, pred.shape[:1], "[M]", pred, weight, reduction, avg_factor)
    arguments = (pred, as_dtype(target, accumulator(pred.dtype)), out_of_range == "ignore")
    results = kept_softmax.dfl(spec.stem, *arguments, weight, reduction, avg_factor)
    if results is not None:
        return results
    results = spec(device_type(pred), *arguments)
    if spec.results == 1:
        return reduce_loss(results, weight, reduction, avg_factor)
    loss, distance = results
    return reduce_loss(loss, weight, reduction, avg_factor), distance
