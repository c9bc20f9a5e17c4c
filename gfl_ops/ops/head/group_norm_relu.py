# SPDX-License-Identifier: Apache-2.0
"""Group normalization and ReLU of all levels of a pyramid at once, for heads whose levels share their convolutions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from ...core import checks, transforms
from ...core.dtypes import accumulator, device_type
from ...core.random_inputs import normal
from ...core.registry import OpSpec, Sample, register

OP = "group_norm_relu"


def _level(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool) -> tuple[Tensor, Tensor]:
    """One level normalised, in the layout of `x`, and the mean and reciprocal deviation of its groups."""
    images, channels, height, width = x.shape
    acc = accumulator(x.dtype)
    rows = x.to(acc).reshape(images, groups, channels // groups, height * width)
    scale, shift = (p.to(acc).view(1, groups, channels // groups, 1) for p in (weight, bias))
    if rows.numel() == 0:
        mean = rstd = rows.new_zeros((images, groups))
    else:
        var, mean = torch.var_mean(rows, (2, 3), correction=0)
        rstd = (var + eps).rsqrt()
    y = (rows - mean[..., None, None]) * (rstd[..., None, None] * scale) + shift
    if relu:
        y = y.relu()
    y = y.reshape(x.shape)
    # empty_like keeps the memory format, which operations on the values may lose. A transform can't write into it.
    result = y.to(x.dtype) if transforms.active() else torch.empty_like(x).copy_(y)
    return result, torch.stack([mean, rstd], 2)


def reference(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[list[Tensor], Tensor]:
    """Level by level, in the arithmetic of the accumulator."""
    found = [_level(x, weight, bias, num_groups, eps, relu) for x in inputs]
    return [y for y, _ in found], torch.stack([s for _, s in found]).detach()


def fake(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[list[Tensor], Tensor]:
    first = inputs[0]
    statistics = first.new_empty((len(inputs), first.shape[0], num_groups, 2), dtype=accumulator(first.dtype))
    return [torch.empty_like(x) for x in inputs], statistics


def _clear_of_the_kink(maps: list[Tensor], weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """A bias near `bias` for which no value of a channel is close to 0, where the ReLU's derivative jumps.

    There rounding decides the side, and an fp64 oracle would rightly differ by a whole gradient.
    """
    zero = torch.zeros_like(weight)
    # The oracle's values: of the rounded inputs, in fp64.
    levels = reference([m.double() for m in maps], weight.double(), zero.double(), groups, 1e-5, False)[0]
    values = torch.cat([level.transpose(0, 1).flatten(1) for level in levels], 1).sort(1).values
    if values.shape[1] < 2:
        return bias
    # The middle of the widest gap near the drawn bias.
    gaps = values.diff(dim=1)
    middle = (values[:, 1:] + values[:, :-1]) / 2
    far = (middle + bias.double()[:, None]).abs() > 1.5
    chosen = gaps.masked_fill(far, 0.0).argmax(1, keepdim=True)
    return -middle.gather(1, chosen).squeeze(1).to(bias.dtype)


def samples(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator, large: bool = False
) -> Iterator[Sample]:
    acc = accumulator(dtype)

    def call(
        id: str,
        sizes: Sequence[tuple[int, int]],
        images: int = 2,
        channels: int = 8,
        groups: int = 2,
        layout: str = "nchw",
        parameters: torch.dtype = acc,
        relu: bool = True,
        mean: float = 0.3,
        scale: float = 1.5,
        eps: float = 1e-5,
    ) -> Sample:
        def arranged(values: Tensor) -> Tensor:
            if layout == "channels-last":
                return values.contiguous(memory_format=torch.channels_last)
            if layout == "transposed":
                return values.transpose(2, 3).contiguous().transpose(2, 3)
            if layout == "sliced-channels":
                return torch.cat([values, values], 1)[:, : values.shape[1]]
            if layout == "sliced-rows":
                return torch.cat([values, values], 3)[..., : values.shape[3]]
            return values

        cpu = torch.device("cpu")
        maps = [normal((images, channels, h, w), cpu, dtype, generator, scale) + mean for h, w in sizes]
        weight = normal((channels,), cpu, parameters, generator, 0.5) + 1.0
        bias = normal((channels,), cpu, parameters, generator, 0.5)
        if relu:
            bias = _clear_of_the_kink(maps, weight, bias, groups)
        made = [arranged(m.to(device)) for m in maps]
        return Sample(id, (made, weight.to(device), bias.to(device), groups, eps, relu))

    if large:
        # Several slabs of channels, and pieces of a level that grow with it.
        for layout in ("nchw", "channels-last"):
            yield call(f"c256-{layout}", [(70, 61), (9, 14)], images=1, channels=256, groups=32, layout=layout)
        return
    pyramid = [(9, 14), (5, 7), (3, 4), (2, 2), (1, 1)]
    yield call("one-cell", [(1, 1)], images=1, channels=2, groups=1)
    yield call("small", [(3, 4), (2, 2)], channels=6, groups=3)
    yield call("small-channels-last", [(3, 4), (2, 1)], channels=6, groups=2, layout="channels-last")
    yield call("small-linear", [(2, 3)], channels=4, groups=2, relu=False, parameters=dtype)
    yield call("images0", [(3, 4), (2, 2)], images=0)
    yield call("empty-level", [(0, 4), (3, 5)])
    yield call("pyramid", pyramid, channels=32, groups=4)
    yield call("pyramid-channels-last", pyramid, channels=32, groups=4, layout="channels-last", parameters=dtype)
    # A number of channels that vectors don't divide, and a group size that is no power of two.
    yield call("odd-c21", [(7, 11), (4, 5)], channels=21, groups=7)
    yield call("odd-c21-channels-last", [(7, 11), (4, 5)], channels=21, groups=7, layout="channels-last")
    yield call("a-channel-a-group-channels-last", [(5, 9)], channels=12, groups=12, layout="channels-last")
    yield call("one-group", [(5, 9)], channels=72, groups=1)
    yield call("one-group-channels-last", [(5, 9)], channels=72, groups=1, layout="channels-last")
    # More locations than any backend has in a block.
    yield call("long", [(23, 61)], images=1, channels=4, groups=2)
    yield call("long-channels-last", [(23, 61)], images=1, channels=16, groups=2, layout="channels-last")
    for layout in ("transposed", "sliced-channels", "sliced-rows"):
        yield call(layout, [(6, 8), (3, 5)], layout=layout)
    # A mean that is large against the deviation, as far as 16 bits can hold both.
    yield call("offset", [(8, 12), (4, 4)], mean=40.0, scale=2.0, layout="channels-last")
    # A variance far below eps.
    yield call("extreme-flat", [(6, 6)], scale=1e-4, mean=0.0, relu=False)


def magnitude(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float, relu: bool) -> float:
    """The mean is subtracted from every value, and what is left, and every gradient, is divided by the deviation.

    So roundings of the mean count in deviations, and a small deviation makes large terms that cancel in a gradient.
    """
    statistics = reference([x.double() for x in inputs], weight.double(), bias.double(), num_groups, eps, relu)[1]
    if statistics.numel() == 0:
        return 1.0
    means = (statistics[..., 0] * statistics[..., 1]).abs()
    return max(1.0, float(means.max()), float(statistics[..., 1].max()))


GROUP_NORM_RELU = register(
    OpSpec(
        stem=OP,
        schema="(Tensor[] inputs, Tensor weight, Tensor bias, int num_groups, float eps, bool relu)"
        " -> (Tensor[] outputs, Tensor statistics)",
        reference=reference,
        fake=fake,
        samples=samples,
        large=functools.partial(samples, large=True),
        triton="group_norm",
        summary="group normalization and ReLU over all levels",
        public=("group_norm_relu",),
        differentiable=("inputs", "weight", "bias"),
        grad_outputs=(0,),
        saved_outputs=(1,),
        magnitude=magnitude,
    )
)


@overload
def group_norm_relu(
    inputs: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = ..., relu: bool = ...
) -> Tensor: ...
@overload
def group_norm_relu(
    inputs: Sequence[Tensor], num_groups: int, weight: Tensor, bias: Tensor, eps: float = ..., relu: bool = ...
) -> list[Tensor]: ...
def group_norm_relu(
    inputs: Tensor | Sequence[Tensor],
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor | list[Tensor]:
    r"""Group normalization and ReLU of every level of a pyramid, each level and image normalised by itself.

    .. math:: y = \max\Bigl(0,\; \gamma_c \, \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta_c\Bigr)

    Equation 1 of Wu and He, Group Normalization (arXiv 1803.08494), with mean :math:`\mu_g` and biased variance
    :math:`\sigma_g^2` over the channels of the group g and all locations. The same as
    ``torch.relu(torch.nn.functional.group_norm(x, num_groups, weight, bias, eps))`` of each level.

    Args:
        inputs: one fp32, fp16, bf16 or fp64 ``[B, C, H, W]`` per level, equal but for H and W; or one tensor. Any
            memory format: if locations or channels are contiguous, nothing is copied.
        num_groups: G, the number of groups of C / G neighbouring channels; divides C.
        weight: :math:`\gamma`, floating ``[C]``, shared by the levels.
        bias: :math:`\beta`, ``[C]``.
        eps: added to the variance, >= 0.
        relu: whether a ReLU follows.

    Returns:
        A list of tensors with the levels' shapes, dtypes and memory formats; one tensor for one tensor.

    The gradient reaches `inputs`, `weight` and `bias`; it is 0 where the ReLU is.

    Raises:
        TypeError: a dtype or a type that is not taken.
        ValueError: a shape, device or number outside the above.

    Note:
        Statistics and arithmetic in fp32 (fp64 for fp64), whatever autocast says; the variance is summed about values
        near the mean, so that a large mean does not cancel it away. Sums have a fixed order: repeatable bit for bit,
        the gradients of `weight` and `bias` too. Empty levels and batches are allowed, and, unlike in torch, groups
        of a single value.
    """
    levels = [inputs] if isinstance(inputs, Tensor) else inputs
    _images, channels = checks.maps(OP, "inputs", levels)
    num_groups = checks.number(OP, "num_groups", num_groups, 1, integer=True)
    if channels % num_groups:
        raise ValueError(checks.message(OP, "num_groups", f"must divide the {channels} channels", num_groups))
    first = levels[0]
    for name, value in (("weight", weight), ("bias", bias)):
        checks.tensor(OP, name, value)
        checks.shape(OP, name, value, "[C]", (channels,))
        checks.same_device(OP, name, value, "inputs", first)
    # The kernels read parameters of the maps' dtype or of their accumulator's, both of one dtype.
    acc = accumulator(first.dtype)
    if weight.dtype != bias.dtype or weight.dtype not in (first.dtype, acc):
        weight, bias = weight.to(acc), bias.to(acc)
    eps = checks.number(OP, "eps", eps, 0, dtype=acc)
    relu = checks.flag(OP, "relu", relu)
    outputs, _ = GROUP_NORM_RELU(device_type(first), list(levels), weight, bias, num_groups, eps, relu)
    return outputs[0] if isinstance(inputs, Tensor) else list(outputs)
