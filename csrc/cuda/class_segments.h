// SPDX-License-Identifier: Apache-2.0
// Boxes sorted by class, as segments: a segment is the boxes of one class. Where each begins is found on the device, in
// no particular order, which does not matter to kernels that give every segment to one block.
#pragma once
#include <cstdint>

#include "launch.h"

namespace gfl::cuda {

struct ClassSegments {
  const int64_t* label;  // [count] equal ones together; null for one segment
  int64_t count;
  int64_t* begin;              // [count] scratch
  unsigned long long* number;  // [1] scratch

  __device__ __forceinline__ int64_t size() const {
    return label == nullptr ? (count > 0 ? 1 : 0) : static_cast<int64_t>(*number);
  }
  __device__ __forceinline__ int64_t first(int64_t segment) const { return label == nullptr ? 0 : begin[segment]; }

  // Where the segment that begins at `first` ends. Called by whole blocks: each thread makes one probe per round.
  __device__ __forceinline__ int64_t end(int64_t first) const {
    if (label == nullptr) return count;
    int64_t low = first + 1, high = count;  // the end is one of these or between them
    while (low < high) {
      const int64_t step = (high - low + blockDim.x - 1) / blockDim.x, at = low + threadIdx.x * step;
      const int64_t inside = __syncthreads_count(at < high && label[at] == label[first] ? 1 : 0);
      if (inside == 0) return low;
      const int64_t beyond = low + inside * step;
      low += (inside - 1) * step + 1;
      if (beyond < high) high = beyond;
    }
    return low;
  }
};

static __global__ void find_segments_kernel(ClassSegments segments) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < segments.count; i += stride) {
    if (i == 0 || segments.label[i] != segments.label[i - 1]) segments.begin[atomicAdd(segments.number, 1ull)] = i;
  }
}

// Fills `begin` and `number`. Returns how many blocks there is work for.
inline unsigned find_segments(const ClassSegments& segments, cudaStream_t stream) {
  if (segments.label == nullptr) return 1;
  cudaMemsetAsync(segments.number, 0, sizeof(unsigned long long), stream);
  GFL_LAUNCH(find_segments_kernel, strided_grid(segments.count, 256), dim3(256), 0, stream, segments);
  constexpr int64_t most = kMaxBlocks < 1024 ? kMaxBlocks : 1024;
  return static_cast<unsigned>(segments.count < most ? segments.count : most);
}

}  // namespace gfl::cuda
