// SPDX-License-Identifier: Apache-2.0
// The element terms of common/focal.h for logits and a modulating exponent of 2, in fp32 and without a branch: one
// exponential, one logarithm and one division an element. Formulas and references are there.
#pragma once
#include "vector_math.h"

namespace gfl::GFL_ISA {

struct Term { float value, grad_pred, grad_target; };

struct Bernoulli {
  float x;        // the logit, an infinite one as the largest finite one
  float p, q;     // σ(x) and 1 − σ(x)
  float bce;      // −t·log p − (1−t)·log q
  float bce_pred, p_pred;  // their derivatives by the logit; 0 where it is infinite
};

inline Bernoulli bernoulli(float logit, float t) {
  Bernoulli b;
  b.x = clamp_infinite(logit);
  const float e = exp_of_negative(-absolute_of(b.x));
  const float r = 1.0f / (1.0f + e), er = e * r;
  b.p = b.x >= 0.0f ? r : er;
  b.q = b.x >= 0.0f ? er : r;
  b.bce = (b.x > 0.0f ? 1.0f - t : -t) * b.x + log1p_of_unit(e);
  const float finite = absolute_of(logit) > std::numeric_limits<float>::max() ? 0.0f : 1.0f;
  b.bce_pred = (b.p - t) * finite;
  b.p_pred = er * r * finite;
  return b;
}

inline Term qfl_term(float logit, float t) {
  const Bernoulli b = bernoulli(logit, t);
  const float difference = b.p - t, factor = difference * difference, slope = 2.0f * difference;
  // p_pred first: it is 0 where the largest cross entropy times the slope overflows.
  return {factor * b.bce, slope * (b.p_pred * b.bce) + factor * b.bce_pred, -factor * b.x - slope * b.bce};
}

// `iou_weighted` is 1 or 0: a float, since two conditions in one blend keep the compiler from vector code.
inline Term vfl_term(float logit, float t, float alpha, float iou_weighted) {
  const Bernoulli b = bernoulli(logit, t);
  const float difference = b.p - t, factor = alpha * difference * difference;
  const float slope = 2.0f * alpha * difference;
  const float weight = iou_weighted * t + (1.0f - iou_weighted);
  const bool positive = t > 0.0f;
  return {(positive ? weight : factor) * b.bce,
          positive ? weight * b.bce_pred : slope * (b.p_pred * b.bce) + factor * b.bce_pred,
          positive ? iou_weighted * b.bce - weight * b.x : -factor * b.x - slope * b.bce};
}

// `unbalanced` is the weight 1 of both sides that a negative alpha asks for.
inline Term focal_term(float logit, float t, float alpha, bool unbalanced) {
  const Bernoulli b = bernoulli(logit, t);
  const float balance = unbalanced ? 1.0f : alpha * t + (1.0f - alpha) * (1.0f - t);
  const float by_balance = unbalanced ? 0.0f : 2.0f * alpha - 1.0f;
  const float miss = b.q * t + b.p * (1.0f - t), modulation = miss * miss;
  const float factor = balance * modulation, slope = 2.0f * balance * miss;
  return {factor * b.bce, slope * (1.0f - 2.0f * t) * (b.p_pred * b.bce) + factor * b.bce_pred,
          by_balance * modulation * b.bce + slope * (b.q - b.p) * b.bce - factor * b.x};
}

// The walk of the losses without a class sum. `term(logit, target)` is one of the above.
template <class T, class F>
void element_forward(const T* pred, const float* target, const F& term, float* loss, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    float x[kLanes], t[kLanes];
    load_lanes(pred + i, end - i, 0.0f, x);
    load_lanes(target + i, end - i, 0.0f, t);
    GFL_LANES(j) x[j] = term(x[j], t[j]).value;
    store_lanes(x, end - i, loss + i);
  }
}

// Element i of the gradient lies at i · grad_stride; a null result is not written.
template <class T, class F>
void element_backward(const T* pred, const float* target, const F& term, const float* grad_loss, int64_t grad_stride,
                      T* grad_pred, float* grad_target, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    float x[kLanes], t[kLanes], g[kLanes];
    load_lanes(pred + i, end - i, 0.0f, x);
    load_lanes(target + i, end - i, 0.0f, t);
    if (grad_stride == 1) load_lanes(grad_loss + i, end - i, 0.0f, g);
    else for (int j = 0; j < kLanes; ++j) g[j] = i + j < end ? grad_loss[(i + j) * grad_stride] : 0.0f;
    GFL_LANES(j) {
      const Term result = term(x[j], t[j]);
      x[j] = g[j] * result.grad_pred;
      t[j] = g[j] * result.grad_target;
    }
    if (grad_pred != nullptr) store_lanes(x, end - i, grad_pred + i);
    if (grad_target != nullptr) store_lanes(t, end - i, grad_target + i);
  }
}

}  // namespace gfl::GFL_ISA
