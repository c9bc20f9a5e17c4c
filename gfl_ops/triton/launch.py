# SPDX-License-Identifier: Apache-2.0
"""How every Triton kernel is launched, and how its tiles are sized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.backends import TRITON_INTERPRETS as INTERPRETS


class Launch(NamedTuple):
    """A recorded launch: the grid, positional arguments, constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Record launches instead of making them, so that kernels can be compiled ahead of time without a GPU."""
    global _recorded
    launches: list[Launch] = []
    previous, _recorded = _recorded, launches
    try:
        yield launches
    finally:
        _recorded = previous


def launch(kernel: Any, grid: int | tuple[int, int], like: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel` on a grid of programs, on the device of `like` and its current stream. No program, no launch."""
    axes = (grid,) if isinstance(grid, int) else grid
    if 0 in axes:
        return
    # Two kernels would contract one expression differently, and lanes that hold the same row its sum of products.
    constants["enable_fp_fusion"] = False
    if _recorded is not None:
        _recorded.append(Launch(kernel, axes, args, constants))
        return
    guard = torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[axes](*args, **constants)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def rows_per_program(rows: int, width: int, elements: int = 1024) -> int:
    """Rows of a tile of `width` columns and about `elements` elements, a power of two.

    The interpreter pays per operation, not per element: there the tiles are larger, and no larger than the rows.
    """
    if INTERPRETS:
        return min(power_of_two(rows), power_of_two(32 * elements // width))
    return power_of_two(max(elements // width, 1))


def programs(rows: int, block: int) -> int:
    """Programs of `block` rows that cover all."""
    return -(-rows // block)


def fold(*tensors: Tensor) -> list[tuple[int, ...]]:
    """(size, stride of each tensor) of the fewest dimensions that cover tensors of one shape, outermost first."""
    folded: list[tuple[int, ...]] = []
    for dim, size in enumerate(tensors[0].shape):
        strides = tuple(t.stride(dim) for t in tensors)
        if size == 1:
            continue
        if folded and folded[-1][1:] == tuple(size * s for s in strides):
            folded[-1] = (folded[-1][0] * size, *strides)
        else:
            folded.append((size, *strides))
    return folded


class Locations(NamedTuple):
    """The leading dimensions of tensors ``[…, K]``, walked as two: programs of the grid's second axis, then rows.

    `strides` holds the outer and the inner stride of each tensor in turn.
    """

    outer: int
    inner: int
    strides: tuple[int, ...]


def locations(*tensors: Tensor) -> Locations | None:
    """Fold the dimensions of tensors of one shape into two; None if their strides don't allow it.

    They do for contiguous input, for slices of it, and for a permuted view of ``[B, K, H, W]``.
    """
    folded = fold(*tensors)
    # A grid has at most 65 535 programs on its second axis.
    if len(folded) > 2 or (len(folded) == 2 and folded[0][0] > 65535):
        return None
    nothing = (1, *(0 for _ in tensors))
    (outer, *outer_strides), (inner, *inner_strides) = [nothing] * (2 - len(folded)) + folded
    return Locations(outer, inner, tuple(s for pair in zip(outer_strides, inner_strides) for s in pair))


def column_block(columns: int, largest: int = 128) -> int:
    """Width of the column tiles that wastes the fewest lanes: 16 for 80 classes, 32 for 91."""
    if INTERPRETS:
        return min(power_of_two(columns), largest // 2)
    widths = [w for w in (128, 64, 32, 16) if w <= largest]
    return min(widths, key=lambda w: (-(-columns // w) * w, -w))


def column_tiles(columns: int) -> dict[str, int]:
    """Constants of a walk over the columns; up to 8 tiles are unrolled, so that their loads overlap."""
    block = column_block(columns)
    tiles = programs(columns, block)
    return {"BLOCK_C": block, "TILES": tiles, "UNROLL": max(min(tiles, 8), 1)}


def empty_gradient(like: Tensor, needed: bool) -> Tensor:
    """Where a kernel writes the gradient of `like`; without elements if it isn't needed.

    Triton's interpreter truncates to bfloat16 instead of rounding: there the kernel writes fp32, and torch rounds.
    """
    dtype = torch.float32 if INTERPRETS and like.dtype == torch.bfloat16 else like.dtype
    return torch.empty(like.shape if needed else (0,), dtype=dtype, device=like.device)


def finished(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient in the dtype of `like`."""
    return gradient.to(like.dtype)
