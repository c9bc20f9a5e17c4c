# SPDX-License-Identifier: Apache-2.0
"""Decode: from distributions over bins to boxes in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulator, as_dtype, device_type
from ...core.random_inputs import normal, uniform
from ...core.registry import OpSpec, Sample, register
from ..boxes.distance import box_of, check_coordinates, expand_to, limit_of
from .integral import bounded_logits, check_distributions, expectation, fake_sides, rms_deviation


def reference(pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: Tensor | None) -> Tensor:
    distance = expectation(bounded_logits(pred).unflatten(-1, (4, reg_max + 1))) * stride[..., None]
    return box_of(points, distance, max_shape)


def samples(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    acc = accumulator(dtype)

    def call(name: str, pred: Tensor, reg_max: int, clipped: bool) -> Sample:
        leading = pred.shape[:-1]
        points = uniform((*leading, 2), device, acc, generator, 0.0, 64.0)
        # Each location has the stride of its level in the pyramid.
        stride = (8 * 2 ** torch.randint(0, 5, leading, generator=generator)).to(device=device, dtype=acc)
        limit = uniform((*leading, 2), device, acc, generator, 40.0, 80.0) if clipped else None
        return Sample(name, (pred, points, stride, reg_max, limit))

    for shape, reg_max in (((0,), 16), ((1,), 1), ((7,), 16), ((33,), 16), ((65,), 7), ((3,), 128), ((), 3)):
        pred = normal((*shape, 4 * (reg_max + 1)), device, dtype, generator, scale=3.0)
        name = f"shape{'x'.join(map(str, shape)) or 'scalar'}-r{reg_max}"
        yield call(name, pred, reg_max, False)
        yield call(f"{name}-clipped", pred, reg_max, True)
    maps = normal((2, 68, 3, 5), device, dtype, generator, scale=3.0)
    yield call("nchw-view", maps.permute(0, 2, 3, 1), 16, True)
    # One grid of points for the batch, one stride for all, one limit per image.
    pred = normal((2, 68, 35), device, dtype, generator, scale=3.0).transpose(1, 2)
    points = uniform((35, 2), device, acc, generator, 0.0, 64.0).expand(2, 35, 2)
    stride = torch.full((), 8.0, dtype=acc, device=device).expand(2, 35)
    limit = uniform((2, 1, 2), device, acc, generator, 40.0, 80.0).expand(2, 35, 2)
    yield Sample("broadcast", (pred, points, stride, 16, limit))
    yield call("scattered", normal((3, 4, 5, 16), device, dtype, generator).permute(2, 0, 1, 3)[::2, :, ::2], 3, True)


def large(device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Sample]:
    pred = normal((20_011, 68), device, dtype, generator, scale=3.0)
    points = uniform((20_011, 2), device, accumulator(dtype), generator, 0.0, 640.0)
    limit = torch.full_like(points, 600.0)
    yield Sample("n20011-r16", (pred, points, torch.full_like(points[:, 0], 8.0), 16, limit))


def _magnitude(pred: Tensor, points: Tensor, stride: Tensor, reg_max: int, max_shape: Tensor | None) -> float:
    return rms_deviation(reg_max) * float(stride.max()) if stride.numel() > 0 else 1.0


DECODE = register(
    OpSpec(
        stem="decode",
        schema="(Tensor pred, Tensor points, Tensor stride, int reg_max, Tensor? max_shape) -> Tensor",
        reference=reference,
        fake=fake_sides,
        samples=samples,
        large=large,
        summary="boxes from distributions over bins",
        public=("decode",),
        differentiable=("pred", "points"),
        triton="bins",
        magnitude=_magnitude,
    )
)


def decode(
    pred: Tensor,
    points: Tensor,
    stride: float | Tensor,
    reg_max: int = 16,
    max_shape: Tensor | Sequence[float] | None = None,
) -> Tensor:
    r"""Boxes from the distributions of a head: softmax, expected distance, stride, box and clipping in one kernel.

    .. math:: (x_1, y_1, x_2, y_2) = (x - s d_l,\; y - s d_t,\; x + s d_r,\; y + s d_b), \qquad
              d = \sum_{j=0}^{R} \mathrm{softmax}(x)_j \, j

    Equation 5 of Li et al., Generalized Focal Loss, NeurIPS 2020 (arXiv 2006.04388), for each side. The same as
    ``distance_to_box(points, integral(pred, reg_max) * stride[..., None], max_shape)``.

    Args:
        pred: fp32, fp16, bf16 or fp64 ``[…, 4(R+1)]``, logits; sides in the order left, top, right, bottom, each
            side's bins next to each other. Any strides; a permuted view of ``[B, 4(R+1), H, W]`` is read in place. A
            logit beyond a quarter of fp32's range (8.5e37; an infinite one too) counts as that, without gradient.
        points: floating ``[…, 2]``, x and y in pixels; broadcasts to pred's leading dimensions.
        stride: pixels per bin, the stride of a location's level: a number, or a tensor ``[…]`` that broadcasts to
            pred's leading dimensions.
        reg_max: R, 1 to 128.
        max_shape: (height, width) to clip to: two numbers, a tensor ``[2]``, or ``[B, 2]``, one per item of the first
            of two or more leading dimensions.

    Returns:
        ``[…, 4]`` boxes xyxy in pixels, fp32 (fp64 for fp64 `pred`).

    The gradient reaches `pred` and `points`, not `stride`; a clipped coordinate passes none.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.
        NotImplementedError: `reg_max` above 128.

    Note:
        Arithmetic in fp32 (fp64 for fp64), whatever autocast says. Repeatable bit for bit. Empty input gives an empty
        result, attached to the graph.
    """
    op = "decode"
    reg_max = check_distributions(op, pred, reg_max)
    check_coordinates(op, "points", points, 2)
    checks.same_device(op, "points", points, "pred", pred)
    acc, leading = accumulator(pred.dtype), pred.shape[:-1]
    points = expand_to(op, "points", as_dtype(points, acc), leading, 2)
    if isinstance(stride, Tensor):
        checks.tensor(op, "stride", stride, checks.FLOATING + checks.INTEGER)
        checks.same_device(op, "stride", stride, "pred", pred)
        pixels = expand_to(op, "stride", stride.detach().to(acc), leading)
    else:
        number = checks.number(op, "stride", stride, 0, exclusive=True, dtype=acc)
        pixels = torch.full((), number, dtype=acc, device=pred.device).broadcast_to(leading)
    limit = limit_of(op, max_shape, leading, acc, pred.device)
    return DECODE(device_type(pred), pred, points, pixels, reg_max, limit)
