// SPDX-License-Identifier: Apache-2.0
// Rows of four coordinates, one thread per row: by one or two vector accesses where the row is dense and aligned, else
// one by one. Which of the two is decided once per launch.
#pragma once
#include <cstdint>

#include "launch.h"
#include "terms/scalar.h"
#include "vec.h"

namespace gfl::cuda {

constexpr int kFoursThreads = 256;

inline dim3 fours_grid(int64_t rows) { return strided_grid(rows, kFoursThreads); }

template <class T> bool dense_fours(const void* data, int64_t stride_outer, int64_t stride_inner) {
  return is_aligned<kVecBytes<T, 4>>(data) && stride_outer % 4 == 0 && stride_inner % 4 == 0;
}

template <class T>
__device__ __forceinline__ void load_four(const T* from, int64_t stride, bool dense, acc_t<T> (&to)[4]) {
  if (dense) {
    T element[4];
    load_vec(from, element);
    for (int i = 0; i < 4; ++i) to[i] = load(&element[i]);
    return;
  }
  for (int i = 0; i < 4; ++i) to[i] = load(from + i * stride);
}

template <class T> __device__ __forceinline__ void store_four(T* to, bool dense, const acc_t<T> (&from)[4]) {
  if (dense) {
    T element[4];
    for (int i = 0; i < 4; ++i) store(&element[i], from[i]);
    store_vec(to, element);
    return;
  }
  for (int i = 0; i < 4; ++i) store(to + i, from[i]);
}

}  // namespace gfl::cuda
