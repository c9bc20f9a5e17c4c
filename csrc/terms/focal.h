// SPDX-License-Identifier: Apache-2.0
// Element terms of the focal family, each with its derivatives, in forms that stay finite for logits of ±1e4.
//
//   quality focal  |t − σ(x)|^β · BCE(x, t)                                     Li et al., arXiv 2006.04388, eq. 2
//   varifocal      w(x, t) · BCE(x, t), w = t (or 1) if t > 0 else α|σ(x) − t|^γ  Zhang et al., arXiv 2008.13367, eq. 2
//   focal          α_t (1 − p_t)^γ · BCE(x, t)                                   Lin et al., arXiv 1708.02002, eq. 5
#pragma once
#include <cmath>
#include <limits>

#include "host_device.h"

namespace gfl {

// Value and derivatives of one element term.
template <class A> struct Term { A value, grad_pred, grad_target; };

template <class A> GFL_HOST_DEVICE A absolute(A x) { return x < A(0) ? -x : x; }

// base^exponent for base ≥ 0; the squares that every published detector uses do not go through pow.
template <class A> GFL_HOST_DEVICE A power(A base, A exponent) {
  if (exponent == A(2)) return base * base;
  if (exponent == A(1)) return base;
  return std::pow(base, exponent);
}

// d(base^exponent)/d(base) for base ≥ 0. An exponent below 1 has no finite derivative at 0; 0 is taken there, and for
// subnormal bases, where the power would overflow.
template <class A> GFL_HOST_DEVICE A power_derivative(A base, A exponent) {
  if (exponent == A(2)) return A(2) * base;
  if (exponent == A(1)) return A(1);
  const A smallest = std::numeric_limits<A>::min();
  if (absolute(base) < smallest) return A(0);
  return exponent * std::pow(base, exponent - A(1));
}

// The derivative of |x|, 0 at 0 as torch's.
template <class A> GFL_HOST_DEVICE A sign(A x) { return A((A(0) < x) - (x < A(0))); }

// log(1 + e) and 1/(1 + e) for e in [0, 1]. On the GPU, in fp32, a polynomial of relative error 4.8e-9 (that of the CPU's
// vector code) and a division good to 2 ulp: the library's general forms cost more than all else in a term.
template <class A> GFL_HOST_DEVICE A log1p_of_unit(A e) {
#if defined(__CUDACC__) || defined(GFL_CUDA_ON_HOST)
  if constexpr (sizeof(A) == 4) {
    A p = -0.0032439810f;
    p = std::fma(p, e, 0.019851264f);
    p = std::fma(p, e, -0.056959159f);
    p = std::fma(p, e, 0.10603617f);
    p = std::fma(p, e, -0.15305570f);
    p = std::fma(p, e, 0.19675931f);
    p = std::fma(p, e, -0.24954133f);
    p = std::fma(p, e, 0.33329964f);
    p = std::fma(p, e, -0.49999902f);
    return std::fma(p * e, e, e);
  }
#endif
  return std::log1p(e);
}
template <class A> GFL_HOST_DEVICE A reciprocal_of_unit(A e) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4) return __fdividef(1.0f, 1.0f + e);
#endif
  return A(1) / (A(1) + e);
}

// Probability, its complement and the binary cross entropy of a score against a target, from one exponential.
template <class A> struct Bernoulli {
  A p, q;              // σ(x) and 1 − σ(x), each to full relative precision
  A bce;               // −t·log p − (1−t)·log q
  A bce_pred;          // d bce / d pred
  A bce_target;        // d bce / d target
  A p_pred;            // d p / d pred
};

template <class A> GFL_HOST_DEVICE Bernoulli<A> bernoulli_from_logit(A x, A t) {
  // An infinite logit counts as the largest finite one, so that 0 · ∞ never appears: a class masked with −∞ costs nothing.
  const A largest = std::numeric_limits<A>::max();
  const bool infinite = absolute(x) > largest;
  if (infinite) x = x < A(0) ? -largest : largest;
  const A e = std::exp(-absolute(x));
  const A r = reciprocal_of_unit(e);
  Bernoulli<A> b;
  b.p = x >= A(0) ? r : e * r;
  b.q = x >= A(0) ? e * r : r;
  b.bce = (x > A(0) ? A(1) - t : -t) * x + log1p_of_unit(e);  // 1 − t first: x − x·t would cancel
  b.bce_pred = b.p - t;
  b.bce_target = -x;
  b.p_pred = b.p * b.q;
  if (infinite) b.bce_pred = b.p_pred = A(0);
  return b;
}

// Outside [0, 1] there is no probability: NaN. The logarithms are floored at −100 and the derivative's denominator at
// 1e-12, as torch's binary_cross_entropy does.
template <class A> GFL_HOST_DEVICE Bernoulli<A> bernoulli_from_probability(A p, A t) {
  if (!(p >= A(0) && p <= A(1))) p = std::numeric_limits<A>::quiet_NaN();
  Bernoulli<A> b;
  b.p = p;
  b.q = A(1) - p;
  A log_p = std::log(p), log_q = std::log1p(-p);
  if (log_p < A(-100)) log_p = A(-100);
  if (log_q < A(-100)) log_q = A(-100);
  const A variance = p * b.q;
  b.bce = (t - A(1)) * log_q - t * log_p;
  b.bce_pred = (p - t) / (variance < A(1e-12) ? A(1e-12) : variance);
  b.bce_target = log_q - log_p;
  b.p_pred = A(1);
  return b;
}

template <class A> GFL_HOST_DEVICE Bernoulli<A> bernoulli(A pred, A t, bool activated) {
  return activated ? bernoulli_from_probability(pred, t) : bernoulli_from_logit(pred, t);
}

template <class A> GFL_HOST_DEVICE Term<A> qfl_term(A pred, A t, A beta, bool activated) {
  const Bernoulli<A> b = bernoulli(pred, t, activated);
  const A difference = b.p - t;
  const A distance = absolute(difference);
  const A factor = power(distance, beta);
  const A slope = sign(difference) * power_derivative(distance, beta);
  // p_pred first: it is 0 where the largest cross entropy times the slope overflows.
  return {factor * b.bce, slope * (b.p_pred * b.bce) + factor * b.bce_pred, factor * b.bce_target - slope * b.bce};
}

// Positive where t > 0. Weighted by the target or not, a positive has no modulating factor.
template <class A>
GFL_HOST_DEVICE Term<A> vfl_term(A pred, A t, A alpha, A gamma, bool iou_weighted, bool activated) {
  if (!(t > A(0))) {
    const Term<A> term = qfl_term(pred, t, gamma, activated);
    return {alpha * term.value, alpha * term.grad_pred, alpha * term.grad_target};
  }
  const Bernoulli<A> b = bernoulli(pred, t, activated);
  if (!iou_weighted) return {b.bce, b.bce_pred, b.bce_target};
  return {t * b.bce, t * b.bce_pred, b.bce + t * b.bce_target};
}

// A negative α means no balance between positives and negatives. t may be soft: α_t and p_t are linear in it.
template <class A> GFL_HOST_DEVICE Term<A> focal_term(A pred, A t, A alpha, A gamma, bool activated) {
  const Bernoulli<A> b = bernoulli(pred, t, activated);
  const bool balanced = alpha >= A(0);
  const A balance = balanced ? alpha * t + (A(1) - alpha) * (A(1) - t) : A(1);
  const A miss = b.q * t + b.p * (A(1) - t);  // 1 − p_t, to full relative precision for t of 0 or 1
  const A modulation = power(miss, gamma);
  const A factor = balance * modulation;
  const A slope = balance * power_derivative(miss, gamma);
  const A by_balance = balanced ? (A(2) * alpha - A(1)) * modulation * b.bce : A(0);
  return {factor * b.bce, slope * (A(1) - A(2) * t) * (b.p_pred * b.bce) + factor * b.bce_pred,
          by_balance + slope * (b.q - b.p) * b.bce + factor * b.bce_target};
}

}  // namespace gfl
