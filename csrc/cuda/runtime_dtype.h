// SPDX-License-Identifier: Apache-2.0
// Elements of arrays whose dtype is known at run time: f64 if the accumulator A is double, else f32, f16 or bf16.
#pragma once
#include "terms/scalar.h"

namespace gfl::cuda {

template <class A> __device__ __forceinline__ A load_as(const void* data, DType dtype, int64_t i) {
  if constexpr (sizeof(A) == 8) {
    return static_cast<const double*>(data)[i];
  } else {
    if (dtype == DType::f16) return load(static_cast<const half_t*>(data) + i);
    if (dtype == DType::bf16) return load(static_cast<const bfloat16_t*>(data) + i);
    return static_cast<const float*>(data)[i];
  }
}

template <class A> __device__ __forceinline__ void store_as(void* data, DType dtype, int64_t i, A value) {
  if constexpr (sizeof(A) == 8) {
    static_cast<double*>(data)[i] = value;
  } else {
    if (dtype == DType::f16) store(static_cast<half_t*>(data) + i, value);
    else if (dtype == DType::bf16) store(static_cast<bfloat16_t*>(data) + i, value);
    else static_cast<float*>(data)[i] = value;
  }
}

}  // namespace gfl::cuda
