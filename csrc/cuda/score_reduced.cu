// SPDX-License-Identifier: Apache-2.0
// Losses of class scores down to one number (terms/score.h has the formulas), with the gradient from the same walk: two
// launches forward, one backward, which returns at once if the gradient that arrives is the one that was stored.
//
//   pred      [images, classes, locations]  dtype  read      label   [images, locations] int64  read
//   target    [images, locations], or pred's shape  A  read  weight  [images, locations] A      read
//   grad      as pred  dtype  write                          loss, norm, grad_loss: one number of A each
//   partials  [tiles] double, written and read
//
// A block takes a tile of 128 locations with all their classes and walks it along memory, 16 bytes per access, in any
// layout (map_tile.h); labels, scores and weights of the tile lie in shared memory. A second launch adds up the tiles.
// Other exponents than the fast path's, probabilities and fp64 take the same walk, one element at a time.
// Bytes per element: loss and gradient 2·sizeof(dtype), the loss alone sizeof(dtype), the gradient computed again
// 2·sizeof(dtype); a dense target adds sizeof(A) each time. Accumulator: A within a thread, double beyond. Repeatable
// bit for bit: every sum has a fixed order.
#include "gfl/score.h"

#include <algorithm>

#include "launch.h"
#include "map_tile.h"
#include "score_params.h"
#include "vec.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kWarps = kMapThreads / kWarp;
constexpr int kSumThreads = 512;
constexpr int kNoLabel = -1;
// Blocks of a backward pass that most likely returns at once: enough to fill any GPU, few enough to cost little.
constexpr int64_t kFinishBlocks = kMaxBlocks < 1024 ? kMaxBlocks : 1024;

// minBlocksPerSM for __launch_bounds__: the most for which ptxas spills nothing.
template <class Loss> constexpr int kBlocksOfLoss = 3;
template <> constexpr int kBlocksOfLoss<Focal> = 2;
template <class T, class Params>
constexpr int kReducedBlocks = sizeof(T) == 8   ? 1
                               : sizeof(T) == 4 ? kBlocksOfLoss<typename Params::Loss>
                                                : 2;

struct Layout { int64_t stride[3]; };

// Shared memory of a block.
template <class A> struct Tile {
  double sums[kWarps];
  A score[kMapTile], weight[kMapTile];
  int label[kMapTile];
};

// Reads labels, scores and weights of the tile's locations. Returns whether any is labelled.
template <class A>
__device__ __forceinline__ bool read_rows(const ScoreInput& in, int64_t first, int count, Tile<A>& tile) {
  const int i = static_cast<int>(threadIdx.x);
  int label = kNoLabel;
  if (i < count) {
    if (in.label != nullptr) {
      const int64_t given = in.label[first + i];
      if (given >= 0 && given < in.classes) label = static_cast<int>(given);
      tile.label[i] = label;
      tile.score[i] = static_cast<const A*>(in.target)[first + i];
    }
    tile.weight[i] = in.weight != nullptr ? static_cast<const A*>(in.weight)[first + i] : A(1);
  }
  return __syncthreads_or(label != kNoLabel) != 0;
}

// What the sum of weighted losses is multiplied by.
template <class A> __device__ __forceinline__ A scale_of(const ScoreScale& given) {
  const A* norm = static_cast<const A*>(given.norm);
  return static_cast<A>(given.factor) / (norm != nullptr ? *norm + static_cast<A>(kScoreNormEps) : A(1));
}

// `grad_loss` null: forward, with the sum of the losses. `grad` may be null then.
template <class T, class Params, bool sparse>
__global__ void __launch_bounds__(kMapThreads, (kReducedBlocks<T, Params>))
    score_reduced_kernel(ScoreInput in, Params params, ScoreScale given, const acc_t<T>* grad_loss, bool grad_stored,
                         int64_t tiles, double* partials, T* grad, Layout grad_layout) {
  using A = acc_t<T>;
  using Loss = typename Params::Loss;
  constexpr bool vectors = Params::fast;
  if (grad_stored && *grad_loss == A(1)) return;
  Tile<A>& tile = *shared<Tile<A>>();
  const T* map = static_cast<const T*>(in.pred);
  const A* targets = static_cast<const A*>(in.target);
  const A scale = grad_loss != nullptr ? scale_of<A>(given) * *grad_loss : scale_of<A>(given);
  double total = 0;
  for (int64_t block = blockIdx.x; block < tiles * in.images; block += gridDim.x) {
    const int64_t image = block / tiles, begin = block % tiles * kMapTile;
    const int64_t stride[4] = {in.stride[0], in.stride[1], 0, in.stride[2]};
    const int64_t out_stride[4] = {grad_layout.stride[0], grad_layout.stride[1], 0, grad_layout.stride[2]};
    const int64_t target_stride[4] = {in.target_stride[0], in.target_stride[1], 0, in.target_stride[2]};
    MapTile shape = map_tile<T, vectors>(map, stride, image, 1, in.locations, begin, in.classes), out{}, beside{};
    if (grad != nullptr) {
      out = map_tile<T, vectors>(grad, out_stride, image, 1, in.locations, begin, in.classes);
      shape.match_layout(out);
    }
    if (!sparse) {
      beside = map_tile<A, vectors>(targets, target_stride, image, 1, in.locations, begin, in.classes);
      shape.match_layout(beside);
    }
    const bool labelled = read_rows(in, image * in.locations + begin, shape.count, tile);
    A sum = 0;
    for_runs<T, vectors>(
        shape, [&](Run<T, vectors>& run) { load_run(map, shape, run); },
        [&](Run<T, vectors>& run) {
          A target[Run<T, vectors>::length];
          if constexpr (!sparse) {
            const A* from = targets + beside.element(run.location, run.channel);
            if constexpr (vectors) {
              if (shape.vectors()) load_vec(from, target);
            }
            if (!shape.vectors()) target[0] = *from;
          }
          int v = 0;
          for_elements(shape, run, [&](T& element, int location, int channel) {
            const A x = load(&element), weight = tile.weight[location];
            Term<A> term;
            if constexpr (sparse) term = Loss::background(params, x);
            else term = Loss::term(params, x, target[v++]);
            A value = weight * term.value;
            if (sparse && labelled && tile.label[location] == channel) value = 0;  // the labelled class is added below
            sum += value;
            store(&element, scale * weight * term.grad_pred);
          });
          if (grad != nullptr) store_run(grad, shape, out, run);
        });
    if (sparse && labelled) {
      __syncthreads();  // the gradients of labelled classes overwrite those that other threads wrote above
      const int i = static_cast<int>(threadIdx.x), label = i < shape.count ? tile.label[i] : kNoLabel;
      if (label != kNoLabel) {
        const A weight = tile.weight[i];
        const Term<A> term = Loss::term(params, A(load(map + shape.element(i, label))), tile.score[i]);
        sum += weight * term.value;
        if (grad != nullptr) store(grad + out.element(i, label), scale * weight * term.grad_pred);
      }
    }
    total += static_cast<double>(sum);
    __syncthreads();  // the next tile reuses the shared memory
  }
  if (partials == nullptr) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  total = warp_sum(total);
  if (lane == 0) tile.sums[warp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double all = 0;
  for (int w = 0; w < kWarps; ++w) all += tile.sums[w];
  partials[blockIdx.x] = all;
}

template <class A>
__global__ void __launch_bounds__(kSumThreads)
    score_sum_kernel(const double* partials, int64_t count, ScoreScale given, A* loss) {
  double* of_warp = shared<double>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partials[i];
  sum = warp_sum(sum);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kSumThreads / kWarp; ++w) sum += of_warp[w];
  const A* norm = static_cast<const A*>(given.norm);
  *loss = static_cast<A>(given.factor * sum /
                         (norm != nullptr ? static_cast<double>(*norm + static_cast<A>(kScoreNormEps)) : 1.0));
}

int64_t tiles_of(const ScoreInput& in) { return in.classes == 0 ? 0 : (in.locations + kMapTile - 1) / kMapTile; }

// One walk: the loss where there are partials, the gradient where it is wanted.
template <class T>
void reduce(const ScoreInput& in, const ScoreScale& scale, const void* grad_loss, bool grad_stored, double* partials,
            void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t tiles = tiles_of(in), blocks = tiles * in.images;
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(grad_stored ? std::min(blocks, kFinishBlocks) : blocks));
  const Layout layout{{grad_stride[0], grad_stride[1], grad_stride[2]}};
  dispatch_loss<T>(in, [&](auto params) {
    using Params = decltype(params);
    const auto launch = [&](auto kernel) {
      GFL_LAUNCH(kernel, grid, dim3(kMapThreads), sizeof(Tile<A>), stream, in, params, scale,
                 static_cast<const A*>(grad_loss), grad_stored, tiles, partials, static_cast<T*>(grad), layout);
    };
    if constexpr (has_rows<typename Params::Loss>) {
      if (in.label != nullptr) return launch(score_reduced_kernel<T, Params, true>);
    }
    launch(score_reduced_kernel<T, Params, false>);
  });
}

}  // namespace

bool score_reduced_fits(const ScoreInput& in) {
  return in.locations < int64_t{1} << 31 && in.classes < int64_t{1} << 24 &&
         tiles_of(in) * in.images < int64_t{1} << 31;
}

int64_t score_reduced_workspace(const ScoreInput& in) { return tiles_of(in) * in.images; }

cudaError_t score_reduced_forward(const ScoreInput& in, const ScoreScale& scale, double* workspace, void* loss,
                                  void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  if (!score_reduced_fits(in)) return cudaErrorInvalidValue;
  dispatch(in.dtype, [&](auto t) {
    using A = acc_t<decltype(t)>;
    reduce<decltype(t)>(in, scale, nullptr, false, workspace, grad, grad_stride, stream);
    GFL_LAUNCH(score_sum_kernel<A>, dim3(1), dim3(kSumThreads), sizeof(double) * (kSumThreads / kWarp), stream,
               workspace, score_reduced_workspace(in), scale, static_cast<A*>(loss));
  });
  return cudaGetLastError();
}

cudaError_t score_reduced_backward(const ScoreInput& in, const ScoreScale& scale, const void* grad_loss,
                                   bool grad_stored, void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  if (!score_reduced_fits(in)) return cudaErrorInvalidValue;
  dispatch(in.dtype,
           [&](auto t) { reduce<decltype(t)>(in, scale, grad_loss, grad_stored, nullptr, grad, grad_stride, stream); });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
