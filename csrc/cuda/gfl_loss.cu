// SPDX-License-Identifier: Apache-2.0
// The losses of heads on the GPU, for any batch, levels and objects: two launches for the losses alone,
// three for the gradients alone, four for both in one pass, with one more in the backward pass, which returns at once
// if the gradients that arrive are 1. Nothing is copied to the host.
// (arXiv 2006.04388, eq. 8)
//
//   cls, reg maps of up to 16 levels  dtype read       labels, matched [images, locations]    int64 read
//   gradients of both kinds           dtype write      gt_boxes        [images, gts, 4]       A     read
//   partials  [images, tiles] of 40 bytes, written and read      losses, norms, scales: single numbers on the device
// A block takes a tile of 128 locations with all their channels, coarse levels first, since positives are dense there.
// Its threads walk the class logits along memory, 16 bytes per access (one element with a β other than 2, and in fp64);
// then its warps take the tile's positives, one each (gfl_loss_positive.h). One block sums the tiles' partial sums. A
// tile's gradients are written as those of background, zeros for the distributions, and overwritten at the positives in
// the same launch. The factors of the gradients depend on the number and weights of the positives, which a launch of
// its own computes first: it reads the labels, and logits (or `scores`, where they are given) at positives only.
// Bytes per element of a class map: the losses sizeof(dtype), the gradients 2·sizeof(dtype), both in one pass
// 2·sizeof(dtype); of a distribution map: sizeof(dtype) written with the gradients, and at positives read three times.
// Accumulator: A within a thread, double beyond. Repeatable bit for bit: every sum has a fixed order.
#include "gfl/head.h"

#include <type_traits>

#include "background.h"
#include "gfl_loss_positive.h"
#include "gfl_loss_sums.h"
#include "launch.h"
#include "map_tile.h"

namespace gfl::cuda {
namespace {

constexpr int kWarps = kMapThreads / kWarp;
constexpr int kBackground = -1, kNotCounted = kHeadNotCounted;  // codes of locations without a class

// The levels by value, and where each begins.
struct Head {
  HeadLevel level[kHeadLossMaxLevels];
  HeadGradients grad[kHeadLossMaxLevels];
  int64_t start[kHeadLossMaxLevels];   // first location
  int first_tile[kHeadLossMaxLevels];  // counted from the last level
  int levels, tiles;
};

// What a block shares.
struct Tile {
  double sums[kWarps][4];
  int code[kMapTile];  // the class of a positive, or one of the codes
  int slot[kMapTile];
  int positive[kMapTile];
  int count[kMapTile / kWarp];
};

// Which tile a block has.
struct Place {
  int level;
  int64_t image, begin;
};

__device__ __forceinline__ Place place_of(const Head& head, int64_t images) {
  const int tile = static_cast<int>(int64_t(blockIdx.x) / images);
  int level = head.levels - 1;
  while (level > 0 && tile >= head.first_tile[level - 1]) --level;
  return {level, int64_t(blockIdx.x) % images, int64_t(tile - head.first_tile[level]) * kMapTile};
}

// Reads the tile's labels and lists its positives in order. Returns how many there are.
__device__ __forceinline__ int read_labels(const HeadLossInput& in, const Head& head, const Place& at, Tile& tile,
                                           bool& special) {
  const HeadLevel& level = head.level[at.level];
  const int i = static_cast<int>(threadIdx.x), lane = i % kWarp, warp = i / kWarp;
  int code = kBackground;
  unsigned positives = 0;
  if (i < kMapTile) {
    if (at.begin + i < level.height * level.width) {
      const int64_t location = at.image * in.locations + head.start[at.level] + at.begin + i;
      const int64_t label = in.labels[location], slot = in.matched[location];
      const bool positive = is_positive(in, label, slot);
      code = positive ? static_cast<int>(label) : (label == kNotCounted ? kNotCounted : kBackground);
      tile.slot[i] = positive ? static_cast<int>(slot) : -1;
    }
    tile.code[i] = code;
    positives = __ballot_sync(kFullMask, code >= 0);
    if (lane == 0) tile.count[warp] = __popc(positives);
  }
  special = __syncthreads_or(code != kBackground) != 0;
  int before = 0, all = 0;
  for (int w = 0; w < kMapTile / kWarp; ++w) {
    if (w < warp) before += tile.count[w];
    all += tile.count[w];
  }
  if (code >= 0) tile.positive[before + __popc(positives & ((1u << lane) - 1u))] = i;
  __syncthreads();
  return all;
}

__device__ __forceinline__ HeadPositive positive_in(const HeadLossInput& in, const Head& head, const Place& at,
                                                    const Tile& tile, int item) {
  const int i = tile.positive[item];
  const unsigned index = static_cast<unsigned>(at.begin) + static_cast<unsigned>(i);
  const unsigned width = static_cast<unsigned>(head.level[at.level].width);
  const int64_t location = at.image * in.locations + head.start[at.level] + index;
  return {at.image, at.level, index / width, index % width, location, tile.code[i], tile.slot[i]};
}

template <class T> __device__ __forceinline__ const T* class_logits(const HeadLevel& level, const HeadPositive& p) {
  const int64_t* stride = level.cls_stride;
  return static_cast<const T*>(level.cls) + p.image * stride[0] + p.row * stride[2] + p.column * stride[3];
}

// What a pass computes besides the norms: fixed per kernel where speed matters, else known at run time.
struct NormsOnly { static constexpr bool losses = false, gradients = false; };
struct LossesOnly { static constexpr bool losses = true, gradients = false; };
struct WithGradients {
  static constexpr bool gradients = true;
  bool losses;
};
struct AnyPart { bool losses, gradients; };

// Zeros a tile of a map. Zero is all zero bits in every dtype.
__device__ __forceinline__ void clear_tile(void* data, DType dtype, const int64_t (&stride)[4], const Place& at,
                                           const HeadLevel& level, int64_t channels) {
  const int bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  const MapTile shape = map_tile(data, 16 / bytes, stride, at.image, level.height, level.width, at.begin, channels);
  for_runs<char, false>(
      shape, [](Run<char, false>&) {},
      [&](Run<char, false>& run) {
        char* const first = static_cast<char*>(data) + run.offset * bytes;
        if (shape.vectors()) *reinterpret_cast<uint4*>(first) = uint4{0, 0, 0, 0};
        else if (bytes == 8) *reinterpret_cast<uint64_t*>(first) = 0;
        else if (bytes == 4) *reinterpret_cast<uint32_t*>(first) = 0;
        else *reinterpret_cast<uint16_t*>(first) = 0;
      });
}

// The gradient that arrives; 1 where none is given.
template <class A> __device__ __forceinline__ double incoming(const void* grad) {
  return grad != nullptr ? static_cast<double>(*static_cast<const A*>(grad)) : 1.0;
}

// A tile's partial sums (without losses only those of the norms) and its gradients.
template <class T, class Part, class Params>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>)
    gfl_loss_tile_kernel(HeadLossInput in, const __grid_constant__ Head head, Part part, Params terms,
                         const HeadScales* scales, HeadLossGrads grads, bool grad_stored, Partial* partials) {
  using A = acc_t<T>;
  using Kind = typename Params::Head;
  if (part.gradients && grad_stored && incoming<A>(grads.cls) == 1 && incoming<A>(grads.box) == 1 &&
      incoming<A>(grads.dfl) == 1) {
    return;
  }
  Tile& tile = *shared<Tile>();
  const Place at = place_of(head, in.images);
  const HeadLevel& level = head.level[at.level];
  const HeadGradients& out = head.grad[at.level];
  bool special;
  const int positives = read_labels(in, head, at, tile, special);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // A shuffle tells the compiler that the warp index is uniform over the warp.
  const int warp = __shfl_sync(kFullMask, static_cast<int>(threadIdx.x) / kWarp, 0);
  double sums[4] = {0, 0, 0, 0};
  T* grad = part.gradients ? static_cast<T*>(out.cls) : nullptr;
  if (part.losses || grad != nullptr) {
    const T* map = static_cast<const T*>(level.cls);
    constexpr bool vectorised = Params::vectorised;
    MapTile shape =
        map_tile<T, vectorised>(map, level.cls_stride, at.image, level.height, level.width, at.begin, in.classes);
    MapTile target{};
    if (grad != nullptr) {
      target = map_tile<T, vectorised>(grad, out.cls_stride, at.image, level.height, level.width, at.begin, in.classes);
      shape.match_layout(target);
    }
    const A factor = part.gradients ? static_cast<A>(incoming<A>(grads.cls) * scales->cls) : A(0);
    A sum = 0;
    for_runs<T, vectorised>(
        shape, [&](Run<T, vectorised>& run) { load_run(map, shape, run); },
        [&](Run<T, vectorised>& run) {
          for_elements(shape, run, [&](T& element, int location, int channel) {
            const Term<A> term = background_term(terms, load(&element));
            A value = term.value, slope = factor * term.grad_pred;
            if (special) {
              const int code = tile.code[location];
              if (code == channel || code == kNotCounted) value = 0;  // its own class comes below
              if (code == kNotCounted) slope = 0;
            }
            sum += value;
            if (part.gradients) store(&element, slope);
          });
          if (grad != nullptr) store_run(grad, shape, target, run);
        });
    if (part.losses) sums[0] = warp_sum(static_cast<double>(sum));
  }
  if (part.gradients && out.reg != nullptr) {
    clear_tile(out.reg, in.reg_dtype, out.reg_stride, at, level, 4 * (in.reg_max + 1));
  }
  HeadScales factors{1, 1, 1};
  if (part.gradients) {
    factors = {incoming<A>(grads.cls) * scales->cls, incoming<A>(grads.box) * scales->box,
               incoming<A>(grads.dfl) * scales->dfl};
    __syncthreads();  // the positives overwrite what the block has written above
  }
  for (int item = warp; item < positives; item += kWarps) {
    const HeadPositive p = positive_in(in, head, at, tile, item);
    const T* logits = class_logits<T>(level, p);
    A score{}, largest{};
    if constexpr (Kind::scores_given) score = largest = static_cast<const A*>(in.scores)[p.location];
    else largest = largest_probability(logits, level.cls_stride[1], in.classes);
    const double weight = static_cast<double>(largest);
    sums[3] += weight;
    if (!part.losses && !part.gradients) continue;
    const Positive<A> w = positive_at<Kind, A>(in, level, p);
    if constexpr (!Kind::scores_given) {
      score = head_iou<Kind>(w.geometry, w.distance, iou_kind::overlap{}, in.legacy).value;
    }
    const Term<A> term = positive_term(terms, load(logits + p.label * level.cls_stride[1]), score);
    if (part.losses) {
      const IouTerm<A> box = head_iou<Kind>(w.geometry, w.distance, typename Kind::Box{}, in.legacy);
      sums[0] += static_cast<double>(term.value);
      sums[1] += weight * static_cast<double>(box.value);
      sums[2] += weight * static_cast<double>(positive_dfl<Kind>(in, level, w));
    }
    if (grad != nullptr && lane == 0) {
      const int64_t* stride = out.cls_stride;
      store(grad + p.image * stride[0] + p.label * stride[1] + p.row * stride[2] + p.column * stride[3],
            static_cast<A>(factors.cls) * term.grad_pred);
    }
    if (part.gradients && out.reg != nullptr) {
      positive_backward<Kind>(in, level, out, p, w, static_cast<A>(factors.box * weight),
                              static_cast<A>(factors.dfl * weight / 4));
    }
  }
  if (partials == nullptr) return;
  if (lane == 0) {
    for (int i = 0; i < 4; ++i) tile.sums[warp][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Partial partial{0, 0, 0, 0, positives};
  for (int w = 0; w < kWarps; ++w) {
    partial.cls += tile.sums[w][0];
    partial.box += tile.sums[w][1];
    partial.dfl += tile.sums[w][2];
    partial.weight += tile.sums[w][3];
  }
  partials[at.image * head.tiles + int64_t(blockIdx.x) / in.images] = partial;
}

template <class A>
__global__ void __launch_bounds__(kSumThreads)
    gfl_loss_sum_kernel(const Partial* partials, int64_t images, int tiles, HeadLossKind kind, HeadLossScalars scalars,
                        HeadLossOutput out) {
  const Sums s = sum_partials(partials, images, tiles);
  if (threadIdx.x != 0) return;
  const Norms norms = norms_of<A>(kind, scalars, s);
  *static_cast<A*>(out.cls) = static_cast<A>(scalars.loss_weights[0] * s.cls / norms.cls);
  *static_cast<A*>(out.box) = static_cast<A>(scalars.loss_weights[1] * s.box / norms.box);
  *static_cast<A*>(out.dfl) = static_cast<A>(scalars.loss_weights[2] * s.dfl / norms.box);
  *static_cast<A*>(out.num_pos) = static_cast<A>(s.positives);
  *static_cast<A*>(out.box_weight) = static_cast<A>(s.weight);
}

// The factors of the gradients if 1 arrives.
template <class A>
__global__ void __launch_bounds__(kSumThreads)
    gfl_loss_scale_kernel(const Partial* partials, int64_t images, int tiles, HeadLossKind kind,
                          HeadLossScalars scalars, HeadScales* scales) {
  const Sums s = sum_partials(partials, images, tiles);
  if (threadIdx.x != 0) return;
  const Norms norms = norms_of<A>(kind, scalars, s);
  *scales = {scalars.loss_weights[0] / norms.cls, scalars.loss_weights[1] / norms.box,
             scalars.loss_weights[2] / norms.box};
}

template <class A>
__global__ void __launch_bounds__(kSumThreads)
    head_loss_norms_kernel(const Partial* partials, int64_t images, int tiles, HeadNorms norms) {
  const Sums s = sum_partials(partials, images, tiles);
  if (threadIdx.x != 0) return;
  *static_cast<A*>(norms.cls) = static_cast<A>(s.norm);
  *static_cast<A*>(norms.box) = static_cast<A>(s.weight);
}

int64_t tiles_of(const HeadLevel& level) { return (level.height * level.width + kMapTile - 1) / kMapTile; }

int64_t tiles_in(const HeadLossInput& in) {
  int64_t tiles = 0;
  for (int64_t l = 0; l < in.level_count; ++l) tiles += tiles_of(in.levels[l]);
  return tiles;
}

Head head_of(const HeadLossInput& in, const HeadGradients* gradients) {
  Head head{};
  head.levels = static_cast<int>(in.level_count);
  int64_t start = 0;
  for (int64_t l = 0; l < in.level_count; ++l) {
    head.level[l] = in.levels[l];
    if (gradients != nullptr) head.grad[l] = gradients[l];
    head.start[l] = start;
    start += in.levels[l].height * in.levels[l].width;
  }
  for (int64_t l = in.level_count - 1; l >= 0; --l) {
    head.first_tile[l] = head.tiles;
    head.tiles += static_cast<int>(tiles_of(in.levels[l]));
  }
  return head;
}

dim3 grid_of(const HeadLossInput& in, const Head& head) { return dim3(static_cast<unsigned>(head.tiles * in.images)); }

// One pass over the tiles: a launch.
template <class T, class Part>
void launch_tiles(const HeadLossInput& in, const Head& head, Part part, const HeadScales* scales,
                  const HeadLossGrads& grads, bool grad_stored, Partial* partials, cudaStream_t stream) {
  if (head.tiles * in.images == 0) return;
  const auto launch = [&](auto wanted, auto terms) {
    GFL_LAUNCH((gfl_loss_tile_kernel<T, decltype(wanted), decltype(terms)>), grid_of(in, head), dim3(kMapThreads),
               sizeof(Tile), stream, in, head, wanted, terms, scales, grads, grad_stored, partials);
  };
  dispatch_head(in, [&](auto kind) {
    using Kind = decltype(kind);
    if constexpr (std::is_same_v<Part, NormsOnly>) {
      launch(part, General<Kind, acc_t<T>>{});  // computes no term
    } else {
      dispatch_terms<Kind, T>(in.beta, [&](auto terms) {
        if constexpr (terms.vectorised) launch(part, terms);
        else launch(AnyPart{part.losses, part.gradients}, terms);
      });
    }
  });
}

// Up to two launches: number and weights of the positives, unless both norms are given, and the factors from them.
template <class T>
void launch_scales(const HeadLossInput& in, const Head& head, const HeadLossScalars& scalars, Partial* partials,
                   HeadScales* scales, cudaStream_t stream) {
  const bool counted = scalars.cls_norm == nullptr || scalars.box_norm == nullptr;
  if (counted) launch_tiles<T>(in, head, NormsOnly{}, nullptr, {}, false, partials, stream);
  GFL_LAUNCH(gfl_loss_scale_kernel<acc_t<T>>, dim3(1), dim3(kSumThreads), kSumShared, stream, partials,
             counted ? in.images : 0, head.tiles, in.kind, scalars, scales);
}

template <class T>
void launch_sum(const HeadLossInput& in, const Head& head, const HeadLossScalars& scalars, const Partial* partials,
                const HeadLossOutput& out, cudaStream_t stream) {
  GFL_LAUNCH(gfl_loss_sum_kernel<acc_t<T>>, dim3(1), dim3(kSumThreads), kSumShared, stream, partials, in.images,
             head.tiles, in.kind, scalars, out);
}

}  // namespace

bool head_loss_norms_fits(const HeadLossInput& in) {
  return in.level_count <= kHeadLossMaxLevels && in.locations < int64_t{1} << 31 && in.classes < int64_t{1} << 24 &&
         tiles_in(in) * in.images < int64_t{1} << 31;
}

bool gfl_loss_fits(const HeadLossInput& in) { return head_loss_norms_fits(in) && in.gts < int64_t{1} << 31; }

size_t gfl_loss_workspace_bytes(const HeadLossInput& in) {
  return sizeof(Partial) * static_cast<size_t>(tiles_in(in) * in.images);
}

cudaError_t gfl_loss_forward(const HeadLossInput& in, const HeadLossScalars& scalars, void* workspace,
                             const HeadLossOutput& out, cudaStream_t stream) {
  if (!gfl_loss_fits(in)) return cudaErrorInvalidValue;
  const Head head = head_of(in, nullptr);
  Partial* partials = static_cast<Partial*>(workspace);
  dispatch(in.cls_dtype, [&](auto t) {
    using T = decltype(t);
    launch_tiles<T>(in, head, LossesOnly{}, nullptr, {}, false, partials, stream);
    launch_sum<T>(in, head, scalars, partials, out, stream);
  });
  return cudaGetLastError();
}

cudaError_t gfl_loss_forward_and_gradient(const HeadLossInput& in, const HeadLossScalars& scalars, void* workspace,
                                          const HeadLossOutput& out, HeadScales* scales, const HeadGradients* gradients,
                                          cudaStream_t stream) {
  if (!gfl_loss_fits(in)) return cudaErrorInvalidValue;
  const Head head = head_of(in, gradients);
  Partial* partials = static_cast<Partial*>(workspace);
  dispatch(in.cls_dtype, [&](auto t) {
    using T = decltype(t);
    launch_scales<T>(in, head, scalars, partials, scales, stream);
    launch_tiles<T>(in, head, WithGradients{true}, scales, {}, false, partials, stream);
    launch_sum<T>(in, head, scalars, partials, out, stream);
  });
  return cudaGetLastError();
}

cudaError_t gfl_loss_finish(const HeadLossInput& in, const HeadScales* scales, const HeadLossGrads& grads,
                            const HeadGradients* gradients, cudaStream_t stream) {
  if (!gfl_loss_fits(in)) return cudaErrorInvalidValue;
  const Head head = head_of(in, gradients);
  dispatch(in.cls_dtype, [&](auto t) {
    launch_tiles<decltype(t)>(in, head, WithGradients{false}, scales, grads, true, nullptr, stream);
  });
  return cudaGetLastError();
}

cudaError_t gfl_loss_backward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossGrads& grads,
                              void* workspace, HeadScales* scales, const HeadGradients* gradients,
                              cudaStream_t stream) {
  if (!gfl_loss_fits(in)) return cudaErrorInvalidValue;
  const Head head = head_of(in, gradients);
  if (head.tiles * in.images == 0) return cudaSuccess;
  Partial* partials = static_cast<Partial*>(workspace);
  dispatch(in.cls_dtype, [&](auto t) {
    using T = decltype(t);
    launch_scales<T>(in, head, scalars, partials, scales, stream);
    launch_tiles<T>(in, head, WithGradients{false}, scales, grads, false, nullptr, stream);
  });
  return cudaGetLastError();
}

cudaError_t head_loss_norms(const HeadLossInput& in, void* workspace, const HeadNorms& norms, cudaStream_t stream) {
  if (!head_loss_norms_fits(in)) return cudaErrorInvalidValue;
  const Head head = head_of(in, nullptr);
  Partial* partials = static_cast<Partial*>(workspace);
  dispatch(in.cls_dtype, [&](auto t) {
    using T = decltype(t);
    launch_tiles<T>(in, head, NormsOnly{}, nullptr, {}, false, partials, stream);
    GFL_LAUNCH(head_loss_norms_kernel<acc_t<T>>, dim3(1), dim3(kSumThreads), kSumShared, stream, partials, in.images,
               head.tiles, norms);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
