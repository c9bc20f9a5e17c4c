# SPDX-License-Identifier: Apache-2.0
"""Elementary functions of the assignments that read predictions, operation by operation those of
csrc/terms/elementary.h."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND = 12582912.0  # 1.5 · 2^23: adding it rounds to the nearest integer


def _times_power(x: Tensor, shifted: Tensor) -> Tensor:
    """x times the power of two whose exponent lies in the lowest bits of `shifted`."""
    return (x.contiguous().view(torch.int32) + (shifted.contiguous().view(torch.int32) << 23)).view(torch.float32)


def _exp_of_small(r: Tensor) -> Tensor:
    """e^r for r in [−ln2/2, ln2/2]."""
    p = ((((r * 1.9875691e-4 + 1.3981999e-3) * r + 8.3334519e-3) * r + 4.1665796e-2) * r + 1.6666667e-1) * r + 0.5
    return (r * r) * p + r + 1.0


def exponential(x: Tensor) -> Tensor:
    """e^x for x <= 0 within 2 ulp; 0 below −87."""
    shifted = x * 1.442695 + _ROUND
    n = shifted - _ROUND
    r = x - n * 0.69335938 + n * 2.1219444e-4
    return torch.where(x < -87, 0.0, _times_power(_exp_of_small(r), shifted))


def power_of_ten(x: Tensor) -> Tensor:
    """10^x within 4 ulp; 0 below −37, infinite above 38."""
    shifted = x * 3.3219281 + _ROUND
    n = shifted - _ROUND
    r = (x - n * 0.30102539 - n * 4.6050390e-6) * 2.3025851
    value = torch.where(x < -37, 0.0, _times_power(_exp_of_small(r), shifted) + (x - x))
    return torch.where(x > 38, float("inf"), value)


def logarithm_of_sum(u: Tensor, whole: Tensor) -> Tensor:
    """log `whole`, which is 1 + u, within 2 ulp; −100 where it is no normal positive number; NaN stays."""
    bits = whole.contiguous().view(torch.int32)
    n = (bits - 0x3F3504F3) >> 23
    m = (bits - (n << 23)).view(torch.float32)
    x = torch.where(n == 0, u, m - 1.0)
    z = x * x
    p = ((x * 7.0376836e-2 - 1.151461e-1) * x + 1.1676999e-1) * x - 1.242014e-1
    p = (((p * x + 1.4249323e-1) * x - 1.6668058e-1) * x + 2.0000715e-1) * x - 2.4999994e-1
    p = p * x + 3.3333331e-1
    e = n.float()
    y = x * z * p + e * -2.1219444e-4 - z * 0.5
    return torch.where(whole < 1.1754944e-38, -100.0, x + y + e * 0.69335938 + (whole - whole))


def logarithm(x: Tensor) -> Tensor:
    return logarithm_of_sum(x - 1.0, x)


def sigmoid(x: Tensor) -> Tensor:
    """σ(x) of fp32 within 3 ulp; NaN stays."""
    e = exponential(-x.abs())
    p = torch.where(x < 0, e, 1.0) / (1.0 + e)
    return torch.where(x == x, p, x)
