# SPDX-License-Identifier: Apache-2.0
"""A softmax over bins for a tile of rows, and what the operators on distributions read off it.

Tiles are [rows, BINS], BINS a power of two at least the number of bins; the lanes beyond are −inf and weigh nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def largest_logit(dtype):
    return 4.4942328371557893e307 if dtype == tl.float64 else 8.507058658713472e37


@triton.jit
def bounded(x, limit):
    """`x` within ±limit, so that no difference of two overflows, and where it was beyond; NaN stays."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x)), tl.abs(x) > limit


@triton.jit
def bin_pointers(tensor, rows, stride_row, bin, stride_bin):
    return tensor + rows[:, None] * stride_row + bin.to(tl.int64)[None, :] * stride_bin


@triton.jit
def softmax_tile(pointers, inside, bin, reg_max, acc: tl.constexpr):
    """Logits, exponentials, their row sums, the row maxima, and where a logit is out of bounds and has no gradient."""
    exists = (bin <= reg_max)[None, :]
    x = tl.load(pointers, mask=inside[:, None] & exists, other=0.0).to(acc)
    x, beyond = bounded(x, largest_logit(acc))
    x = tl.where(exists, x, float("-inf"))
    largest = tl.max(x, axis=1)
    e = tl.exp(x - largest[:, None])
    return x, e, tl.sum(e, axis=1), largest, beyond


@triton.jit
def softened_tile(pointers, inside, exists, acc: tl.constexpr, INVERSE: tl.constexpr, SHARE: tl.constexpr):
    """Logits less the row's largest over T, their exponentials, the sum of those, and which logits are beyond."""
    limit: tl.constexpr = largest_logit(acc) * SHARE
    x, beyond = bounded(tl.load(pointers, mask=inside[:, None] & exists, other=0.0).to(acc), limit)
    # Rows and bins that are not there hold zeros, and weigh nothing: an infinity less itself would be a NaN.
    largest = tl.max(tl.where(exists, x, float("-inf")), axis=1)
    x = tl.where(exists, (x - largest[:, None]) * INVERSE, 0.0)
    e = tl.where(exists, tl.exp(x), 0.0)
    return x, e, tl.sum(e, axis=1), beyond


@triton.jit
def at_bin(x, bin, index):
    """x[row, index[row]]; one lane counts, so that the sum rounds nothing."""
    return tl.sum(tl.where(bin[None, :] == index[:, None], x, 0.0), axis=1)


@triton.jit
def expected_bin(e, total, bin):
    """Σ p(j)·j"""
    return tl.sum(e * bin.to(e.dtype)[None, :], axis=1) / total


@triton.jit
def expected_bin_gradient(e, total, bin, grad):
    """Gradient of Σ p(j)·j with respect to the logits: p(j)·(j − Σ p(i)·i).

    The sum is taken from its nearest bin, c + Σ p(i)·(i − c): where the distribution is peaked both terms are small,
    and their difference keeps the digits that j − Σ p(i)·i loses.
    """
    j = bin.to(e.dtype)
    centre = tl.floor(expected_bin(e, total, bin) + 0.5)
    from_centre = j[None, :] - centre[:, None]
    shift = tl.sum(e * from_centre, axis=1) / total
    return grad[:, None] * ((e / total[:, None]) * (from_centre - shift[:, None]))


@triton.jit
def store_gradient(to, gradient, beyond, inside, bin, reg_max):
    """Gradients of rows that begin at `to`, contiguous; 0 where a logit is beyond what counts."""
    gradient = tl.where(beyond, 0.0, gradient).to(to.dtype.element_ty)
    tl.store(to[:, None] + bin[None, :], gradient, mask=inside[:, None] & (bin <= reg_max)[None, :])
