// SPDX-License-Identifier: Apache-2.0
// Quality focal loss against background, |σ(x)|^β · BCE(x, 0), which is what all but a few elements of a class map cost.
#pragma once
#include <cuda_runtime.h>

#include "focal.h"

namespace gfl::cuda {

template <class A> struct Background {
  A beta;
  __device__ __forceinline__ A loss(A x) const { return qfl_term(x, A(0), beta, false).value; }
  __device__ __forceinline__ A gradient(A x) const { return qfl_term(x, A(0), beta, false).grad_pred; }
};

// β = 2 has a form of its own: p²·BCE, p²·(2(1 − p)·BCE + p).
struct Square {
  float p, q, entropy;
  __device__ __forceinline__ explicit Square(float x) {
    const float largest = std::numeric_limits<float>::max();
    if (x > largest) x = largest;
    const float e = std::exp(-absolute(x));
    const float r = reciprocal_of_unit(e);
    p = x >= 0.0f ? r : e * r;
    q = x >= 0.0f ? e * r : r;
    entropy = (x > 0.0f ? x : 0.0f) + log1p_of_unit(e);
  }
};
template <> struct Background<float> {
  float beta;
  __device__ __forceinline__ float loss(float x) const {
    if (beta != 2.0f) return qfl_term(x, 0.0f, beta, false).value;
    const Square s(x);
    return s.p * s.p * s.entropy;
  }
  __device__ __forceinline__ float gradient(float x) const {
    if (beta != 2.0f) return qfl_term(x, 0.0f, beta, false).grad_pred;
    const Square s(x);
    return absolute(x) > std::numeric_limits<float>::max() ? 0.0f : s.p * s.p * (2.0f * s.q * s.entropy + s.p);
  }
};

}  // namespace gfl::cuda
