// SPDX-License-Identifier: Apache-2.0
// The losses of class scores, element by element: value and derivatives, in forms that stay finite for logits of ±1e4.
// Every term is written once, over a value `V` that is a double, a float or, in csrc/cpu/simd, a register of floats. A
// new loss is a struct here and its name in ScoreLosses at the end; every walk, launcher and binding follows.
//
//   Qfl    |t − σ(x)|^β · BCE(x, t)                                       Li et al., arXiv 2006.04388, eq. 2
//   Focal  α_t (1 − p_t)^γ · BCE(x, t)                                    Lin et al., arXiv 1708.02002, eq. 5
//   Vfl    w(x, t) · BCE(x, t), w = t (or 1) if t > 0 else α|σ(x) − t|^γ  Zhang et al., arXiv 2008.13367, eq. 2
//   Mal    w · BCE(x, t^γ), w = 1 if t > 0 else σ(x)^γ, a constant        Huang et al., arXiv 2412.04234
//   SoftBce  BCE(x, t)
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "gfl/score.h"
#include "host_device.h"
#include "log1p.h"
#if defined(GFL_ISA)
#include "cpu/simd/score_math.h"
#endif

// A term is called twice, for whole registers and for the remainder of a row, and GCC does not inline it by itself.
#if defined(__CUDACC__)
#define GFL_TERM GFL_HOST_DEVICE
#else
#define GFL_TERM inline __attribute__((always_inline))
#endif

namespace gfl {
GFL_ISA_OPEN

// --- arithmetic of scalars; score_math.h has it for registers --------------------------------------------------------
#if !defined(GFL_ISA)
template <class A> GFL_TERM A splat(A x) { return A(x); }
template <class A> GFL_TERM A absolute(A x) { return x < A(0) ? -x : x; }
template <class A> GFL_TERM A multiply_add(A a, A b, A c) { return a * b + c; }
template <class A> GFL_TERM A sign(A x) { return A((A(0) < x) - (x < A(0))); }
template <class A> GFL_TERM A exp_of_negative(A x) { return std::exp(x); }
template <class A> GFL_TERM A square_root(A x) { return std::sqrt(x); }
template <class A> GFL_TERM A general_power(A base, A exponent) { return std::pow(base, exponent); }
template <class A> GFL_TERM bool is_infinite(A x) { return absolute(x) > std::numeric_limits<A>::max(); }
template <class A> GFL_TERM A zero_where(bool condition, A x) { return condition ? A(0) : x; }
template <class A> GFL_TERM A clamp_infinite(A x) {
  const A largest = std::numeric_limits<A>::max();
  return is_infinite(x) ? (x < A(0) ? -largest : largest) : x;
}
// max(0, x), an infinite one as the largest finite one; NaN stays.
template <class A> GFL_TERM A finite_positive_part(A x) {
  const A largest = std::numeric_limits<A>::max();
  if (x > largest) x = largest;
  return x < A(0) ? A(0) : x;
}
// log(1 + e) and 1/(1 + e) for e in [0, 1]. On the GPU, in fp32, a polynomial and a division good to 2 ulp: the
// library's general forms cost more than all else in a term.
template <class A> GFL_TERM A log1p_of_unit(A e) {
#if defined(GFL_CUDA_TYPES)
  if constexpr (sizeof(A) == 4) return log1p_polynomial(e);
#endif
  return std::log1p(e);
}
template <class A> GFL_TERM A reciprocal_of_unit(A e) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(A) == 4) return __fdividef(1.0f, 1.0f + e);
#endif
  return A(1) / (A(1) + e);
}
#endif

// base^exponent for base ≥ 0 with its derivative. An exponent below 1 has no finite derivative at 0; 0 is taken there,
// and for subnormal bases, where the power would overflow. The exponents that detectors use do not go through pow.
template <class V> struct Power { V value, slope; };

template <class V, class E> GFL_TERM Power<V> power(V base, E exponent) {
  if (exponent == E(2)) return {base * base, 2.0f * base};
  if (exponent == E(1)) return {base, splat<V>(1.0f)};
  if (exponent == E(1.5)) {
    const V root = square_root(base);
    return {base * root, 1.5f * root};
  }
  const auto subnormal = absolute(base) < std::numeric_limits<E>::min();
  return {general_power(base, exponent), zero_where(subnormal, exponent * general_power(base, exponent - E(1)))};
}

// The same of |x|, whose derivative at 0 is 0 as torch's.
template <class V, class E> GFL_TERM Power<V> absolute_power(V x, E exponent) {
  if (exponent == E(2)) return {x * x, 2.0f * x};
  const Power<V> p = power(absolute(x), exponent);
  return {p.value, sign(x) * p.slope};
}

// --- parameters and results of a term -------------------------------------------------------------------------------
// Logits and the exponent that detectors train with, known to the compiler: terms are short, and many can be in
// flight.
template <class Loss> struct FastParams {
  static constexpr bool fast = true, activated = false;
  static constexpr float exponent = Loss::fast_exponent;
  float second, third;
};
// Any exponent, logits or probabilities.
template <class S> struct GeneralParams {
  static constexpr bool fast = false;
  S exponent, second, third;
  bool activated;
};

template <class Loss> FastParams<Loss> fast_params(const ScoreInput& in) {
  return {static_cast<float>(in.params[1]), static_cast<float>(in.params[2])};
}
template <class S> GeneralParams<S> general_params(const ScoreInput& in) {
  return {static_cast<S>(in.params[0]), static_cast<S>(in.params[1]), static_cast<S>(in.params[2]), in.activated};
}
template <class Loss> bool is_fast(const ScoreInput& in) {
  return in.dtype != DType::f64 && !in.activated && (Loss::params == 0 || in.params[0] == Loss::fast_exponent);
}

// Value of one element term and its derivatives by score and target.
template <class V> struct Term { V value, grad_pred, grad_target; };

// Probability, its complement and the binary cross entropy of a score against a target, from one exponential.
template <class V> struct Bernoulli {
  V p, q;        // σ(x) and 1 − σ(x), each to full relative precision
  V bce;         // −t·log p − (1−t)·log q
  V bce_pred;    // d bce / d pred
  V bce_target;  // d bce / d target
  V p_pred;      // d p / d pred
};

// An infinite logit counts as the largest finite one, so that 0 · ∞ never appears: a class masked with −∞ costs
// nothing.
template <class V> GFL_TERM Bernoulli<V> bernoulli_from_logit(V logit, V t) {
  const auto infinite = is_infinite(logit);
  const V x = clamp_infinite(logit);
  const V e = exp_of_negative(-absolute(x)), r = reciprocal_of_unit(e), er = e * r;
  Bernoulli<V> b;
  b.p = x >= 0.0f ? r : er;
  b.q = x >= 0.0f ? er : r;
  b.bce = (x > 0.0f ? 1.0f - t : -t) * x + log1p_of_unit(e);  // 1 − t first: x − x·t would cancel
  b.bce_pred = zero_where(infinite, b.p - t);
  b.bce_target = -x;
  b.p_pred = zero_where(infinite, er * r);
  return b;
}

// Outside [0, 1] there is no probability: NaN. The logarithms are floored at −100 and the derivative's denominator at
// 1e-12, as torch's binary_cross_entropy does.
template <class A> GFL_TERM Bernoulli<A> bernoulli_from_probability(A p, A t) {
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

template <class P, class V> GFL_TERM Bernoulli<V> bernoulli(const P& params, V pred, V t) {
  if constexpr (!P::fast) {
    if (params.activated) return bernoulli_from_probability(pred, t);
  }
  return bernoulli_from_logit(pred, t);
}

// m · BCE, where m has the derivatives `slope` by p and `by_target` by t.
template <class V> GFL_TERM Term<V> modulated(const Bernoulli<V>& b, V m, V slope, V by_target) {
  // p_pred first: it is 0 where the largest cross entropy times the slope overflows.
  return {m * b.bce, slope * (b.p_pred * b.bce) + m * b.bce_pred, by_target * b.bce + m * b.bce_target};
}

// --- the losses ------------------------------------------------------------------------------------------------------
// Each has its stem as `name`; how many `params` it takes, the exponent first; `summed`, whether its losses are those
// of rows; the exponent of its fast path; and its term. `background` is the term against 0, where grad_target is not
// read.
template <class Loss> struct ScoreLoss {  // NOLINT(bugprone-crtp-constructor-accessibility): an aggregate
  static constexpr float fast_exponent = 2;
  template <class P, class V> static GFL_TERM Term<V> background(const P& params, V pred) {
    return Loss::term(params, pred, V{});
  }
};

struct Qfl : ScoreLoss<Qfl> {  // β
  static constexpr const char* name = "qfl";
  static constexpr int params = 1;
  static constexpr bool summed = true;
  template <class P, class V> static GFL_TERM Term<V> term(const P& p, V pred, V t) {
    const Bernoulli<V> b = bernoulli(p, pred, t);
    const Power<V> m = absolute_power(b.p - t, p.exponent);
    return modulated(b, m.value, m.slope, -m.slope);
  }
  // Most of what a class map costs has a form of its own: p²·BCE, p²·(2(1 − p)·BCE + p).
  template <class P, class V> static GFL_TERM Term<V> background(const P& params, V x) {
    if constexpr (!P::fast) return term(params, x, V{});
    const V e = exp_of_negative(-absolute(x)), r = reciprocal_of_unit(e), er = e * r;
    const V p = x >= 0.0f ? r : er, q = x >= 0.0f ? er : r;
    const V bce = finite_positive_part(x) + log1p_of_unit(e), factor = p * p;
    return {factor * bce, zero_where(is_infinite(x), factor * multiply_add(q + q, bce, p)), V{}};
  }
};

struct Focal : ScoreLoss<Focal> {  // γ, α; a negative α means no balance. t may be soft: α_t and p_t are linear in it
  static constexpr const char* name = "focal";
  static constexpr int params = 2;
  static constexpr bool summed = false;
  template <class P, class V> static GFL_TERM Term<V> term(const P& p, V pred, V t) {
    const Bernoulli<V> b = bernoulli(p, pred, t);
    const auto alpha = p.second;
    const bool balanced = alpha >= 0.0f;
    const V miss = b.q * t + b.p * (1.0f - t);  // 1 − p_t, to full relative precision for t of 0 or 1
    const Power<V> m = power(miss, p.exponent);
    const V balance = balanced ? alpha * t + (1.0f - alpha) * (1.0f - t) : splat<V>(1.0f);
    const V slope = balance * m.slope, by_balance = (balanced ? 2.0f * alpha - 1.0f : 0.0f) * m.value;
    return modulated(b, balance * m.value, slope * (1.0f - 2.0f * t), slope * (b.q - b.p) + by_balance);
  }
};

struct Vfl : ScoreLoss<Vfl> {  // γ, α, whether a positive counts by its target. A positive has no modulating factor
  static constexpr const char* name = "vfl";
  static constexpr int params = 3;
  static constexpr bool summed = false;
  template <class P, class V> static GFL_TERM Term<V> term(const P& p, V pred, V t) {
    const Bernoulli<V> b = bernoulli(p, pred, t);
    const auto alpha = p.second, weighted = p.third;
    const Power<V> m = absolute_power(b.p - t, p.exponent);
    const V slope = alpha * m.slope;
    return modulated(b, t > 0.0f ? weighted * t + (1.0f - weighted) : alpha * m.value, t > 0.0f ? V{} : slope,
                     t > 0.0f ? splat<V>(weighted) : -slope);
  }
};

struct Mal : ScoreLoss<Mal> {  // γ. The weight of a negative has no gradient
  static constexpr const char* name = "mal";
  static constexpr int params = 1;
  static constexpr bool summed = true;
  static constexpr float fast_exponent = 1.5;
  template <class P, class V> static GFL_TERM Term<V> term(const P& p, V pred, V t) {
    const auto negative = t <= 0.0f;  // NaN is none, and stays
    const Power<V> aim = power(t, p.exponent);
    const Bernoulli<V> b = bernoulli(p, pred, negative ? V{} : aim.value);
    const V w = negative ? power(b.p, p.exponent).value : splat<V>(1.0f);
    return {w * b.bce, w * b.bce_pred, negative ? V{} : b.bce_target * aim.slope};
  }
  template <class P, class V> static GFL_TERM Term<V> background(const P& p, V pred) {
    const Bernoulli<V> b = bernoulli(p, pred, V{});
    const V w = power(b.p, p.exponent).value;
    return {w * b.bce, w * b.bce_pred, V{}};
  }
};

struct SoftBce : ScoreLoss<SoftBce> {
  static constexpr const char* name = "soft_bce";
  static constexpr int params = 0;
  static constexpr bool summed = true;
  template <class P, class V> static GFL_TERM Term<V> term(const P& p, V pred, V t) {
    const Bernoulli<V> b = bernoulli(p, pred, t);
    return {b.bce, b.bce_pred, b.bce_target};
  }
  // log(1 + e^x) and σ(x).
  template <class P, class V> static GFL_TERM Term<V> background(const P& params, V x) {
    if constexpr (!P::fast) return term(params, x, V{});
    const V e = exp_of_negative(-absolute(x)), r = reciprocal_of_unit(e);
    return {finite_positive_part(x) + log1p_of_unit(e), zero_where(is_infinite(x), x >= 0.0f ? r : e * r), V{}};
  }
};

// The quality focal term by itself, for the head's loss.
template <class A> GFL_TERM Term<A> qfl_term(A pred, A t, A beta, bool activated) {
  return Qfl::term(GeneralParams<A>{beta, A(0), A(0), activated}, pred, t);
}

// Which losses there are.
template <class... Loss> struct ScoreLossList {
  // Calls f(loss, index) for the loss of that name, if there is one.
  template <class F> static bool find(const char* name, const F& f) {
    int index = -1;
    return ((++index, std::strcmp(name, Loss::name) == 0 && (f(Loss{}, index), true)) || ...);
  }
  template <class F> static void for_each(const F& f) { (f(Loss{}), ...); }
  // The term of loss number `index`, which is not known before the program runs, among those that are `summed` or not.
  template <bool summed, class P, class V> static GFL_TERM Term<V> term(int index, const P& params, V pred, V t) {
    Term<V> result{};
    int i = 0;
    ((index == i++ && Loss::summed == summed ? (void)(result = Loss::term(params, pred, t)) : void()), ...);
    return result;
  }
};
using ScoreLosses = ScoreLossList<Qfl, Focal, Vfl, Mal, SoftBce>;

GFL_ISA_CLOSE
}  // namespace gfl
