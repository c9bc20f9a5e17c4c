// SPDX-License-Identifier: Apache-2.0
// The element terms of common/focal.h for logits and a modulating exponent of 2, in fp32 and without a branch: one
// exponential, one logarithm and one division an element. Formulas and references are there.
#pragma once
#include "vector_math.h"

namespace gfl::GFL_ISA {

struct Term { Floats value, grad_pred, grad_target; };

struct Bernoulli {
  Floats x;        // the logit, an infinite one as the largest finite one
  Floats p, q;     // σ(x) and 1 − σ(x)
  Floats bce;      // −t·log p − (1−t)·log q
  Floats bce_pred, p_pred;  // their derivatives by the logit; 0 where it is infinite
};

inline Floats zero_where(Ints condition, Floats x) { return (Floats)(~condition & (Ints)x); }
inline Ints is_infinite(Floats x) { return absolute_of(x) > std::numeric_limits<float>::max(); }

inline Bernoulli bernoulli(Floats logit, Floats t) {
  Bernoulli b;
  b.x = clamp_infinite(logit);
  const Floats e = exp_of_negative(-absolute_of(b.x));
  const Floats r = 1.0f / (1.0f + e), er = e * r;
  b.p = b.x >= 0.0f ? r : er;
  b.q = b.x >= 0.0f ? er : r;
  b.bce = (b.x > 0.0f ? 1.0f - t : -t) * b.x + log1p_of_unit(e);
  const Ints infinite = is_infinite(logit);
  b.bce_pred = zero_where(infinite, b.p - t);
  b.p_pred = zero_where(infinite, er * r);
  return b;
}

inline Term qfl_term(Floats logit, Floats t) {
  const Bernoulli b = bernoulli(logit, t);
  const Floats difference = b.p - t, factor = difference * difference, slope = 2.0f * difference;
  // p_pred first: it is 0 where the largest cross entropy times the slope overflows.
  return {factor * b.bce, slope * (b.p_pred * b.bce) + factor * b.bce_pred, -factor * b.x - slope * b.bce};
}

// The same against a target of 0: p²·BCE, and p²·(2(1 − p)·BCE + p).
inline Term background_term(Floats x) {
  const Floats zero{};
  const Floats e = exp_of_negative(-absolute_of(x));
  const Floats r = 1.0f / (1.0f + e), er = e * r;
  const Floats p = x >= 0.0f ? r : er, q = x >= 0.0f ? er : r;
  const Floats linear = at_most(std::numeric_limits<float>::max(), at_least(0.0f, x));
  const Floats bce = linear + log1p_of_unit(e), factor = p * p;
  return {factor * bce, zero_where(is_infinite(x), factor * multiply_add(q + q, bce, p)), zero};
}

// `iou_weighted` is 1 or 0.
inline Term vfl_term(Floats logit, Floats t, float alpha, float iou_weighted) {
  const Bernoulli b = bernoulli(logit, t);
  const Floats difference = b.p - t, factor = alpha * difference * difference;
  const Floats slope = 2.0f * alpha * difference;
  const Floats weight = iou_weighted * t + (1.0f - iou_weighted);
  return {(t > 0.0f ? weight : factor) * b.bce,
          t > 0.0f ? weight * b.bce_pred : slope * (b.p_pred * b.bce) + factor * b.bce_pred,
          t > 0.0f ? iou_weighted * b.bce - weight * b.x : -factor * b.x - slope * b.bce};
}

// `unbalanced` is the weight 1 of both sides that a negative alpha asks for.
inline Term focal_term(Floats logit, Floats t, float alpha, bool unbalanced) {
  const Bernoulli b = bernoulli(logit, t);
  const Floats balance = unbalanced ? splat<Floats>(1.0f) : alpha * t + (1.0f - alpha) * (1.0f - t);
  const float by_balance = unbalanced ? 0.0f : 2.0f * alpha - 1.0f;
  const Floats miss = b.q * t + b.p * (1.0f - t), modulation = miss * miss;
  const Floats factor = balance * modulation, slope = 2.0f * balance * miss;
  return {factor * b.bce, slope * (1.0f - 2.0f * t) * (b.p_pred * b.bce) + factor * b.bce_pred,
          by_balance * modulation * b.bce + slope * (b.q - b.p) * b.bce - factor * b.x};
}

// The walk of the losses without a class sum. `term(logit, target)` is one of the above.
template <class T, class F>
void element_forward(const T* pred, const float* target, const F& term, float* loss, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const Floats x = load_floats(pred + i, end - i, 0.0f), t = load_floats(target + i, end - i, 0.0f);
    store_floats(term(x, t).value, end - i, loss + i);
  }
}

// Element i of the gradient lies at i · grad_stride; a null result is not written.
template <class T, class F>
void element_backward(const T* pred, const float* target, const F& term, const float* grad_loss, int64_t grad_stride,
                      T* grad_pred, float* grad_target, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const Floats x = load_floats(pred + i, end - i, 0.0f), t = load_floats(target + i, end - i, 0.0f);
    Floats g = splat<Floats>(*grad_loss);
    if (grad_stride == 1) g = load_floats(grad_loss + i, end - i, 0.0f);
    else if (grad_stride != 0) for (int j = 0; j < kWidth && i + j < end; ++j) g[j] = grad_loss[(i + j) * grad_stride];
    const Term result = term(x, t);
    if (grad_pred != nullptr) store_floats(g * result.grad_pred, end - i, grad_pred + i);
    if (grad_target != nullptr) store_floats(g * result.grad_target, end - i, grad_target + i);
  }
}

}  // namespace gfl::GFL_ISA
