// SPDX-License-Identifier: Apache-2.0
// Reductions within a warp, in a fixed order.
#pragma once
#include <cuda_runtime.h>

namespace gfl {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Sum over the 32 lanes, the same bits in every lane: a butterfly adds the same pairs in every run.
template <class A> __device__ __forceinline__ A warp_sum(A x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

// Union of the bits of the 32 lanes, in every lane.
__device__ __forceinline__ unsigned warp_or(unsigned x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x |= __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

}  // namespace gfl
