// SPDX-License-Identifier: Apache-2.0
// Sums of terms over logits in place, with `scale` times their gradient from the same walk. A location's classes go
// into kLanes partial sums, class c into c % kLanes, which are added up in a tree: its loss has the same bits whether
// classes or locations are contiguous. The named functions are of a loss of class scores against background, by its
// fast path.
#pragma once
#include "row_sum.h"
#include "terms/score.h"

namespace gfl::GFL_ISA {

// For lambdas that are called in a loop and in its remainder: GCC does not inline them by itself, and a call would
// return its term through memory.
#define GFL_INLINED __attribute__((always_inline))

// Stands in for classes beyond the last: against a target of 0 it adds nothing.
constexpr float kNoLogit = -std::numeric_limits<float>::infinity();

// One location whose classes are contiguous, and the Term of each register by term_at(its first class, logits). Returns
// the location's loss.
template <bool kLoss, bool kGrad, class T, class TermAt>
inline float walk_row(const T* x, int64_t classes, float scale, T* grad, const TermAt& term_at) {
  RowSum sum;
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = c + part * kWidth;
      const Term<Floats> term = term_at(at, load_floats(x + at));
      if (kLoss) sum.parts[part] += term.value;
      if (kGrad) store_floats(scale * term.grad_pred, grad + at);
    }
  }
  for (int part = 0; c < classes; c += kWidth, ++part) {
    const Term<Floats> term = term_at(c, load_floats(x + c, classes - c, kNoLogit));
    if (kLoss) sum.parts[part] += term.value;
    if (kGrad) store_floats(scale * term.grad_pred, classes - c, grad + c);
  }
  return kLoss ? sum.total() : 0.0f;
}

template <class Loss> inline Term<Floats> background_term(Floats x) { return Loss::background(FastParams<Loss>{}, x); }

// One location whose classes are contiguous. Returns its loss.
template <class Loss, bool kLoss, bool kGrad, class T>
inline float background_row(const T* x, int64_t classes, float scale, T* grad) {
  return walk_row<kLoss, kGrad>(x, classes, scale, grad,
                                [](int64_t, Floats logits) { return background_term<Loss>(logits); });
}

// One location, its classes anywhere, and one of them, `without`, not counted.
template <class Loss, bool kLoss, bool kGrad, class T>
inline float background_row(const T* x, int64_t step, int64_t classes, int64_t without, float scale, T* grad,
                            int64_t grad_step) {
  RowSum sum;
  for (int64_t c = 0, part = 0; c < classes; c += kWidth, part = (part + 1) % kParts) {
    Floats logits = load_every(x + c * step, step, classes - c, kNoLogit);
    if (without >= c && without < c + kWidth) {
      float lanes[kWidth];
      store_floats(logits, lanes);
      lanes[without - c] = kNoLogit;
      logits = load_floats(lanes);
    }
    const Term<Floats> term = background_term<Loss>(logits);
    if (kLoss) sum.parts[part] += term.value;
    if (kGrad) store_every(scale * term.grad_pred, grad_step, classes - c, grad + c * grad_step);
  }
  return kLoss ? sum.total() : 0.0f;
}

// Up to kMost locations that are contiguous; `pitch` is from class to class. Their losses go to `sums`.
template <class Loss, int kMost, bool kLoss, bool kGrad, class T>
inline void background_columns(const T* x, int64_t pitch, int64_t count, int64_t classes, float scale, float* sums,
                               T* grad, int64_t grad_pitch) {
  alignas(64) float partial[kLoss ? kLanes : 1][kMost];
  if (kLoss) std::memset(partial, 0, sizeof partial);
  for (int64_t c = 0; c < classes; ++c, x += pitch, grad += kGrad ? grad_pitch : 0) {
    float* const part = partial[kLoss ? c % kLanes : 0];
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const Term<Floats> term = background_term<Loss>(load_floats(x + i));
      if (kLoss) store_floats(load_floats(part + i) + term.value, part + i);
      if (kGrad) store_floats(scale * term.grad_pred, grad + i);
    }
    if (i == count) continue;
    const Term<Floats> term = background_term<Loss>(load_floats(x + i, count - i, kNoLogit));
    if (kLoss) store_floats(load_floats(part + i) + term.value, part + i);
    if (kGrad) store_floats(scale * term.grad_pred, count - i, grad + i);
  }
  if (!kLoss) return;
  for (int many = kLanes / 2; many > 0; many /= 2) {
    for (int j = 0; j < many; ++j) {
      for (int64_t i = 0; i < count; i += kWidth) {
        store_floats(load_floats(partial[j] + i) + load_floats(partial[j + many] + i), partial[j] + i);
      }
    }
  }
  std::memcpy(sums, partial[0], sizeof(float) * static_cast<size_t>(count));
}

}  // namespace gfl::GFL_ISA
