// SPDX-License-Identifier: Apache-2.0
// Losses of class scores down to one number, with the gradient from the same walk: two launches forward, one backward,
// which leaves at once where the gradient that arrives is the one that was foretold.
//
//   pred     [images, classes, locations]  dtype read      label [images, locations] int64 read
//   target   [images, locations], or pred's shape  A read  weight [images, locations] A read
//   grad     as pred                       dtype write     loss, norm, grad_loss: single numbers of A
//   partials [tiles] double, written and read
// A block takes a tile of 128 locations with all their classes and walks it along memory, 16 bytes an access, in any layout
// (map_tile.h); labels, scores and weights of the tile lie in shared memory. A second launch adds up the tiles.
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
constexpr int64_t kForetoldBlocks = 1024;

// Blocks an SM, asked of the compiler: the most for which it spills nothing for sm_90.
template <class T, bool sparse> constexpr int kBlocks = sizeof(T) == 8 ? 1 : sizeof(T) == 4 || sparse ? 3 : 2;

struct Layout { int64_t stride[3]; };

// The terms, as functions of score and target.
template <class A> struct Quality {
  A alpha, exponent;
  bool activated;
  __device__ __forceinline__ Term<A> operator()(A x, A t) const { return qfl_term(x, t, exponent, activated); }
};
template <class A> struct Focal {
  A alpha, exponent;
  bool activated;
  __device__ __forceinline__ Term<A> operator()(A x, A t) const {
    return focal_term(x, t, alpha, exponent, activated);
  }
};
template <class A, bool weighted> struct Varifocal {
  A alpha, exponent;
  bool activated;
  __device__ __forceinline__ Term<A> operator()(A x, A t) const {
    return vfl_term(x, t, alpha, exponent, weighted, activated);
  }
};

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
template <class T> struct Beside {
  acc_t<T> value[kRun<T>];
  __device__ __forceinline__ void read(const acc_t<T>* from) {
    constexpr int words = static_cast<int>(sizeof value / 16);
#pragma unroll
    for (int w = 0; w < words; ++w) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[w];
      memcpy(reinterpret_cast<char*>(value) + 16 * w, &four, 16);
    }
  }
};

// `grad_loss` null: forward, with the sum of the losses. `grad` may be null then.
template <class T, template <class> class Score, bool sparse>
__global__ void __launch_bounds__(kMapThreads, (kBlocks<T, sparse>))
    score_loss_kernel(ScoreLossInput in, Score<acc_t<T>> term, ScoreLossScale by, const acc_t<T>* grad_loss,
                      bool foretold, int64_t tiles, double* partials, T* grad, Layout grad_layout) {
  using A = acc_t<T>;
  if (foretold && *grad_loss == A(1)) return;
  Tile<A>& tile = *shared<Tile<A>>();
  const T* map = static_cast<const T*>(in.pred);
  const A* targets = static_cast<const A*>(in.target);
  const A* norm = static_cast<const A*>(by.norm);
  const A one = static_cast<A>(by.factor) / (norm != nullptr ? *norm + static_cast<A>(kScoreNormEps) : A(1));
  const A scale = grad_loss != nullptr ? one * *grad_loss : one;
  const Background<A> background{term.exponent};
  const bool plain = !term.activated;
  double total = 0;
  for (int64_t block = blockIdx.x; block < tiles * in.images; block += gridDim.x) {
    const int64_t image = block / tiles, begin = block % tiles * kMapTile;
    const int64_t stride[4] = {in.stride[0], in.stride[1], 0, in.stride[2]};
    const int64_t out_stride[4] = {grad_layout.stride[0], grad_layout.stride[1], 0, grad_layout.stride[2]};
    const int64_t aim_stride[4] = {in.target_stride[0], in.target_stride[1], 0, in.target_stride[2]};
    const MapTile shape = map_tile<T>(map, stride, image, 1, in.locations, begin, in.classes);
    const MapTile out = map_tile<T>(grad, out_stride, image, 1, in.locations, begin, in.classes);
    MapTile aim{};
    if (!sparse) aim = map_tile<A>(targets, aim_stride, image, 1, in.locations, begin, in.classes);
    const bool beside = !sparse && alike(shape, aim);
    const bool labelled = read_rows(in, image * in.locations + begin, shape.count, tile);
    A sum = 0;
    for_runs<T>(
        shape, [&](Run<T>& run) { load_run(map, shape.vectors, run); },
        [&](Run<T>& run) {
          Beside<T> near;
          if (beside) near.read(targets + aim.location(run.location) + run.channel * aim.channel);
          int v = 0;
          for_elements_into(shape, out, grad, run, [&](T& element, int location, int channel) {
            const A x = load(&element), weight = tile.weight[location];
            A value, slope;
            if (sparse && plain && !(labelled && tile.label[location] == channel)) {
              value = background.loss(x);
              slope = background.gradient(x);
            } else {
              A t = A(0);
              if (!sparse) t = beside ? near.value[v] : targets[aim.location(location) + channel * aim.channel];
              else if (tile.label[location] == channel) t = tile.score[location];
              const Term<A> both = term(x, t);
              value = both.value;
              slope = both.grad_pred;
            }
            ++v;
            sum += weight * value;
            if (grad != nullptr) store(&element, scale * weight * slope);
          });
        });
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

template <class A> using VarifocalWeighted = Varifocal<A, true>;
template <class A> using VarifocalUnweighted = Varifocal<A, false>;

int64_t tiles_of(const ScoreLossInput& in) {
  return in.classes == 0 ? 0 : (in.locations + kMapTile - 1) / kMapTile;
}

// One walk: the loss where there are partials, the gradient where it is wanted.
void walk(const ScoreLossInput& in, const ScoreLossScale& by, const void* grad_loss, bool foretold, double* partials,
          void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  const int64_t tiles = tiles_of(in), blocks = tiles * in.images;
  if (blocks == 0) return;
  const dim3 grid(static_cast<unsigned>(foretold && blocks > kForetoldBlocks ? kForetoldBlocks : blocks));
  const Layout layout{{grad_stride[0], grad_stride[1], grad_stride[2]}};
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const A alpha = static_cast<A>(in.alpha), exponent = static_cast<A>(in.exponent);
    const auto launch = [&](auto kernel, auto term) {
      GFL_LAUNCH(kernel, grid, dim3(kMapThreads), sizeof(Tile<A>), stream, in, term, by,
                 static_cast<const A*>(grad_loss), foretold, tiles, partials, static_cast<T*>(grad), layout);
    };
    switch (in.kind) {
      case ScoreLoss::quality: {
        const Quality<A> term{alpha, exponent, in.activated};
        if (in.label != nullptr) launch(score_loss_kernel<T, Quality, true>, term);
        else launch(score_loss_kernel<T, Quality, false>, term);
        return;
      }
      case ScoreLoss::focal:
        return launch(score_loss_kernel<T, Focal, false>, Focal<A>{alpha, exponent, in.activated});
      case ScoreLoss::varifocal:
        return launch(score_loss_kernel<T, VarifocalWeighted, false>,
                      VarifocalWeighted<A>{alpha, exponent, in.activated});
      case ScoreLoss::varifocal_unweighted:
        return launch(score_loss_kernel<T, VarifocalUnweighted, false>,
                      VarifocalUnweighted<A>{alpha, exponent, in.activated});
    }
  });
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
  walk(in, by, nullptr, false, workspace, grad, grad_stride, stream);
  dispatch(in.dtype, [&](auto t) {
    using A = acc_t<decltype(t)>;
    GFL_LAUNCH(score_loss_sum_kernel<A>, dim3(1), dim3(kSumThreads), sizeof(double) * (kSumThreads / kWarp), stream,
               workspace, score_loss_workspace(in), by, static_cast<A*>(loss));
  });
  return cudaGetLastError();
}

cudaError_t score_loss_backward(const ScoreLossInput& in, const ScoreLossScale& by, const void* grad_loss,
                                bool foretold, void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream) {
  if (!score_loss_fits(in)) return cudaErrorInvalidValue;
  walk(in, by, grad_loss, foretold, nullptr, grad, grad_stride, stream);
  return cudaGetLastError();
}

}  // namespace gfl::cuda
