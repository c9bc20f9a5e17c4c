# SPDX-License-Identifier: Apache-2.0
"""The losses of class scores in Triton, element by element: value and derivatives, finite for logits of ±1e4.

A loss is a function by the name of its stem, with the formula of the struct in csrc/terms/score.h. It takes score and
target in the accumulator type, its parameters in its own order, and whether scores are probabilities, and returns its
value and its derivatives by score and target. `score` walks any of them.

Multiply-adds are written out and kernels run without fusion, so that a gradient has the same bits from every kernel.
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

    The fp32 branch is the polynomial of csrc/terms/log1p.h: a hardware logarithm would lose all digits at small e.
    """
    if e.dtype == tl.float64:
        # Kahan's correction: log(u) · e/(u − 1) cancels the rounding of u = 1 + e.
        u = 1.0 + e
        d = u - 1.0
        result = tl.where(d == 0.0, e, tl.log(u) * (e / tl.where(d == 0.0, 1.0, d)))
    else:
        s = tl.fma(e, -0.0032439810, 0.019851264)
        s = tl.fma(s, e, -0.056959159)
        s = tl.fma(s, e, 0.10603617)
        s = tl.fma(s, e, -0.15305570)
        s = tl.fma(s, e, 0.19675931)
        s = tl.fma(s, e, -0.24954133)
        s = tl.fma(s, e, 0.33329964)
        s = tl.fma(s, e, -0.49999902)
        result = tl.fma(s * e, e, e)
    return result


@triton.jit
def log_complement(p):
    """log(1 − p) for a probability p, −inf at 1."""
    u = 1.0 - p
    d = 1.0 - u
    # d is p as rounded into u; the quotient p / d undoes that rounding (Kahan), and is 1 where p was lost altogether.
    # Written as 1 + (p − d) / d, whose difference is exact: Triton's division may be off by 2 ulp.
    lost = d == 0.0
    ratio = 1.0 + (p - d) / tl.where(lost, 1.0, d)
    return tl.where(lost, -p, tl.log(u) * ratio)


@triton.jit
def power(base, EXPONENT: tl.constexpr):
    """base^EXPONENT and its derivative for base ≥ 0.

    0^0 is 1. A subnormal base counts as 0, where a derivative that would be infinite is 0.
    """
    if EXPONENT == 2.0:
        value, slope = base * base, 2.0 * base
    elif EXPONENT == 1.0:
        value, slope = base, base * 0.0 + 1.0
    elif EXPONENT == 1.5:
        root = tl.sqrt(base)
        value, slope = base * root, 1.5 * root
    elif EXPONENT == 0.0:
        value, slope = base * 0.0 + 1.0, base * 0.0
    else:
        zero = tl.abs(base) < smallest_normal(base.dtype)
        log = tl.log2(tl.where(zero, 1.0, base))
        value = tl.where(zero, 0.0, tl.exp2(EXPONENT * log))
        slope = tl.where(zero, 0.0, EXPONENT * tl.exp2((EXPONENT - 1.0) * log))
    return value, slope


@triton.jit
def absolute_power(x, EXPONENT: tl.constexpr):
    """|x|^EXPONENT and its derivative, 0 at 0."""
    if EXPONENT == 2.0:
        value, slope = x * x, 2.0 * x
    else:
        value, slope = power(tl.abs(x), EXPONENT)
        slope = tl.where(x < 0.0, -slope, tl.where(x == 0.0, 0.0, slope))
    return value, slope


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
        infinite = tl.abs(x) == float("inf")
        x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
        e = tl.exp(-tl.abs(x))
        r = 1.0 / (1.0 + e)
        p = tl.where(x >= 0.0, r, e * r)
        q = tl.where(x >= 0.0, e * r, r)
        bce = tl.fma(tl.where(x > 0.0, 1.0 - t, -t), x, log1p_unit(e))  # 1 − t first: x − x·t would cancel
        bce_x = tl.where(infinite, 0.0, p - t)
        bce_t = -x
        p_x = tl.where(infinite, 0.0, p * q)
    return p, q, bce, bce_x, bce_t, p_x


@triton.jit
def modulated(m, slope, by_target, bce, bce_x, bce_t, p_x):
    """m · BCE and its derivatives, where m has the derivatives `slope` by p and `by_target` by t."""
    # p_x first: it is 0 where the largest cross entropy times the slope overflows.
    return m * bce, tl.fma(slope, p_x * bce, m * bce_x), tl.fma(by_target, bce, m * bce_t)


@triton.jit
def qfl(x, t, BETA: tl.constexpr, _2: tl.constexpr, _3: tl.constexpr, ACTIVATED: tl.constexpr):
    """|t − p|^β · BCE(x, t)"""
    p, _q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    m, slope = absolute_power(p - t, BETA)
    return modulated(m, slope, -slope, bce, bce_x, bce_t, p_x)


@triton.jit
def focal(x, t, GAMMA: tl.constexpr, ALPHA: tl.constexpr, _3: tl.constexpr, ACTIVATED: tl.constexpr):
    """α_t (1 − p_t)^γ · BCE(x, t), α_t and p_t linear in t; no α_t for a negative ALPHA."""
    p, q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    m, slope = power(tl.fma(q, t, p * (1.0 - t)), GAMMA)
    by_target = slope * (q - p)
    if ALPHA >= 0.0:
        balance = ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
        by_target = tl.fma(by_target, balance, (2.0 * ALPHA - 1.0) * m)
        m *= balance
        slope *= balance
    return modulated(m, slope * (1.0 - 2.0 * t), by_target, bce, bce_x, bce_t, p_x)


@triton.jit
def vfl(x, t, GAMMA: tl.constexpr, ALPHA: tl.constexpr, IOU_WEIGHTED: tl.constexpr, ACTIVATED: tl.constexpr):
    """t · BCE(x, t) where t > 0, or BCE alone; α |p − t|^γ · BCE(x, t) elsewhere."""
    p, _q, bce, bce_x, bce_t, p_x = bernoulli(x, t, ACTIVATED)
    m, slope = absolute_power(p - t, GAMMA)
    positive = t > 0.0
    if IOU_WEIGHTED != 0.0:
        m = tl.where(positive, t, ALPHA * m)
        by_target = tl.where(positive, 1.0, -ALPHA * slope)
    else:
        m = tl.where(positive, 1.0, ALPHA * m)
        by_target = tl.where(positive, 0.0, -ALPHA * slope)
    return modulated(m, tl.where(positive, 0.0, ALPHA * slope), by_target, bce, bce_x, bce_t, p_x)


@triton.jit
def mal(x, t, GAMMA: tl.constexpr, _2: tl.constexpr, _3: tl.constexpr, ACTIVATED: tl.constexpr):
    """BCE(x, t^γ) where t > 0, else p^γ · BCE(x, 0) with p^γ as a constant; NaN stays"""
    negative = t <= 0.0
    aim, aim_slope = power(tl.where(negative, 1.0, t), GAMMA)
    p, _q, bce, bce_x, bce_t, _p_x = bernoulli(x, tl.where(negative, 0.0, aim), ACTIVATED)
    w, _slope = power(p, GAMMA)
    w = tl.where(negative, w, 1.0)
    return w * bce, w * bce_x, tl.where(negative, 0.0, bce_t * aim_slope)


@triton.jit
def soft_bce(x, t, _1: tl.constexpr, _2: tl.constexpr, _3: tl.constexpr, ACTIVATED: tl.constexpr):
    """BCE(x, t)"""
    _p, _q, bce, bce_x, bce_t, _p_x = bernoulli(x, t, ACTIVATED)
    return bce, bce_x, bce_t
