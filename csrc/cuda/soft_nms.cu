// SPDX-License-Identifier: Apache-2.0
// Soft-NMS on the GPU: one block per class, one barrier per box that is taken.
//
//   grouped [count] int64 read: boxes class by class     labels [count] int64 read: their classes, or null
//   boxes [count, 4] dtype, scores [count] score_dtype   read once
//   keep [count] uint8, final_scores [count] A           write, by index of the box
//   box [count] Box<A>, score [count] A, left [count] uint8, by position in `grouped`   scratch
// Each thread owns every 512th box of its class: in one pass over them it decays what the box just taken overlaps and
// finds the best of what is left; the block's best is taken next. Bytes per box taken: the class's scratch once, from
// the caches. Arithmetic in A, the exponential in double, as on the CPU. Repeatable bit for bit: a class belongs to one
// block, and the greatest of (score, lower index) does not depend on who looks first.
#include "gfl/select.h"

#include "terms/box.h"
#include "class_segments.h"
#include "terms/ranking.h"
#include "terms/scalar.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
using Rank = unsigned long long;

// A box by its score: NaN the greatest, rank 0 for none.
struct Best {
  Rank rank;
  long long at;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  return a.rank > b.rank || (a.rank == b.rank && a.at < b.at) ? a : b;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Best other{__shfl_xor_sync(kFullMask, best.rank, offset), __shfl_xor_sync(kFullMask, best.at, offset)};
    best = better(best, other);
  }
  return best;
}

// `scratch` holds one per warp, and must not be that of the previous call.
__device__ __forceinline__ Best best_of_block(Best best, Best* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  best = best_of_warp(best);
  if (lane == 0) scratch[threadIdx.x / kWarp] = best;
  __syncthreads();
  return best_of_warp(lane < kWarps ? scratch[lane] : Best{0, 0});
}

template <class A> __device__ __forceinline__ Rank rank_with_nan(A score) {
  return score != score ? ~Rank{0} : static_cast<Rank>(rank_of(score));
}

template <class A> __device__ __forceinline__ A score_at(const SoftNmsInput& in, int64_t i) {
  const int64_t at = i * in.stride_score;
  switch (in.score_dtype) {
    case DType::f16: return static_cast<A>(load(static_cast<const half_t*>(in.scores) + at));
    case DType::bf16: return static_cast<A>(load(static_cast<const bfloat16_t*>(in.scores) + at));
    case DType::f64: return static_cast<A>(static_cast<const double*>(in.scores)[at]);
    case DType::f32: break;
  }
  return static_cast<A>(static_cast<const float*>(in.scores)[at]);
}

template <class A> __device__ __forceinline__ A weight_of(A iou, const SoftNmsInput& in) {
  if (in.gaussian) {
    const double q = static_cast<double>(iou);
    return iou == iou ? static_cast<A>(std::exp(-(q * q) / in.sigma)) : A(1);
  }
  return iou >= static_cast<A>(in.iou_threshold) ? sub_rn(A(1), iou) : A(1);
}

template <class A> struct Scratch {
  Box<A>* box;
  A* score;
  uint8_t* left;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    soft_nms_kernel(SoftNmsInput in, const int64_t* grouped, ClassSegments segments, Scratch<acc_t<T>> scratch,
                    acc_t<T>* final_scores, uint8_t* keep) {
  using A = acc_t<T>;
  Best* found = shared<Best>();  // [2][kWarps], taken in turns
  const A min_score = static_cast<A>(in.min_score);
  int turn = 0;
  for (int64_t s = blockIdx.x; s < segments.size(); s += gridDim.x) {
    const int64_t first = segments.first(s), end = segments.end(first);
    Best best{0, 0};
    for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
      const int64_t index = grouped[i], c = in.stride_coordinate;
      const T* p = static_cast<const T*>(in.boxes) + index * in.stride_box;
      scratch.box[i] = {load(p), load(p + c), load(p + 2 * c), load(p + 3 * c)};
      const A score = score_at<A>(in, index);
      const bool left = !(score < min_score);
      scratch.score[i] = score;
      scratch.left[i] = left ? 1 : 0;
      keep[index] = 0;
      if (left) best = better(best, {rank_with_nan(score), i});
    }
    for (;;) {
      best = best_of_block(best, found + turn * kWarps);
      turn = 1 - turn;
      if (best.rank == 0) break;
      const int64_t taken = best.at;
      const Box<A> box = scratch.box[taken];
      const A area = box_area(box, A(0));
      best = {0, 0};
      for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
        if (scratch.left[i] == 0) continue;
        A score = scratch.score[i];
        if (i == taken) {
          scratch.left[i] = 0;
          keep[grouped[i]] = 1;
          final_scores[grouped[i]] = score;
          continue;
        }
        const Box<A> other = scratch.box[i];
        const Overlap<A> overlap = box_overlap(box, area, other, box_area(other, A(0)), A(0));
        if (overlap.intersection > A(0)) {  // else an IoU of 0 or NaN: a weight of 1
          score = mul_rn(score, weight_of(div_rn(overlap.intersection, overlap.union_area), in));
          scratch.score[i] = score;
          if (score < min_score) {
            scratch.left[i] = 0;
            continue;
          }
        }
        best = better(best, {rank_with_nan(score), i});
      }
    }
  }
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

size_t soft_nms_workspace_bytes(int64_t count, DType dtype) {
  const size_t n = static_cast<size_t>(count), a = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return aligned(sizeof(unsigned long long)) + aligned(4 * a * n) + aligned(a * n) + aligned(sizeof(int64_t) * n) +
         aligned(n);
}

cudaError_t soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* labels, void* workspace,
                     void* final_scores, uint8_t* keep, cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const size_t n = static_cast<size_t>(in.count);
    char* at = static_cast<char*>(workspace);
    const auto take = [&](size_t bytes) {
      char* here = at;
      at += aligned(bytes);
      return here;
    };
    ClassSegments segments{labels, in.count, nullptr, reinterpret_cast<unsigned long long*>(take(8))};
    Scratch<A> scratch;
    scratch.box = reinterpret_cast<Box<A>*>(take(sizeof(Box<A>) * n));
    scratch.score = reinterpret_cast<A*>(take(sizeof(A) * n));
    segments.begin = reinterpret_cast<int64_t*>(take(sizeof(int64_t) * n));
    scratch.left = reinterpret_cast<uint8_t*>(take(n));
    const unsigned blocks = find_segments(segments, stream);
    GFL_LAUNCH(soft_nms_kernel<T>, dim3(blocks), dim3(kThreads), sizeof(Best) * 2 * kWarps, stream, in, grouped,
               segments, scratch, static_cast<A*>(final_scores), keep);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
