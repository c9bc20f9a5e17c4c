// SPDX-License-Identifier: Apache-2.0
// Rows of four coordinates, a thread each: by one or two vector accesses where the row is dense and aligned, else one
// by one. Which of the two is decided once a launch.
#pragma once
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "terms/scalar.h"

namespace gfl::cuda {

constexpr int kFoursThreads = 256;
constexpr int64_t kFoursMaxBlocks = 1 << 16;

inline dim3 fours_grid(int64_t rows) {
  const int64_t blocks = (rows + kFoursThreads - 1) / kFoursThreads;
  return dim3(static_cast<unsigned>(blocks < kFoursMaxBlocks ? blocks : kFoursMaxBlocks));
}

// Four elements of 2, 4 or 8 bytes as the GPU moves them.
template <int bytes> struct FourWords;
template <> struct FourWords<2> { using type = uint2; };
template <> struct FourWords<4> { using type = uint4; };
template <> struct FourWords<8> { struct type { uint4 low, high; }; };

template <class T> bool dense_fours(const void* data, int64_t stride_outer, int64_t stride_inner) {
  const uintptr_t bytes = sizeof(T) == 2 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride_outer % 4 == 0 && stride_inner % 4 == 0;
}

template <class T>
__device__ __forceinline__ void load_four(const T* from, int64_t stride, bool dense, acc_t<T> (&to)[4]) {
  if (dense) {
    using Words = typename FourWords<sizeof(T)>::type;
    const Words words = *reinterpret_cast<const Words*>(from);
    T element[4];
    memcpy(element, &words, sizeof words);
    for (int i = 0; i < 4; ++i) to[i] = load(&element[i]);
    return;
  }
  for (int i = 0; i < 4; ++i) to[i] = load(from + i * stride);
}

template <class T> __device__ __forceinline__ void store_four(T* to, bool dense, const acc_t<T> (&from)[4]) {
  if (dense) {
    using Words = typename FourWords<sizeof(T)>::type;
    T element[4];
    for (int i = 0; i < 4; ++i) store(&element[i], from[i]);
    Words words;
    memcpy(&words, element, sizeof words);
    *reinterpret_cast<Words*>(to) = words;
    return;
  }
  for (int i = 0; i < 4; ++i) store(to + i, from[i]);
}

}  // namespace gfl::cuda
