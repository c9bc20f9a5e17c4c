// SPDX-License-Identifier: Apache-2.0
// Quality focal loss on the GPU, a number a row: a power of two of lanes takes a row, each of them some runs of its classes.
//
//   pred    [rows, classes]  dtype  read     label [rows] int64 read     target [rows] or [rows, classes] A read
//   loss    [rows]           A      write    grad_pred [rows, classes] dtype write
// A run is 16 bytes where classes lie side by side and alignment allows, else one class; one also for an exponent other than
// 2, for probabilities and in fp64. Bytes per element: forward
// sizeof(dtype), backward 2·sizeof(dtype) (the terms are recomputed from the logits); a dense target adds sizeof(A).
// Accumulator: float (double for double). Repeatable bit for bit: a lane sums its classes in order, the lanes in a fixed
// tree. The loss down to one number, which is what detectors train with, is score_loss.cu's.
#include "gfl/qfl.h"

#include "background.h"
#include "launch.h"
#include "map_tile.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // runs that a lane fetches before it uses the first, where terms are short
constexpr int64_t kMaxBlocks = 1 << 16;

// Blocks an SM, asked of the compiler: with the registers that it takes unasked, it spills for sm_90.
template <class T> constexpr int kBlocks = sizeof(T) == 8 ? 1 : 3;

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows and what lies beside them can be moved 16 bytes at a time.
template <class T> bool by_vectors(const QflInput& in, const void* grad_pred) {
  constexpr int run = kRun<T>;
  return in.stride_class == 1 && in.stride_row % run == 0 && in.classes % run == 0 && is_aligned(in.pred) &&
         is_aligned(grad_pred) && (in.label != nullptr || is_aligned(in.target));
}

// The most lanes of which at most an eighth has nothing to do. Where rows lie side by side instead of classes, one: then
// the lanes of a warp read what lies side by side.
int lanes_for(const QflInput& in, int64_t runs) {
  if (in.stride_row == 1 && in.stride_class != 1) return 1;
  int lanes = kWarp;
  while (lanes > 1 && (runs + lanes - 1) / lanes * lanes - runs > runs / 8) lanes /= 2;
  return lanes;
}

dim3 grid_for(int64_t rows, int lanes) {
  const int64_t of_block = kThreads / lanes, blocks = (rows + of_block - 1) / of_block;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

// visit(elements, first class) for the runs of a lane.
template <class T, int ahead, bool vectors, class Visit>
__device__ __forceinline__ void for_classes(const QflInput& in, int64_t row, int lane, int lanes, const Visit& visit) {
  constexpr int run = vectors ? kRun<T> : 1;
  const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
  const int64_t runs = in.classes / run;
  for (int64_t first = lane; first < runs; first += int64_t(ahead) * lanes) {
    T element[ahead][run];
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      const int64_t at = first + a * lanes;
      if (at >= runs) continue;
      if constexpr (vectors) {
        const uint4 words = *reinterpret_cast<const uint4*>(pred + at * run);
        memcpy(element[a], &words, sizeof words);
      } else {
        element[a][0] = pred[at * in.stride_class];
      }
    }
#pragma unroll
    for (int a = 0; a < ahead; ++a) {
      if (first + a * lanes < runs) visit(element[a], (first + a * lanes) * run);
    }
  }
}

// What the elements of a row are held against.
template <class T, class Params> struct RowTarget {
  using A = acc_t<T>;
  static constexpr int ahead = Params::wide ? kAhead : 1;
  Params terms;
  const A* dense;  // null with labels
  int64_t label;   // −1 for background
  A score;

  __device__ __forceinline__ RowTarget(const QflInput& in, const Params& by, int64_t row)
      : terms(by), dense(nullptr), label(-1), score(0) {
    const A* target = static_cast<const A*>(in.target);
    if (in.label == nullptr) {
      dense = target + row * in.classes;
    } else {
      const int64_t given = in.label[row];
      if (given >= 0 && given < in.classes) label = given;
      score = target[row];
    }
  }
  __device__ __forceinline__ Term<A> term(A x, int64_t c) const {
    if (Params::wide && dense == nullptr && c != label) return background_term(terms, x);
    const A t = dense != nullptr ? dense[c] : (c == label ? score : A(0));
    return qfl_term(x, t, static_cast<A>(terms.exponent), terms.activated);
  }
};

template <class T, class Params, bool vectors>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    qfl_forward_kernel(QflInput in, Params terms, int lanes, acc_t<T>* loss) {
  using A = acc_t<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, of_block = kThreads / lanes;
  for (int64_t first = int64_t(blockIdx.x) * of_block; first < in.rows; first += int64_t(gridDim.x) * of_block) {
    const int64_t row = first + thread / lanes;
    A sum = 0;
    if (row < in.rows) {
      const RowTarget<T, Params> target(in, terms, row);
      for_classes<T, target.ahead, vectors>(in, row, lane, lanes, [&](const auto& element, int64_t begin) {
#pragma unroll
        for (int v = 0; v < (vectors ? kRun<T> : 1); ++v) {
          const A x = load(&element[v]);
          sum += target.term(x, begin + v).value;
        }
      });
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    if (row < in.rows && lane == 0) loss[row] = sum;
  }
}

template <class T, class Params, bool vectors>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    qfl_backward_kernel(QflInput in, Params terms, int lanes, const acc_t<T>* grad_loss, T* grad_pred,
                        acc_t<T>* grad_target) {
  using A = acc_t<T>;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes, of_block = kThreads / lanes;
  for (int64_t row = int64_t(blockIdx.x) * of_block + thread / lanes; row < in.rows;
       row += int64_t(gridDim.x) * of_block) {
    const RowTarget<T, Params> target(in, terms, row);
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
      if constexpr (vectors) {
        uint4 words;
        memcpy(&words, element, sizeof words);
        *reinterpret_cast<uint4*>(out) = words;
      } else {
        *out = element[0];
      }
    });
  }
}

}  // namespace

cudaError_t qfl_forward(const QflInput& in, void* loss, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_terms<T>(in.beta, in.activated, [&](auto terms) {
      using Params = decltype(terms);
      const bool vectors = terms.wide && by_vectors<T>(in, nullptr);
      const int lanes = lanes_for(in, in.classes / (vectors ? kRun<T> : 1));
      const auto launch = [&](auto kernel) {
        GFL_LAUNCH(kernel, grid_for(in.rows, lanes), dim3(kThreads), 0, stream, in, terms, lanes,
                   static_cast<acc_t<T>*>(loss));
      };
      if constexpr (Params::wide) {
        if (vectors) return launch(qfl_forward_kernel<T, Params, true>);
      }
      launch(qfl_forward_kernel<T, Params, false>);
    });
  });
  return cudaGetLastError();
}

cudaError_t qfl_backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    dispatch_terms<T>(in.beta, in.activated, [&](auto terms) {
      using Params = decltype(terms);
      const bool vectors = terms.wide && by_vectors<T>(in, grad_pred);
      const int lanes = lanes_for(in, in.classes / (vectors ? kRun<T> : 1));
      const auto launch = [&](auto kernel) {
        GFL_LAUNCH(kernel, grid_for(in.rows, lanes), dim3(kThreads), 0, stream, in, terms, lanes,
                   static_cast<const A*>(grad_loss), static_cast<T*>(grad_pred), static_cast<A*>(grad_target));
      };
      if constexpr (Params::wide) {
        if (vectors) return launch(qfl_backward_kernel<T, Params, true>);
      }
      launch(qfl_backward_kernel<T, Params, false>);
    });
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
