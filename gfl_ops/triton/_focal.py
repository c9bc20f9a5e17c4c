# SPDX-License-Identifier: Apache-2.0
"""Element terms of the focal family with their derivatives, in forms that stay finite for logits of ±1e4.

Everything is in the accumulator type, fp32, or fp64 for fp64 logits. The same formulas as csrc/terms/focal.h.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def smallest_normal(dtype):
    return 2.2250738585072014e-308 if dtype == tl.float64 else 1.1754943508222875e-38


@triton.constexpr_function
def largest(dtype):
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], relative error below 3e-7 in fp32.

    The fp32 branch is e times a polynomial of degree 9 that interpolates log1p(e)/e at the Chebyshev nodes of [0, 1]
    (error 5.3e-9 before rounding): multiply-adds only, where a hardware logarithm would lose all digits at small e.
    """
    if e.dtype == tl.float64:
        # Kahan's correction: log(u) · e/(u − 1) cancels the rounding of u = 1 + e.
        u = 1.0 + e
        d = u - 1.0
        result = tl.where(d == 0.0, e, tl.log(u) * (e / tl.where(d == 0.0, 1.0, d)))
    else:
        s = e * -0.0031760570127516985 + 0.019542528316378593
        s = s * e - 0.05637361481785774
        s = s * e + 0.10543623566627502
        s = s * e - 0.1526966691017151
        s = s * e + 0.1966327428817749
        s = s * e - 0.24951615929603577
        s = s * e + 0.33329710364341736
        s = s * e - 0.49999892711639404
        s = s * e + 1.0
        result = s * e
    return result


@triton.jit
def log_complement(p):
    """log(1 − p) for a probability p, −inf at 1."""
    u = 1.0 - p
    d = 1.0 - u
    # d is p as rounded into u; the quotient undoes that rounding (Kahan), and is 1 where p was lost altogether.
    lost = d == 0.0
    return tl.where(lost, -p, tl.log(u) * (p / tl.where(lost, 1.0, d)))


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """base^EXPONENT for base ≥ 0; 0^0 is 1, and a subnormal base counts as 0."""
    if EXPONENT == 2.0:
        result = base * base
    elif EXPONENT == 1.0:
        result = base
    elif EXPONENT == 0.0:
        result = base * 0.0 + 1.0
    else:
        zero = tl.abs(base) < smallest_normal(base.dtype)
        result = tl.where(zero, 0.0, tl.exp2(EXPONENT * tl.log2(tl.where(zero, 1.0, base))))
    return result


@triton.jit
def power_derivative(base, EXPONENT: tl.constexpr):
    """d base^EXPONENT / d base for base ≥ 0; 0 where a power below 0 of 0 or of a subnormal base would be infinite."""
    if EXPONENT == 2.0:
        result = 2.0 * base
    elif EXPONENT == 1.0:
        result = base * 0.0 + 1.0
    elif EXPONENT == 0.0:
        result = base * 0.0
    else:
        zero = tl.abs(base) < smallest_normal(base.dtype)
        result = tl.where(zero, 0.0, EXPONENT * tl.exp2((EXPONENT - 1.0) * tl.log2(tl.where(zero, 1.0, base))))
    return result


@triton.jit
def power_slope(difference, EXPONENT: tl.constexpr):
    """d |difference|^EXPONENT / d difference, 0 at 0."""
    if EXPONENT == 2.0:
        result = 2.0 * difference
    else:
        derivative = power_derivative(tl.abs(difference), EXPONENT)
        result = tl.where(difference < 0.0, -derivative, tl.where(difference == 0.0, 0.0, derivative))
    return result


@triton.jit
def bernoulli(x, t, ACTIVATED: tl.constexpr):
    """Probability p, its complement q, BCE, d BCE/d x, d BCE/d t and d p/d x of a score x against a target t.

    `x` is a logit, or a probability if ACTIVATED, NaN outside [0, 1]. An infinite logit counts as the largest finite
    one, so that 0 · ∞ never appears, and has no gradient.
    """
    if ACTIVATED:
        p = tl.where((x >= 0.0) & (x <= 1.0), x, float("nan"))
        q = 1.0 - p
        # Logarithms floored at −100 and the variance at 1e-12, as torch's binary_cross_entropy does.
        log_p = tl.log(p)
        log_p = tl.where(log_p < -100.0, -100.0, log_p)
        log_q = log_complement(p)
        log_q = tl.where(log_q < -100.0, -100.0, log_q)
        variance = p * q
        bce = (t - 1.0) * log_q - t * log_p
        bce_x = (p - t) / tl.where(variance < 1e-12, 1e-12, variance)
        bce_t = log_q - log_p
        p_x = x * 0.0 + 1.0
    else:
        limit: tl.constexpr = largest(x.dtype)
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
        e = tl.exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
        p = tl.where(x >= 0.0, r, e * r)
        q = tl.where(x >= 0.0, e * r, r)
        bce = tl.where(x > 0.0, 1.0 - t, -t) * x + log1p_unit(e)  # 1 − t first: x − x·t would cancel
        bce_x = p - t
        bce_t = -x
        p_x = p * q
    return p, q, bce, bce_x, bce_t, p_x


@triton.jit
def gradient_at(x, gradient, ACTIVATED: tl.constexpr):
    """The gradient with respect to a score: none where the score is an infinite logit."""
    if ACTIVATED:
        result = gradient
    else:
        result = tl.where(tl.abs(x) == float("inf"), 0.0, gradient)
    return result


@triton.jit
def qfl_value(x, t, BETA: tl.constexpr, ACTIVATED: tl.constexpr):
    """|t − p|^β · BCE(x, t)"""
    p, _q, bce, _bce_x, _bce_t, _p_x = bernoulli(x, t, ACTIVATED)
    return power(tl.abs(p - t), BETA) * bce


@triton.jit
def qfl_gradient(x, t, BETA: tl.constexpr, ACTIVATED: tl.constexpr):
    """Derivatives of the quality focal term with respect to x and t; the modulating factor is part of both."""
    p, _q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    factor = power(tl.abs(p - t), BETA)
    slope = power_slope(p - t, BETA)
    # p_x first: it is 0 where the largest cross entropy times the slope overflows.
    return gradient_at(x, slope * (p_x * bce) + factor * bce_x, ACTIVATED), factor * bce_t - slope * bce


@triton.jit
def vfl_value(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr, IOU_WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr):
    """t · BCE(x, t) where t > 0, or BCE alone; α |p − t|^γ · BCE(x, t) elsewhere."""
    p, _q, bce, _bce_x, _bce_t, _p_x = bernoulli(x, t, ACTIVATED)
    positive = t if IOU_WEIGHTED else t * 0.0 + 1.0
    return tl.where(t > 0.0, positive, ALPHA * power(tl.abs(p - t), GAMMA)) * bce


@triton.jit
def vfl_gradient(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr, IOU_WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr):
    """Derivatives of the varifocal term with respect to x and t."""
    p, _q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    positive = t > 0.0
    factor = ALPHA * power(tl.abs(p - t), GAMMA)
    slope = tl.where(positive, 0.0, ALPHA * power_slope(p - t, GAMMA))
    if IOU_WEIGHTED:
        factor = tl.where(positive, t, factor)
        by_weight = tl.where(positive, bce, 0.0)
    else:
        factor = tl.where(positive, 1.0, factor)
        by_weight = bce * 0.0
    grad_x = slope * (p_x * bce) + factor * bce_x
    return gradient_at(x, grad_x, ACTIVATED), factor * bce_t - slope * bce + by_weight


@triton.jit
def focal_value(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACTIVATED: tl.constexpr):
    """α_t (1 − p_t)^γ · BCE(x, t), α_t and p_t linear in t; no α_t for a negative ALPHA."""
    p, q, bce, _bce_x, _bce_t, _p_x = bernoulli(x, t, ACTIVATED)
    value = power(q * t + p * (1.0 - t), GAMMA) * bce
    if ALPHA >= 0.0:
        value *= ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
    return value


@triton.jit
def focal_gradient(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr, ACTIVATED: tl.constexpr):
    """Derivatives of the focal term with respect to x and t."""
    p, q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    miss = q * t + p * (1.0 - t)
    factor = power(miss, GAMMA)
    slope = power_derivative(miss, GAMMA)
    by_balance = bce * 0.0
    if ALPHA >= 0.0:
        balance = ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
        by_balance = (2.0 * ALPHA - 1.0) * factor * bce
        factor *= balance
        slope *= balance
    grad_x = slope * (1.0 - 2.0 * t) * (p_x * bce) + factor * bce_x
    return gradient_at(x, grad_x, ACTIVATED), by_balance + slope * (q - p) * bce + factor * bce_t
