// SPDX-License-Identifier: Apache-2.0
// The candidates of multiclass NMS on the GPU, in order: counted, and gathered once the caller has room for them.
//
//   scores [rows, classes] score_dtype  read twice    boxes [rows, 4] or [rows, 4·classes] dtype  read where gathered
//   gathered boxes [candidates, 4] dtype, scores score_dtype, labels int64   write
//   first [tiles] int64   scratch: the number of candidates before each tile
// A tile is 4096 consecutive pairs, one per block; a candidate's place is the number of candidates in earlier tiles, in
// earlier warps of its tile, and before it in its warp. Three launches, the second of one block. Repeatable: nothing
// depends on the order of execution.
#include "gfl/select.h"

#include "launch.h"
#include "terms/scalar.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 16;  // pairs per thread, 256 apart
constexpr int kTile = kThreads * kEach;
constexpr int kWords = kTile / kWarp;  // a word is what a warp sees at once
constexpr int kScanThreads = 1024;

int64_t tiles_of(const MulticlassInput& in) { return (in.rows * in.classes + kTile - 1) / kTile; }

// Whether a pair is a candidate, by bits: words[w] has those of the pairs [32w, 32w + 32) of the tile.
template <class S> __device__ __forceinline__ void find_candidates(const MulticlassInput& in, uint32_t* words) {
  const acc_t<S> threshold = static_cast<acc_t<S>>(in.score_threshold);
  const int64_t pairs = in.rows * in.classes, begin = int64_t(blockIdx.x) * kTile;
  for (int k = 0; k < kEach; ++k) {
    const int place = k * kThreads + static_cast<int>(threadIdx.x);
    const int64_t pair = begin + place, row = pair / in.classes;
    bool above = false;
    if (pair < pairs) {
      const int64_t at = row * in.stride_row + (pair - row * in.classes) * in.stride_class;
      above = load(static_cast<const S*>(in.scores) + at) > threshold;
    }
    const uint32_t word = __ballot_sync(kFullMask, above);
    if (place % kWarp == 0) words[place / kWarp] = word;
  }
  __syncthreads();
}

template <class S>
__global__ void __launch_bounds__(kThreads) multiclass_count_kernel(MulticlassInput in, int64_t* first) {
  uint32_t* words = shared<uint32_t>();  // [kWords]
  find_candidates<S>(in, words);
  if (threadIdx.x >= kWarp) return;
  int count = 0;
  for (int w = static_cast<int>(threadIdx.x); w < kWords; w += kWarp) count += __popc(words[w]);
  count = warp_sum(count);
  if (threadIdx.x == 0) first[blockIdx.x] = count;
}

// Sum over the lanes up to this one.
template <class I> __device__ __forceinline__ I warp_prefix(I x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const I other = __shfl_up_sync(kFullMask, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// Counts become the sums of those before.
__global__ void __launch_bounds__(kScanThreads) multiclass_scan_kernel(int64_t* first, int64_t tiles, int64_t* total) {
  long long* of_warp = shared<long long>();  // [32]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  long long before = 0;
  for (int64_t base = 0; base < tiles; base += kScanThreads) {
    const int64_t tile = base + threadIdx.x;
    const long long mine = tile < tiles ? first[tile] : 0;
    const long long through = warp_prefix(mine);
    if (lane == kWarp - 1) of_warp[warp] = through;
    __syncthreads();
    const long long warps = warp_prefix(of_warp[lane]);
    const long long earlier = __shfl_sync(kFullMask, warps, warp > 0 ? warp - 1 : 0);
    if (tile < tiles) first[tile] = before + (warp > 0 ? earlier : 0) + through - mine;
    before += __shfl_sync(kFullMask, warps, kWarp - 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = before;
}

template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    multiclass_gather_kernel(MulticlassInput in, const int64_t* first, T* boxes, S* scores, int64_t* labels) {
  uint32_t* words = shared<uint32_t>();                  // [kWords]
  int* before = reinterpret_cast<int*>(words + kWords);  // [kWords]: candidates of the words before each
  find_candidates<S>(in, words);
  if (threadIdx.x < kWarp) {
    int sum = 0;
    for (int base = 0; base < kWords; base += kWarp) {
      const int w = base + static_cast<int>(threadIdx.x), mine = __popc(words[w]), through = warp_prefix(mine);
      before[w] = sum + through - mine;
      sum += __shfl_sync(kFullMask, through, kWarp - 1);
    }
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int k = 0; k < kEach; ++k) {
    const int place = k * kThreads + static_cast<int>(threadIdx.x);
    const uint32_t word = words[place / kWarp];
    if ((word >> lane & 1u) == 0) continue;
    const int64_t pair = int64_t(blockIdx.x) * kTile + place, row = pair / in.classes, c = pair - row * in.classes;
    const int64_t to = first[blockIdx.x] + before[place / kWarp] + __popc(word & ((1u << lane) - 1u));
    const T* from = static_cast<const T*>(in.boxes) + row * in.stride_box;
    if (in.per_class) from += 4 * c * in.stride_coordinate;
    for (int j = 0; j < 4; ++j) boxes[to * 4 + j] = from[j * in.stride_coordinate];
    scores[to] = static_cast<const S*>(in.scores)[row * in.stride_row + c * in.stride_class];
    labels[to] = c;
  }
}

}  // namespace

size_t multiclass_workspace_bytes(const MulticlassInput& in) {
  return sizeof(int64_t) * static_cast<size_t>(tiles_of(in));
}

cudaError_t multiclass_count(const MulticlassInput& in, void* workspace, int64_t* total, cudaStream_t stream) {
  const int64_t tiles = tiles_of(in);
  if (tiles >= int64_t{1} << 31) return cudaErrorInvalidValue;
  int64_t* const first = static_cast<int64_t*>(workspace);
  if (tiles > 0) {
    dispatch(in.score_dtype, [&](auto s) {
      GFL_LAUNCH(multiclass_count_kernel<decltype(s)>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
                 sizeof(uint32_t) * kWords, stream, in, first);
    });
  }
  GFL_LAUNCH(multiclass_scan_kernel, dim3(1), dim3(kScanThreads), sizeof(long long) * kWarp, stream, first, tiles,
             total);
  return cudaGetLastError();
}

cudaError_t multiclass_gather(const MulticlassInput& in, const void* workspace, void* boxes, void* scores,
                              int64_t* labels, cudaStream_t stream) {
  const int64_t tiles = tiles_of(in);
  if (tiles == 0) return cudaSuccess;
  dispatch(in.score_dtype, [&](auto s) {
    using S = decltype(s);
    dispatch(in.dtype, [&](auto t) {
      using T = decltype(t);
      GFL_LAUNCH((multiclass_gather_kernel<S, T>), dim3(static_cast<unsigned>(tiles)), dim3(kThreads),
                 (sizeof(uint32_t) + sizeof(int)) * kWords, stream, in, static_cast<const int64_t*>(workspace),
                 static_cast<T*>(boxes), static_cast<S*>(scores), labels);
    });
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
