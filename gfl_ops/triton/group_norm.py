# SPDX-License-Identifier: Apache-2.0
"""Group normalization and ReLU in Triton                                             (arXiv 1803.08494, eq. 1)

    x, grad_y      [B, C, H, W] per level   fp32, fp16, bf16, fp64  read, in place where rows follow each other
    weight, bias   [C]                      as x or A               read
    y, grad_x      as x                     as x                    write, in the layout of x
    statistics     [L, B, G, 2]             A                       write, read: mean and reciprocal deviation
    partial sums   of pieces                A                       write, read

Two launches per level and direction: the first sums over pieces of a level, the second combines the pieces of its
groups and computes the values; the gradients of weight and bias are one more sum over all pieces. A program holds a
slab of whole groups, about 64 channels, padded to powers of two, and walks over its piece's locations in tiles. Bytes
per element: forward 2 reads and 1 write, backward twice 2 and 1. Accumulator A: fp32, fp64 for fp64, about a value of
the piece. Repeatable bit for bit: every sum has a fixed tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.dtypes import accumulator
from . import launch

SLAB, TILE = 64, 2048  # channels of a program; elements of a tile
FEWEST_STEPS, MOST_PIECES = 8, 64
MOST_ROWS_INTERPRETED = 64


@triton.jit
def _slab(pieces, groups, each, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """This program's piece, image and first group; the channels of its columns and which of them exist."""
    piece, slab = tl.program_id(0) % pieces, tl.program_id(0) // pieces
    slabs = (groups + GROUPS - 1) // GROUPS
    image, first = (slab // slabs).to(tl.int64), (slab % slabs) * GROUPS
    column = tl.arange(0, GROUPS * EACH)
    group = first + column // EACH
    exists = (group < groups) & (column % EACH < each)
    return piece, image, first, (group * each + column % EACH).to(tl.int64), exists


@triton.jit
def _spread(of_group, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """A value per group to a value per column."""
    return tl.reshape(tl.broadcast_to(of_group[:, None], (GROUPS, EACH)), (GROUPS * EACH,))


@triton.jit
def _gathered(of_column, exists, GROUPS: tl.constexpr, EACH: tl.constexpr):
    """Values of columns that exist to a sum per group."""
    return tl.sum(tl.reshape(tl.where(exists, of_column, 0.0), (GROUPS, EACH)), 1)


@triton.jit
def _passed(grad, value, RELU: tl.constexpr):
    """The gradient where the ReLU passes it; a NaN value does."""
    if RELU:
        grad = tl.where(value <= 0.0, 0.0, grad)
    return grad


@triton.jit
def group_norm_relu_moments_kernel(
    x, partial, locations, groups, each, pieces, stride_image, stride_channel, stride_location,
    GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = partial.dtype.element_ty
    this_piece, image, first, channel, exists = _slab(pieces, groups, each, GROUPS, EACH)
    begin = this_piece.to(tl.int64) * (BLOCK_L * STEPS)
    at = x + image * stride_image + channel * stride_channel
    shift = tl.load(at + begin * stride_location, mask=exists, other=0.0).to(acc)
    total = tl.zeros((BLOCK_L, GROUPS * EACH), dtype=acc)
    squares = tl.zeros((BLOCK_L, GROUPS * EACH), dtype=acc)
    for step in range(STEPS):
        location = begin + step * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (location < locations)[:, None] & exists[None, :]
        value = tl.load(at[None, :] + location[:, None] * stride_location, mask=inside, other=0.0).to(acc)
        distance = tl.where(inside, value - shift[None, :], 0.0)
        total += distance
        squares += distance * distance
    count = tl.minimum(locations - begin, BLOCK_L * STEPS).to(acc)
    of_channel = tl.sum(total, 0)
    within = tl.sum(squares, 0) - of_channel * (of_channel / count)
    within = tl.where(within < 0.0, 0.0, within)
    # Means from that of the group's first channel, so that a large one is rounded once.
    group = first + tl.arange(0, GROUPS)
    base = tl.load(
        x + image * stride_image + (group * each).to(tl.int64) * stride_channel + begin * stride_location,
        mask=group < groups, other=0.0,
    ).to(acc)  # fmt: skip
    from_base = (shift - _spread(base, GROUPS, EACH)) + of_channel / count
    mean = _gathered(from_base, exists, GROUPS, EACH) / each
    difference = from_base - _spread(mean, GROUPS, EACH)
    spread = _gathered(within + difference * difference * count, exists, GROUPS, EACH)
    out = partial + ((image * groups + group) * pieces + this_piece) * 2
    tl.store(out, base + mean, mask=group < groups)
    tl.store(out + 1, spread, mask=group < groups)


@triton.jit
def group_norm_relu_forward_kernel(
    x, weight, bias, partial, statistics, y, locations, groups, each, pieces,
    stride_image, stride_channel, stride_location, stride_y_image, stride_y_channel, stride_y_location,
    EPS: tl.constexpr, RELU: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_L: tl.constexpr,
    STEPS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = statistics.dtype.element_ty
    this_piece, image, first, channel, exists = _slab(pieces, groups, each, GROUPS, EACH)
    group = first + tl.arange(0, GROUPS)
    piece = tl.arange(0, PIECES)
    of_piece = partial + ((image * groups + group)[:, None] * pieces + piece[None, :]) * 2
    there = (group < groups)[:, None] & (piece < pieces)[None, :]
    base = tl.load(partial + (image * groups + group) * pieces * 2, mask=group < groups, other=0.0)
    means = tl.load(of_piece, mask=there, other=0.0) - base[:, None]
    spreads = tl.load(of_piece + 1, mask=there, other=0.0)
    counts = tl.minimum(locations - piece.to(tl.int64) * (BLOCK_L * STEPS), BLOCK_L * STEPS)
    share = tl.where(there, counts.to(acc)[None, :], 0.0) / locations
    mean = tl.sum(share * means, 1)
    difference = means - mean[:, None]
    # `spreads` are sums over a group's channels, `share` counts locations.
    variance = tl.sum(tl.where(there, spreads / locations, 0.0), 1) / each + tl.sum(share * difference * difference, 1)
    rstd = 1.0 / tl.sqrt(variance + tl.full((), EPS, acc))  # a float argument would be fp32 in fp64 too
    mean += base
    if this_piece == 0:
        out = statistics + (image * groups + group) * 2
        tl.store(out, mean, mask=group < groups)
        tl.store(out + 1, rstd, mask=group < groups)
    scale = _spread(rstd, GROUPS, EACH) * tl.load(weight + channel, mask=exists, other=0.0).to(acc)
    shift = tl.load(bias + channel, mask=exists, other=0.0).to(acc)
    centre = _spread(mean, GROUPS, EACH)
    begin = this_piece.to(tl.int64) * (BLOCK_L * STEPS)
    at = x + image * stride_image + channel * stride_channel
    to = y + image * stride_y_image + channel * stride_y_channel
    for step in range(STEPS):
        location = begin + step * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (location < locations)[:, None] & exists[None, :]
        value = tl.load(at[None, :] + location[:, None] * stride_location, mask=inside, other=0.0).to(acc)
        value = tl.fma(
            value - centre[None, :], scale[None, :] + tl.zeros_like(value), shift[None, :] + tl.zeros_like(value)
        )
        if RELU:
            value = tl.where(value < 0.0, 0.0, value)  # NaN stays
        tl.store(to[None, :] + location[:, None] * stride_y_location, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _coefficients(
    weight, bias, statistics, image, first, channel, exists, groups, GROUPS: tl.constexpr, EACH: tl.constexpr
):
    """Mean, scale and bias per column, and the reciprocal deviation per group."""
    acc: tl.constexpr = statistics.dtype.element_ty
    group = first + tl.arange(0, GROUPS)
    statistic = statistics + (image * groups + group) * 2
    mean = tl.load(statistic, mask=group < groups, other=0.0)
    rstd = tl.load(statistic + 1, mask=group < groups, other=0.0)
    scale = _spread(rstd, GROUPS, EACH) * tl.load(weight + channel, mask=exists, other=0.0).to(acc)
    return _spread(mean, GROUPS, EACH), scale, tl.load(bias + channel, mask=exists, other=0.0).to(acc), rstd


@triton.jit
def group_norm_relu_sums_kernel(
    grad_y, x, weight, bias, statistics, of_groups, of_channels, locations, groups, each, pieces,
    stride_image, stride_channel, stride_location, stride_grad_image, stride_grad_channel, stride_grad_location,
    RELU: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = statistics.dtype.element_ty
    this_piece, image, first, channel, exists = _slab(pieces, groups, each, GROUPS, EACH)
    centre, scale, shift, rstd = _coefficients(
        weight, bias, statistics, image, first, channel, exists, groups, GROUPS, EACH
    )
    begin = this_piece.to(tl.int64) * (BLOCK_L * STEPS)
    at = x + image * stride_image + channel * stride_channel
    grad_at = grad_y + image * stride_grad_image + channel * stride_grad_channel
    total = tl.zeros((BLOCK_L, GROUPS * EACH), dtype=acc)
    product = tl.zeros((BLOCK_L, GROUPS * EACH), dtype=acc)
    for step in range(STEPS):
        location = begin + step * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (location < locations)[:, None] & exists[None, :]
        distance = tl.load(at[None, :] + location[:, None] * stride_location, mask=inside, other=0.0).to(acc)
        distance -= centre[None, :]
        grad = tl.load(grad_at[None, :] + location[:, None] * stride_grad_location, mask=inside, other=0.0).to(acc)
        value = tl.fma(distance, scale[None, :] + tl.zeros_like(distance), shift[None, :] + tl.zeros_like(distance))
        grad = _passed(grad, value, RELU)
        total += grad
        product += tl.where(inside, grad * distance, 0.0)
    of_channel = tl.sum(total, 0)
    of_xhat = tl.sum(product, 0) * _spread(rstd, GROUPS, EACH)
    row = (image * pieces + this_piece) * 2 * groups * each
    tl.store(of_channels + row + channel, of_channel, mask=exists)
    tl.store(of_channels + row + groups * each + channel, of_xhat, mask=exists)
    gamma = tl.load(weight + channel, mask=exists, other=0.0).to(acc)
    group = first + tl.arange(0, GROUPS)
    out = of_groups + ((image * groups + group) * pieces + this_piece) * 2
    tl.store(out, _gathered(gamma * of_channel, exists, GROUPS, EACH), mask=group < groups)
    tl.store(out + 1, _gathered(gamma * of_xhat, exists, GROUPS, EACH), mask=group < groups)


@triton.jit
def group_norm_relu_backward_kernel(
    grad_y, x, weight, bias, statistics, of_groups, grad_x, locations, groups, each, pieces,
    stride_image, stride_channel, stride_location, stride_grad_image, stride_grad_channel, stride_grad_location,
    stride_out_image, stride_out_channel, stride_out_location,
    RELU: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_L: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = statistics.dtype.element_ty
    this_piece, image, first, channel, exists = _slab(pieces, groups, each, GROUPS, EACH)
    centre, scale, shift, rstd = _coefficients(
        weight, bias, statistics, image, first, channel, exists, groups, GROUPS, EACH
    )
    group = first + tl.arange(0, GROUPS)
    piece = tl.arange(0, PIECES)
    of_piece = of_groups + ((image * groups + group)[:, None] * pieces + piece[None, :]) * 2
    there = (group < groups)[:, None] & (piece < pieces)[None, :]
    count = (tl.cast(locations, tl.int64) * each).to(acc)  # an integer argument of 1 is a Python int
    level = rstd * tl.sum(tl.load(of_piece, mask=there, other=0.0), 1) / count
    slope = rstd * rstd * tl.sum(tl.load(of_piece + 1, mask=there, other=0.0), 1) / count
    level = _spread(level, GROUPS, EACH)
    slope = _spread(slope, GROUPS, EACH)
    begin = this_piece.to(tl.int64) * (BLOCK_L * STEPS)
    at = x + image * stride_image + channel * stride_channel
    grad_at = grad_y + image * stride_grad_image + channel * stride_grad_channel
    to = grad_x + image * stride_out_image + channel * stride_out_channel
    for step in range(STEPS):
        location = begin + step * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (location < locations)[:, None] & exists[None, :]
        distance = tl.load(at[None, :] + location[:, None] * stride_location, mask=inside, other=0.0).to(acc)
        distance -= centre[None, :]
        grad = tl.load(grad_at[None, :] + location[:, None] * stride_grad_location, mask=inside, other=0.0).to(acc)
        value = tl.fma(distance, scale[None, :] + tl.zeros_like(distance), shift[None, :] + tl.zeros_like(distance))
        grad = _passed(grad, value, RELU) * scale[None, :] - (distance * slope[None, :] + level[None, :])
        tl.store(to[None, :] + location[:, None] * stride_out_location, grad.to(grad_x.dtype.element_ty), mask=inside)


class Walk(NamedTuple):
    """How a level is divided: `sizes` are its locations, groups, channels per group and pieces."""

    programs: int
    pieces: int
    sizes: tuple[int, int, int, int]
    constants: dict[str, int]


def _walk(x: Tensor, groups: int) -> Walk:
    images, channels, height, width = x.shape
    each, locations = channels // groups, height * width
    padded = launch.power_of_two(each)
    together = min(max(SLAB // padded, 1), launch.power_of_two(groups))
    # The interpreter pays per operation, but sums a tile row after row, not by halves: long tiles would lose digits.
    block = MOST_ROWS_INTERPRETED if launch.INTERPRETS else max(TILE // (together * padded), 1)
    block = min(block, launch.power_of_two(locations))
    fewest = 2 if launch.INTERPRETS else FEWEST_STEPS
    steps = max(launch.power_of_two(launch.programs(locations, block * MOST_PIECES)), fewest)
    steps = min(steps, launch.power_of_two(launch.programs(locations, block)))
    pieces = launch.programs(locations, block * steps)
    constants = {"GROUPS": together, "EACH": padded, "BLOCK_L": block, "STEPS": steps}
    # All on the first axis of the grid: the others end at 65 535.
    programs = pieces * images * launch.programs(groups, together)
    return Walk(programs, pieces, (locations, groups, each, pieces), constants)


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of image, channel and location; None if rows don't follow each other."""
    height, width = x.shape[2:]
    if height > 1 and width > 1 and x.stride(2) != width * x.stride(3):
        return None
    return x.stride(0), x.stride(1), x.stride(3) if width > 1 else x.stride(2)


def _readable(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    strides = _strides(x)
    if strides is None:
        x = x.contiguous()
        strides = _strides(x)
    assert strides is not None
    return x, strides


class _Result:
    """A map in the layout of another, and where a kernel writes it."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        # Triton's interpreter truncates to bfloat16 instead of rounding: there torch rounds.
        dtype = torch.float32 if launch.INTERPRETS and like.dtype == torch.bfloat16 else like.dtype
        self.written = torch.empty_like(like, dtype=dtype)
        if _strides(self.written) is None:
            self.written = torch.empty(like.shape, dtype=dtype, device=like.device)
        self.strides = _readable(self.written)[1]

    def finished(self) -> Tensor:
        wanted = torch.empty_like(self.like)
        if self.written.dtype == wanted.dtype and self.written.stride() == wanted.stride():
            return self.written
        return wanted.copy_(self.written)


def group_norm_relu_forward(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[list[Tensor], Tensor]:
    first = inputs[0]
    acc = accumulator(first.dtype)
    weight, bias = weight.contiguous(), bias.contiguous()
    statistics = torch.zeros((len(inputs), first.shape[0], num_groups, 2), dtype=acc, device=first.device)
    outputs = []
    for x, of_level in zip(inputs, statistics):
        result, walk = _Result(x), _walk(x, num_groups)
        map, strides = _readable(x)
        partial = torch.empty((x.shape[0], num_groups, walk.pieces, 2), dtype=acc, device=x.device)
        launch.launch(
            group_norm_relu_moments_kernel, walk.programs, x, map, partial, *walk.sizes, *strides, **walk.constants
        )
        launch.launch(
            group_norm_relu_forward_kernel, walk.programs, x,
            map, weight, bias, partial, of_level, result.written, *walk.sizes, *strides,
            *result.strides, EPS=eps, RELU=relu, PIECES=launch.power_of_two(walk.pieces), **walk.constants,
        )  # fmt: skip
        outputs.append(result.finished())
    return outputs, statistics


def group_norm_relu_backward(
    grad_outputs: Sequence[Tensor],
    statistics: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    relu: bool,
    needs: Sequence[bool],
) -> tuple[list[Tensor], Tensor, Tensor]:
    images, channels = inputs[0].shape[:2]
    weight, bias, statistics = weight.contiguous(), bias.contiguous(), statistics.contiguous()
    walks = [_walk(x, num_groups) for x in inputs]
    rows = [images * w.pieces for w in walks]
    of_channels = statistics.new_empty((sum(rows), 2, channels))
    grad_inputs = []
    for grad_y, x, of_level, walk, sums in zip(grad_outputs, inputs, statistics, walks, of_channels.split(rows)):
        map, strides = _readable(x)
        grad, grad_strides = _readable(grad_y)
        given = (grad, map, weight, bias, of_level)
        of_groups = statistics.new_empty((images, num_groups, walk.pieces, 2))
        launch.launch(
            group_norm_relu_sums_kernel, walk.programs, x,
            *given, of_groups, sums, *walk.sizes, *strides, *grad_strides, RELU=relu, **walk.constants,
        )  # fmt: skip
        if not needs[0]:
            grad_inputs.append(x.new_empty((0,)))
            continue
        result = _Result(x)
        launch.launch(
            group_norm_relu_backward_kernel, walk.programs, x,
            *given, of_groups, result.written, *walk.sizes, *strides, *grad_strides, *result.strides,
            RELU=relu, PIECES=launch.power_of_two(walk.pieces), **walk.constants,
        )  # fmt: skip
        grad_inputs.append(result.finished())
    nothing = weight.new_empty((0,))
    if not (needs[1] or needs[2]):
        return grad_inputs, nothing, nothing
    grad_bias, grad_weight = of_channels.sum(0).to(weight.dtype)
    return grad_inputs, grad_weight.clone() if needs[1] else nothing, grad_bias.clone() if needs[2] else nothing
