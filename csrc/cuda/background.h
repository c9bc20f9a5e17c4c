// SPDX-License-Identifier: Apache-2.0
// Quality focal loss against background, |σ(x)|^β · BCE(x, 0), which is what all but a few elements of a class map cost; and
// what tells the parameters that people train with from the others.
#pragma once
#include <cuda_runtime.h>

#include "terms/focal.h"
#include "terms/scalar.h"

namespace gfl::cuda {

// What people train with: squares, of logits, in fp32. The term is short then, and many can be under way at once.
struct FastPath {
  static constexpr bool wide = true, activated = false;
  static constexpr float exponent = 2;
};
// Anything else: a power, logits or probabilities. Long terms, above all in fp64: one at a time.
template <class A> struct General {
  static constexpr bool wide = false;
  A exponent;
  bool activated;
};

inline bool is_fast_path(double exponent, bool activated) { return exponent == FastPath::exponent && !activated; }

// Calls f with what serves these parameters and elements of T.
template <class T, class F> void dispatch_terms(double exponent, bool activated, const F& f) {
  if constexpr (sizeof(T) < 8) {
    if (is_fast_path(exponent, activated)) return f(FastPath{});
  }
  f(General<acc_t<T>>{static_cast<acc_t<T>>(exponent), activated});
}

// The loss of a score and its derivative by that, from one exponential; one alone costs no more than it must.
template <class A> __device__ __forceinline__ Term<A> background_term(const General<A>& by, A x) {
  return qfl_term(x, A(0), by.exponent, by.activated);
}
// β = 2 has a form of its own: p²·BCE, p²·(2(1 − p)·BCE + p).
__device__ __forceinline__ Term<float> background_term(const FastPath&, float x) {
  const float largest = std::numeric_limits<float>::max();
  const bool infinite = absolute(x) > largest;
  if (x > largest) x = largest;
  const float e = std::exp(-absolute(x));
  const float r = reciprocal_of_unit(e);
  const float p = x >= 0.0f ? r : e * r;
  const float q = x >= 0.0f ? e * r : r;
  const float entropy = (x > 0.0f ? x : 0.0f) + log1p_of_unit(e);
  return {p * p * entropy, infinite ? 0.0f : p * p * (2.0f * q * entropy + p), 0.0f};
}

}  // namespace gfl::cuda
