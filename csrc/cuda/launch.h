// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel and to reach dynamic shared memory, so that the same file also runs without a GPU
// (csrc/tests/cuda_on_host puts its own cuda_runtime.h first and defines GFL_CUDA_ON_HOST).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gfl {

// Blocks of a kernel that strides over the rest of its work: enough to fill any GPU. Few on the host, so that they go
// round more than once on inputs of a test's size.
#if defined(GFL_CUDA_ON_HOST)
constexpr int64_t kMaxBlocks = 2;
#else
constexpr int64_t kMaxBlocks = 1 << 16;
#endif

inline dim3 strided_grid(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

}  // namespace gfl

#if !defined(GFL_CUDA_ON_HOST)

// A kernel whose template arguments hold a comma is passed in parentheses: GFL_LAUNCH((kernel<float, 4>), …).
#define GFL_LAUNCH(kernel, grid, block, smem, stream, ...) (kernel)<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)

namespace gfl {
// Dynamic shared memory of the running block. One declaration for every type; the alignment is that of the widest load.
template <class T> __device__ __forceinline__ T* shared() {
  extern __shared__ __align__(16) unsigned char gfl_dynamic_shared[];
  return reinterpret_cast<T*>(gfl_dynamic_shared);
}
}  // namespace gfl

#endif
