// SPDX-License-Identifier: Apache-2.0
// Losses of class scores on the GPU (terms/score.h has the formulas), one number per row or per element;
// score_reduced.cu has the form that detectors train with, one number for all.
//
//   pred      [rows, classes]  dtype  read                 label       [rows] int64                read
//   target    [rows] or [rows, classes]  A  read           grad_loss   as loss  A                  read
//   loss      [rows], or [elements]  A  write              grad_pred   as pred  dtype              write
//                                                          grad_target as target  A                write
//
// rows      A power of two of lanes takes a row, each lane some runs of its classes. A run is 16 bytes where classes
//           are contiguous and aligned, else one class. Bytes per element: forward sizeof(dtype), backward
//           2·sizeof(dtype), since terms are computed again; a dense target adds sizeof(A).
// elements  One thread per element, blocks stride over the rest. Bytes per element: forward
//           sizeof(dtype) + 2·sizeof(A), backward 2·sizeof(dtype) + 2·sizeof(A), less where the gradient is one number.
//
// Other exponents than the fast path's, probabilities and fp64 take one kernel for all losses, one element at a time.
// Accumulator: float (double for double). Repeatable bit for bit: a lane sums its classes in order, the lanes in a
// fixed tree.
#include "gfl/score.h"

#include "launch.h"
#include "score_params.h"
#include "vec.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // runs that a lane fetches before it uses the first, on the fast path

// minBlocksPerSM for __launch_bounds__; without it ptxas spills on sm_90.
template <class T> constexpr int kRowBlocks = sizeof(T) == 8 ? 1 : 3;

// The largest number of lanes per row of which at most an eighth idles. One where rows are contiguous instead of
// classes: then the lanes of a warp read neighbouring rows.
int lanes_for(const ScoreInput& in, int64_t runs) {
  if (in.stride[2] == 1 && in.stride[1] != 1) return 1;
  int lanes = kWarp;
  while (lanes > 1 && (runs + lanes - 1) / lanes * lanes - runs > runs / 8) lanes /= 2;
  return lanes;
}

// Calls visit(elements, first class) for the runs of a lane.
template <class T, int ahead, bool vectors, class Visit>
__device__ __forceinline__ void for_classes(const ScoreInput& in, int64_t row, int lane, int lanes,
                                            const Visit& visit) {
  constexpr int run = vectors ? kRun<T> : 1;
  const T* pred = static_cast<const T*>(in.pred) + row * in.stride[2];
  const int64_t runs = in.classes / run;
  for (int64_t first = lane; first < runs; first += int64_t(ahead) * lanes) {
    T element[ahead][run];
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      const int64_t at = first + a * lanes;
      if (at >= runs) continue;
      if constexpr (vectors) load_vec(pred + at * run, element[a]);
      else element[a][0] = pred[at * in.stride[1]];
    }
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      if (first + a * lanes < runs) visit(element[a], (first + a * lanes) * run);
    }
  }
}

// The target of a row.
template <class T, class Params> struct RowTarget {
  using A = acc_t<T>;
  using Loss = typename Params::Loss;
  static constexpr int ahead = Params::fast ? kAhead : 1;
  Params params;
  const A* dense;  // null with labels
  int64_t label;   // −1 for background
  A score;

  __device__ __forceinline__ RowTarget(const ScoreInput& in, const Params& given, int64_t row)
      : params(given), dense(nullptr), label(-1), score(0) {
    const A* target = static_cast<const A*>(in.target);
    if (in.label == nullptr) {
      dense = target + row * in.classes;
    } else {
      const int64_t own = in.label[row];
      if (own >= 0 && own < in.classes) label = own;
      score = target[row];
    }
  }
  __device__ __forceinline__ Term<A> term(A x, int64_t c) const {
    if (Params::fast && dense == nullptr && c != label) return Loss::background(params, x);
    return Loss::term(params, x, dense != nullptr ? dense[c] : (c == label ? score : A(0)));
  }
};

template <class T, class Params, bool vectors>
__global__ void __launch_bounds__(kThreads, kRowBlocks<T>)
    score_rows_forward_kernel(ScoreInput in, Params params, int lanes, acc_t<T>* loss) {
  using A = acc_t<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, per_block = kThreads / lanes;
  for (int64_t first = int64_t(blockIdx.x) * per_block; first < in.locations; first += int64_t(gridDim.x) * per_block) {
    const int64_t row = first + thread / lanes;
    A sum = 0;
    if (row < in.locations) {
      const RowTarget<T, Params> target(in, params, row);
      for_classes<T, target.ahead, vectors>(in, row, lane, lanes, [&](const auto& element, int64_t begin) {
#pragma unroll
        for (int v = 0; v < (vectors ? kRun<T> : 1); ++v) {
          const A x = load(&element[v]);
          sum += target.term(x, begin + v).value;
        }
      });
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    if (row < in.locations && lane == 0) loss[row] = sum;
  }
}

template <class T, class Params, bool vectors>
__global__ void __launch_bounds__(kThreads, kRowBlocks<T>)
    score_rows_backward_kernel(ScoreInput in, Params params, int lanes, const acc_t<T>* grad_loss, T* grad_pred,
                               acc_t<T>* grad_target) {
  using A = acc_t<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, per_block = kThreads / lanes;
  for (int64_t row = int64_t(blockIdx.x) * per_block + thread / lanes; row < in.locations;
       row += int64_t(gridDim.x) * per_block) {
    const RowTarget<T, Params> target(in, params, row);
    const A scale = grad_loss[row];
    if (grad_target != nullptr && target.dense == nullptr && target.label < 0 && lane == 0) grad_target[row] = 0;
    for_classes<T, target.ahead, vectors>(in, row, lane, lanes, [&](auto& element, int64_t begin) {
#pragma unroll
      for (int v = 0; v < (vectors ? kRun<T> : 1); ++v) {
        const int64_t c = begin + v;
        const A x = load(&element[v]);
        const Term<A> term = target.term(x, c);
        if (grad_target != nullptr && target.dense != nullptr) {
          grad_target[row * in.classes + c] = scale * term.grad_target;
        } else if (grad_target != nullptr && c == target.label) {
          grad_target[row] = scale * term.grad_target;
        }
        store(&element[v], scale * term.grad_pred);
      }
      if (grad_pred == nullptr) return;
      T* out = grad_pred + row * in.classes + begin;
      if constexpr (vectors) store_vec(out, element);
      else *out = element[0];
    });
  }
}

template <class T, class Params>
__global__ void score_elements_forward_kernel(ScoreInput in, Params params, acc_t<T>* loss) {
  using A = acc_t<T>;
  const T* pred = static_cast<const T*>(in.pred);
  const A* target = static_cast<const A*>(in.target);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < in.locations; i += int64_t(gridDim.x) * kThreads) {
    loss[i] = Params::Loss::term(params, static_cast<A>(load(pred + i)), target[i]).value;
  }
}

template <class T, class Params>
__global__ void score_elements_backward_kernel(ScoreInput in, Params params, const acc_t<T>* grad_loss,
                                               int64_t grad_stride, T* grad_pred, acc_t<T>* grad_target) {
  using A = acc_t<T>;
  const T* pred = static_cast<const T*>(in.pred);
  const A* target = static_cast<const A*>(in.target);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < in.locations; i += int64_t(gridDim.x) * kThreads) {
    const Term<A> term = Params::Loss::term(params, static_cast<A>(load(pred + i)), target[i]);
    const A scale = grad_loss[i * grad_stride];
    if (grad_pred != nullptr) store(grad_pred + i, scale * term.grad_pred);
    if (grad_target != nullptr) grad_target[i] = scale * term.grad_target;
  }
}

}  // namespace

cudaError_t score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred, void* grad_target,
                       cudaStream_t stream) {
  if (in.locations == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    dispatch_loss<T>(in, [&](auto params) {
      using Params = decltype(params);
      if constexpr (has_rows<typename Params::Loss>) {
        constexpr int run = kRun<T>;
        const bool vectors = Params::fast && in.stride[1] == 1 && in.stride[2] % run == 0 && in.classes % run == 0 &&
                             is_aligned(in.pred) && is_aligned(grad_pred) &&
                             (in.label != nullptr || is_aligned(in.target));
        const int lanes = lanes_for(in, in.classes / (vectors ? run : 1));
        const auto launch = [&](auto forward, auto backward) {
          const dim3 grid = strided_grid(in.locations, kThreads / lanes), block(kThreads);
          if (loss != nullptr) GFL_LAUNCH(forward, grid, block, 0, stream, in, params, lanes, static_cast<A*>(loss));
          else
            GFL_LAUNCH(backward, grid, block, 0, stream, in, params, lanes, static_cast<const A*>(grad_loss),
                       static_cast<T*>(grad_pred), static_cast<A*>(grad_target));
        };
        if constexpr (Params::fast) {
          if (vectors) {
            return launch(score_rows_forward_kernel<T, Params, true>, score_rows_backward_kernel<T, Params, true>);
          }
        }
        launch(score_rows_forward_kernel<T, Params, false>, score_rows_backward_kernel<T, Params, false>);
      }
    });
  });
  return cudaGetLastError();
}

cudaError_t score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss,
                           void* grad_pred, void* grad_target, cudaStream_t stream) {
  if (in.locations == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    dispatch_loss<T>(in, [&](auto params) {
      using Params = decltype(params);
      if constexpr (has_elements<typename Params::Loss>) {
        const dim3 grid = strided_grid(in.locations, kThreads), block(kThreads);
        if (loss != nullptr) {
          GFL_LAUNCH((score_elements_forward_kernel<T, Params>), grid, block, 0, stream, in, params,
                     static_cast<A*>(loss));
        } else {
          GFL_LAUNCH((score_elements_backward_kernel<T, Params>), grid, block, 0, stream, in, params,
                     static_cast<const A*>(grad_loss), grad_stride, static_cast<T*>(grad_pred),
                     static_cast<A*>(grad_target));
        }
      }
    });
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
