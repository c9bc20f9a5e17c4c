# SPDX-License-Identifier: Apache-2.0
"""Integral: the expectation of a discrete distribution over bins, read as a distance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, device_type
from ...core.random_inputs import normal
from ...core.registry import OpSpec, Sample, register

# The kernels hold whole rows of bins on chip; published models use 17 bins.
MAX_REG_MAX = 128


def bounded_logits(pred: Tensor, share: float = 1.0) -> Tensor:
    """Logits in the accumulator dtype, clamped to a quarter of its range without gradient beyond; NaN stays.

    No difference of two such logits overflows, so an infinite or huge logit never makes a NaN of 0 · ∞. Logits that are
    to be divided by a number below 1 are clamped to that `share` of it.
    """
    x = pred.to(accumulator(pred.dtype))
    limit = torch.finfo(x.dtype).max / 4 * share
    # Not clamp, whose gradient is 0 at NaN.
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def expectation(logits: Tensor) -> Tensor:
    """Sum of p(j)·j over the last dimension, p the softmax of bounded logits."""
    bins = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    # Not a matrix product: autocast and TF32 would round the probabilities.
    return (logits.softmax(-1) * bins).sum(-1)


def reference(pred: Tensor, reg_max: int) -> Tensor:
    return expectation(bounded_logits(pred).unflatten(-1, (4, reg_max + 1)))


def fake_sides(pred: Tensor, *_: Any) -> Tensor:
    """Four numbers per location."""
    return pred.new_empty((*pred.shape[:-1], 4), dtype=accumulator(pred.dtype))


def fake_rows(pred: Tensor, *_: Any) -> Tensor:
    """One number per row."""
    return pred.new_empty(pred.shape[0], dtype=accumulator(pred.dtype))


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    for shape, reg_max in (((0,), 16), ((1,), 1), ((33,), 16), ((5,), 7), ((2, 3), 128), ((), 4), ((2, 2, 3), 16)):
        pred = normal((*shape, 4 * (reg_max + 1)), device, dtype, generator, scale=3.0)
        yield Sample(f"shape{'x'.join(map(str, shape)) or 'scalar'}-r{reg_max}", (pred, reg_max))
    maps = normal((2, 68, 3, 5), device, dtype, generator, scale=3.0)
    yield Sample("nchw-view", (maps.permute(0, 2, 3, 1), 16))
    yield Sample("flattened-nchw-view", (maps.flatten(2).transpose(1, 2), 16))
    yield Sample("channel-slice", (normal((9, 80), device, dtype, generator)[:, 3:71], 16))
    # No single stride walks over two leading dimensions of this view.
    yield Sample("scattered", (normal((3, 4, 5, 16), device, dtype, generator).permute(2, 0, 1, 3)[::2, :, ::2], 3))
    extreme = torch.tensor([1e4, -1e4, 0.0, 6e4, -6e4, 1.0, 1e4, 1e4], dtype=torch.float64)
    yield Sample("extreme", (extreme.to(device=device, dtype=dtype)[None], 1))


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    yield Sample("n20011-r16", (normal((20_011, 68), device, dtype, generator, scale=3.0), 16))


def rms_deviation(reg_max: int) -> float:
    """Root mean square of j − ŷ over R+1 equally likely bins, at least 1: what rounding is measured against."""
    return max(1.0, 0.29 * reg_max)


INTEGRAL = register(
    OpSpec(
        stem="integral",
        schema="(Tensor pred, int reg_max) -> Tensor",
        reference=reference,
        fake=fake_sides,
        samples=samples,
        large=large,
        summary="expected distance of four distributions over bins",
        public=("integral",),
        differentiable=("pred",),
        triton="bins",
        magnitude=lambda pred, reg_max: rms_deviation(reg_max),
    )
)


def check_reg_max(op: str, argument: str, reg_max: object) -> int:
    found: int = checks.number(op, argument, reg_max, 1, integer=True)
    if found > MAX_REG_MAX:
        raise NotImplementedError(checks.message(op, argument, f"must be <= {MAX_REG_MAX}", found))
    return found


def check_distributions(op: str, pred: Tensor, reg_max: object) -> int:
    """`pred` is floating ``[…, 4(R+1)]``. Returns R."""
    checks.tensor(op, "pred", pred)
    found = check_reg_max(op, "reg_max", reg_max)
    if pred.dim() < 1 or pred.shape[-1] != 4 * (found + 1):
        rule = f"must have shape […, 4(R+1)] = […, {4 * (found + 1)}]"
        raise ValueError(checks.message(op, "pred", rule, list(pred.shape)))
    return found


def integral(pred: Tensor, reg_max: int) -> Tensor:
    r"""Expected distance to the four sides of a box, each from its distribution over R+1 bins.

    .. math:: \hat y = \sum_{j=0}^{R} \mathrm{softmax}(x)_j \, j

    Equation 5 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), with unit bins.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[…, 4(R+1)]``, logits; sides in the order left, top, right, bottom, each
            side's bins next to each other. Any strides; a permuted view of ``[B, 4(R+1), H, W]`` is read in place. A
            logit beyond a quarter of fp32's range (8.5e37; an infinite one too) counts as that, without gradient.
        reg_max: R, 1 to 128.

    Returns:
        ``[…, 4]`` distances in bins, 0 to R, in fp32 (fp64 for fp64 `pred`), since they go on into box arithmetic.

    The gradient reaches `pred`.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape or number outside the above.
        NotImplementedError: `reg_max` above 128.

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says: mmdet's Integral rounds the probabilities to the
        input's dtype. Repeatable bit for bit. Empty input gives an empty result, attached to the graph.
    """
    reg_max = check_distributions("integral", pred, reg_max)
    return INTEGRAL(device_type(pred), pred, reg_max)
