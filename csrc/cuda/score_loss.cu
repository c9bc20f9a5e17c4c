// SPDX-License-Identifier: Apache-2.0
// Losses of class scores down to one number, with the gradient from the same walk: two launches forward, one backward,
// which leaves at once where the gradient that arrives is the one that was grad_stored.
//
//   pred     [images, classes, locations]  dtype read      label [images, locations] int64 read
//   target   [images, locations], or pred's shape  A read  weight [images, locations] A read
//   grad     as pred                       dtype write     loss, norm, grad_loss: single numbers of A
//   partials [tiles] double, written and read
// A block takes a tile of 128 locations with all their classes and walks it along memory, 16 bytes an access, in any layout
// (map_tile.h); labels, scores and weights of the tile lie in shared memory. A second launch adds up the tiles. An exponent
// other than 2, probabilities and fp64 take the same walk an element at a time.
// Bytes an element: loss and gradient 2·sizeof(dtype), the loss alone sizeof(dtype), the gradient computed again
// 2·sizeof(dtype); a dense target adds sizeof(A) each time. Accumulator: A within a thread, double beyond. Repeatable bit
// for bit: every sum has a fixed order.
#include "gfl/score_loss.h"

#include "background.h"
#include "launch.h"
#include "map_tile.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kWarps = kMapThreads / kWarp;
constexpr int kSumThreads = 512;
constexpr int kNoLabel = -1;
// Blocks of a backward pass that most likely has nothing to do: enough to fill any GPU, few enough to be gone at once.
constexpr int64_t kFinishBlocks = 1024;

struct Layout { int64_t stride[3]; };

// The parameters of a walk: the loss, and what its terms hang on.
template <ScoreLoss loss> struct FastScore : FastPath {
  static constexpr ScoreLoss kind = loss;
  static constexpr int blocks = 3;
  float alpha;
};
struct FastQuality : FastScore<ScoreLoss::quality> {};
struct FastVarifocal : FastScore<ScoreLoss::varifocal> {};
struct FastFocal : FastScore<ScoreLoss::focal> {
  static constexpr int blocks = 2;
};
template <class A> struct GeneralScore : General<A> {
  static constexpr int blocks = 3;
  ScoreLoss kind;
  A alpha;
};
// Blocks an SM, asked of the compiler: the most for which it spills nothing.
template <class T, class Params> constexpr int kBlocks = sizeof(T) == 8 ? 1 : sizeof(T) == 4 ? Params::blocks : 2;

template <class A, class Params> __device__ __forceinline__ Term<A> score_term(const Params& by, A x, A t) {
  const A exponent = static_cast<A>(by.exponent);
  if (by.kind == ScoreLoss::quality) return qfl_term(x, t, exponent, by.activated);
  if (by.kind == ScoreLoss::focal) return focal_term(x, t, by.alpha, exponent, by.activated);
  return vfl_term(x, t, by.alpha, exponent, by.kind == ScoreLoss::varifocal, by.activated);
}

// What a block shares.
template <class A> struct Tile {
  double sums[kWarps];
  A score[kMapTile], weight[kMapTile];
  int label[kMapTile];
};

// Reads what the tile's locations have. Returns whether one has a class.
template <class A>
__device__ __forceinline__ bool read_rows(const ScoreLossInput& in, int64_t first, int count, Tile<A>& tile) {
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

// The targets beside a run, where its elements and they lie alike.
template <class T, bool wide> struct TargetVec {
  acc_t<T> value[Run<T, wide>::length];
  __device__ __forceinline__ void read(const acc_t<T>* from, bool vectors) {
    if constexpr (wide) {
      if (vectors) {
#pragma unroll
        for (int w = 0; w < static_cast<int>(sizeof value / 16); ++w) {
          const uint4 four = reinterpret_cast<const uint4*>(from)[w];
          memcpy(reinterpret_cast<char*>(value) + 16 * w, &four, 16);
        }
        return;
      }
    }
    value[0] = *from;
  }
};

// `grad_loss` null: forward, with the sum of the losses. `grad` may be null then.
template <class T, class Params, bool sparse>
__global__ void __launch_bounds__(kMapThreads, (kBlocks<T, Params>))
    score_loss_kernel(ScoreLossInput in, Params terms, ScoreLossScale by, const acc_t<T>* grad_loss, bool grad_stored,
                      int64_t tiles, double* partials, T* grad, Layout grad_layout) {
  using A = acc_t<T>;
  constexpr bool wide = Params::wide;
  if (grad_stored && *grad_loss == A(1)) return;
  Tile<A>& tile = *shared<Tile<A>>();
  const T* map = static_cast<const T*>(in.pred);
  const A* targets = static_cast<const A*>(in.target);
  const A* norm = static_cast<const A*>(by.norm);
  const A one = static_cast<A>(by.factor) / (norm != nullptr ? *norm + static_cast<A>(kScoreNormEps) : A(1));
  const A scale = grad_loss != nullptr ? one * *grad_loss : one;
  double total = 0;
  for (int64_t block = blockIdx.x; block < tiles * in.images; block += gridDim.x) {
    const int64_t image = block / tiles, begin = block % tiles * kMapTile;
    const int64_t stride[4] = {in.stride[0], in.stride[1], 0, in.stride[2]};
    const int64_t out_stride[4] = {grad_layout.stride[0], grad_layout.stride[1], 0, grad_layout.stride[2]};
    const int64_t aim_stride[4] = {in.target_stride[0], in.target_stride[1], 0, in.target_stride[2]};
    MapTile shape = map_tile<T, wide>(map, stride, image, 1, in.locations, begin, in.classes), out{}, aim{};
    if (grad != nullptr) {
      out = map_tile<T, wide>(grad, out_stride, image, 1, in.locations, begin, in.classes);
      shape.match_layout(out);
    }
    if (!sparse) {
      aim = map_tile<A, wide>(targets, aim_stride, image, 1, in.locations, begin, in.classes);
      shape.match_layout(aim);
    }
    const bool labelled = read_rows(in, image * in.locations + begin, shape.count, tile);
    A sum = 0;
    for_runs<T, wide>(
        shape, [&](Run<T, wide>& run) { load_run(map, shape, run); },
        [&](Run<T, wide>& run) {
          TargetVec<T, wide> near;
          if (!sparse) near.read(targets + aim.element(run.location, run.channel), shape.vectors());
          int v = 0;
          for_elements(shape, run, [&](T& element, int location, int channel) {
            const A x = load(&element), weight = tile.weight[location];
            Term<A> term;
            if constexpr (sparse) term = background_term(terms, x);
            else term = score_term(terms, x, near.value[v++]);
            A value = weight * term.value;
            if (sparse && labelled && tile.label[location] == channel) value = 0;  // its own class comes below
            sum += value;
            store(&element, scale * weight * term.grad_pred);
          });
          if (grad != nullptr) store_run(grad, shape, out, run);
        });
    if (sparse && labelled) {
      __syncthreads();  // what follows is written over what the block has written before
      const int i = static_cast<int>(threadIdx.x), label = i < shape.count ? tile.label[i] : kNoLabel;
      if (label != kNoLabel) {
        const A weight = tile.weight[i];
        const Term<A> term = score_term(terms, A(load(map + shape.element(i, label))), tile.score[i]);
        sum += weight * term.value;
        if (grad != nullptr) store(grad + out.element(i, label), scale * weight * term.grad_pred);
      }
    }
    total += static_cast<double>(sum);
    __syncthreads();  // the next tile's labels take the place of these
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
    score_loss_sum_kernel(const double* partials, int64_t count, ScoreLossScale by, A* loss) {
  double* of_warp = shared<double>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += partials[i];
  sum = warp_sum(sum);
  if (lane == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kSumThreads / kWarp; ++w) sum += of_warp[w];
  const A* norm = static_cast<const A*>(by.norm);
  *loss = static_cast<A>(by.factor * sum /
                         (norm != nullptr ? static_cast<double>(*norm + static_cast<A>(kScoreNormEps)) : 1.0));
}

int64_t tiles_of(const ScoreLossInput& in) {
  return in.classes == 0 ? 0 : (in.locations + kMapTile - 1) / kMapTile;
}

// One walk: the loss where there are partials, the gradient where it is wanted.
template <class T>
void walk(const ScoreLossInput& in, const ScoreLossScale& by, const void* grad_loss, bool grad_stored, double* partials,
          void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t tiles = tiles_of(in), blocks = tiles * in.images;
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(grad_stored && blocks > kFinishBlocks ? kFinishBlocks : blocks));
  const Layout layout{{grad_stride[0], grad_stride[1], grad_stride[2]}};
  const A alpha = static_cast<A>(in.alpha);
  const auto launch = [&](auto kernel, auto terms) {
    GFL_LAUNCH(kernel, grid, dim3(kMapThreads), sizeof(Tile<A>), stream, in, terms, by,
               static_cast<const A*>(grad_loss), grad_stored, tiles, partials, static_cast<T*>(grad), layout);
  };
  const bool sparse = in.label != nullptr;
  if constexpr (sizeof(T) < 8) {
    if (is_fast_path(in.exponent, in.activated)) {
      if (sparse) return launch(score_loss_kernel<T, FastQuality, true>, FastQuality{{{}, alpha}});
      switch (in.kind) {
        case ScoreLoss::quality: return launch(score_loss_kernel<T, FastQuality, false>, FastQuality{{{}, alpha}});
        case ScoreLoss::focal: return launch(score_loss_kernel<T, FastFocal, false>, FastFocal{{{}, alpha}});
        case ScoreLoss::varifocal:
          return launch(score_loss_kernel<T, FastVarifocal, false>, FastVarifocal{{{}, alpha}});
        case ScoreLoss::varifocal_unweighted: break;  // is not: by the walk below
      }
    }
  }
  const GeneralScore<A> terms{{static_cast<A>(in.exponent), in.activated}, in.kind, alpha};
  if (sparse) launch(score_loss_kernel<T, GeneralScore<A>, true>, terms);
  else launch(score_loss_kernel<T, GeneralScore<A>, false>, terms);
}

}  // namespace

bool score_loss_fits(const ScoreLossInput& in) {
  return in.locations < int64_t{1} << 31 && in.classes < int64_t{1} << 24 &&
         tiles_of(in) * in.images < int64_t{1} << 31;
}

int64_t score_loss_workspace(const ScoreLossInput& in) { return tiles_of(in) * in.images; }

cudaError_t score_loss_forward(const ScoreLossInput& in, const ScoreLossScale& by, double* workspace, void* loss,
                               void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  if (!score_loss_fits(in)) return cudaErrorInvalidValue;
  dispatch(in.dtype, [&](auto t) {
    using A = acc_t<decltype(t)>;
    walk<decltype(t)>(in, by, nullptr, false, workspace, grad, grad_stride, stream);
    GFL_LAUNCH(score_loss_sum_kernel<A>, dim3(1), dim3(kSumThreads), sizeof(double) * (kSumThreads / kWarp), stream,
               workspace, score_loss_workspace(in), by, static_cast<A*>(loss));
  });
  return cudaGetLastError();
}

cudaError_t score_loss_backward(const ScoreLossInput& in, const ScoreLossScale& by, const void* grad_loss,
                                bool grad_stored, void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  if (!score_loss_fits(in)) return cudaErrorInvalidValue;
  dispatch(in.dtype, [&](auto t) {
    walk<decltype(t)>(in, by, grad_loss, grad_stored, nullptr, grad, grad_stride, stream);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
