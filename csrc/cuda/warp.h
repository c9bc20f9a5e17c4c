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

// The least of the 32 lanes' numbers, in every lane; one instruction from sm_80 on. The tests on the host define
// GFL_BEFORE_SM80, for they have no architecture.
__device__ __forceinline__ unsigned warp_min(unsigned x) {
#if defined(GFL_BEFORE_SM80) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(kFullMask, x, offset);
    x = other < x ? other : x;
  }
  return x;
#else
  return __reduce_min_sync(kFullMask, x);
#endif
}

// Union of the bits of the 32 lanes, in every lane.
__device__ __forceinline__ unsigned warp_or(unsigned x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x |= __shfl_xor_sync(kFullMask, x, offset);
  return x;
}

}  // namespace gfl
