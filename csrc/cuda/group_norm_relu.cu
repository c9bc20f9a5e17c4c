// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU on the GPU: two launches forward, two backward, whatever the levels and images.
//                                                                                             (arXiv 1803.08494, eq. 1)
//   x, grad_y            maps of up to 16 levels  dtype read    y, grad_x   the same  dtype write
//   weight, bias         [channels]               dtype or A    statistics  [levels, images, groups, 2] A write, read
//   partials             pairs of A, written by the first launch and read by the second
// A block takes a slab of whole groups, about 64 channels, and one of up to 32 pieces of a level's locations. The first
// launch sums over the block's values; the second puts the pieces of its groups together, a warp a group, and computes the
// values. Where channels lie side by side, a thread keeps to its channels and walks over locations; where locations do, a
// warp takes a channel; 16 bytes an access where alignment allows. Backward, the first blocks of the second launch sum up
// the parameters' gradients.
// Bytes an element: forward 2 readings and 1 writing, backward twice 2 and 1; the second reading comes out of the L2 cache
// where a batch fits there. Accumulator: A within a block, about a value of the piece, double beyond. Repeatable bit for
// bit: every sum has a fixed order.
#include "gfl/group_norm_relu.h"

#include <cmath>
#include <cstring>

#include "terms/host_device.h"
#include "launch.h"
#include "terms/scalar.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPieces = kWarp;           // of a level's locations at most: a lane each where they are put together
constexpr int64_t kFewestLocations = 64;  // of a piece
constexpr int64_t kSlabChannels = 64;

// How many elements of T are 16 bytes.
template <class T> constexpr int kRun = 16 / static_cast<int>(sizeof(T));

// The levels by value, and how they are cut up.
struct Plan {
  NormLevel level[kGroupNormReluMaxLevels];
  NormMap grad[kGroupNormReluMaxLevels];  // grad_y
  NormMap out[kGroupNormReluMaxLevels];   // y or grad_x
  int64_t first_block[kGroupNormReluMaxLevels];
  int64_t piece[kGroupNormReluMaxLevels];  // locations
  int pieces[kGroupNormReluMaxLevels];
  int levels, slabs, slab_groups;
  int64_t blocks;
};

template <class A> struct Pair { A first, second; };

// What a block works on.
struct Slab {
  int level, piece;
  int64_t image, pair;       // level · images + image
  int group, groups;         // first, number
  int channel, channels;
  int64_t begin, count;      // locations
};

__device__ __forceinline__ Slab slab_of(const GroupNormInput& in, const Plan& plan, int64_t block) {
  Slab s;
  s.level = plan.levels - 1;
  while (s.level > 0 && block < plan.first_block[s.level]) --s.level;
  block -= plan.first_block[s.level];
  s.piece = static_cast<int>(block % plan.pieces[s.level]);
  block /= plan.pieces[s.level];
  const int slab = static_cast<int>(block % plan.slabs);
  s.image = block / plan.slabs;
  s.pair = s.level * in.images + s.image;
  s.group = slab * plan.slab_groups;
  s.groups = static_cast<int>(in.groups) - s.group;
  if (s.groups > plan.slab_groups) s.groups = plan.slab_groups;
  const int each = static_cast<int>(in.group_channels());
  s.channel = s.group * each;
  s.channels = s.groups * each;
  const int64_t locations = plan.level[s.level].locations;
  s.begin = s.piece * plan.piece[s.level];
  s.count = locations - s.begin;
  if (s.count > plan.piece[s.level]) s.count = plan.piece[s.level];
  if (s.count < 0) s.count = 0;
  return s;
}

// The slab's part of a map: element (channel, location) at data[channel · stride_channel + location · stride_location].
template <class T> struct View {
  T* data;
  int64_t stride_channel, stride_location;
  bool vectors;  // whether all runs of 16 bytes along the dense dimension are aligned
};

template <class T> __device__ __forceinline__ View<T> view_of(const NormMap& map, const Slab& s, bool planar) {
  constexpr int run = kRun<T>;
  View<T> v;
  v.data = static_cast<T*>(map.data) + s.image * map.stride_image + s.channel * map.stride_channel +
           s.begin * map.stride_location;
  v.stride_channel = map.stride_channel;
  v.stride_location = map.stride_location;
  v.vectors = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
              (planar ? s.channels == 1 || map.stride_channel % run == 0
                      : s.channels % run == 0 && (s.count <= 1 || map.stride_location % run == 0));
  return v;
}

template <class T, int V> struct Run { T element[V]; };

template <class T, int V> __device__ __forceinline__ Run<T, V> load_run(const T* from) {
  Run<T, V> run;
  if (V == 1) {
    run.element[0] = *from;
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    memcpy(&run, &words, sizeof run);
  }
  return run;
}
template <class T, int V> __device__ __forceinline__ void store_run(T* to, const Run<T, V>& run) {
  if (V == 1) {
    *to = run.element[0];
  } else {
    uint4 words;
    memcpy(&words, &run, sizeof run);
    *reinterpret_cast<uint4*>(to) = words;
  }
}

// A thread's share of a slab whose channels lie side by side: every `rows`-th location of its runs of channels.
struct Share {
  int runs, wide, rows, column, row;
  __device__ __forceinline__ Share(int channels, int length) {
    const int thread = static_cast<int>(threadIdx.x);
    runs = channels / length;
    wide = runs < kThreads ? runs : kThreads;
    rows = kThreads / wide;
    column = thread % wide;
    row = thread / wide;
  }
};

// Two sums over the block's values of each channel, to of_channel. prepare(channel) gives what a thread keeps for it, and
// add(that, x, grad, sums) takes a value; `grad` is read where kGrad. `scratch`: two of A for every channel and row.
template <bool kGrad, int V, class T, class Prepare, class Add>
__device__ __forceinline__ void slab_sums(const Slab& s, bool planar, const View<T>& x, const View<T>& grad,
                                          const Prepare& prepare, const Add& add, Pair<acc_t<T>>* scratch,
                                          Pair<acc_t<T>>* of_channel) {
  using A = acc_t<T>;
  using Kept = decltype(prepare(0));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  if (planar) {
    const int64_t runs = s.count / V;
    for (int c = warp; c < s.channels; c += kWarps) {
      const Kept kept = prepare(c);
      const T* from = x.data + c * x.stride_channel;
      const T* grad_from = kGrad ? grad.data + c * grad.stride_channel : nullptr;
      Pair<A> sums{0, 0};
#pragma unroll 4
      for (int64_t i = lane; i < runs; i += kWarp) {
        const Run<T, V> run = load_run<T, V>(from + i * V);
        const Run<T, V> of_grad = kGrad ? load_run<T, V>(grad_from + i * V) : run;
#pragma unroll
        for (int v = 0; v < V; ++v) add(kept, load(&run.element[v]), load(&of_grad.element[v]), sums);
      }
      const int64_t rest = runs * V + lane;
      if (rest < s.count) add(kept, load(from + rest), kGrad ? load(grad_from + rest) : A(0), sums);
      sums.first = warp_sum(sums.first);
      sums.second = warp_sum(sums.second);
      if (lane == 0) of_channel[c] = sums;
    }
    __syncthreads();
    return;
  }
  const Share mine(s.channels, V);
  if (mine.row < mine.rows) {
    for (int r = mine.column; r < mine.runs; r += mine.wide) {
      Kept kept[V];
      Pair<A> sums[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        kept[v] = prepare(r * V + v);
        sums[v] = {0, 0};
      }
#pragma unroll 4
      for (int64_t i = mine.row; i < s.count; i += mine.rows) {
        const Run<T, V> run = load_run<T, V>(x.data + i * x.stride_location + r * V);
        const Run<T, V> of_grad = kGrad ? load_run<T, V>(grad.data + i * grad.stride_location + r * V) : run;
#pragma unroll
        for (int v = 0; v < V; ++v) add(kept[v], load(&run.element[v]), load(&of_grad.element[v]), sums[v]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) scratch[mine.row * s.channels + r * V + v] = sums[v];
    }
  }
  __syncthreads();
  for (int c = thread; c < s.channels; c += kThreads) {
    Pair<A> sums{0, 0};
    for (int row = 0; row < mine.rows; ++row) {
      sums.first += scratch[row * s.channels + c].first;
      sums.second += scratch[row * s.channels + c].second;
    }
    of_channel[c] = sums;
  }
  __syncthreads();
}

// out = value(what prepare gave, x, grad) for the block's values.
template <bool kGrad, int V, class T, class Prepare, class Value>
__device__ __forceinline__ void slab_values(const Slab& s, bool planar, const View<T>& x, const View<T>& grad,
                                            const View<T>& out, const Prepare& prepare, const Value& value) {
  using A = acc_t<T>;
  using Kept = decltype(prepare(0));
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  if (planar) {
    const int64_t runs = s.count / V;
    for (int c = warp; c < s.channels; c += kWarps) {
      const Kept kept = prepare(c);
      const T* from = x.data + c * x.stride_channel;
      const T* grad_from = kGrad ? grad.data + c * grad.stride_channel : nullptr;
      T* to = out.data + c * out.stride_channel;
#pragma unroll 2
      for (int64_t i = lane; i < runs; i += kWarp) {
        Run<T, V> run = load_run<T, V>(from + i * V);
        const Run<T, V> of_grad = kGrad ? load_run<T, V>(grad_from + i * V) : run;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          store(&run.element[v], value(kept, load(&run.element[v]), load(&of_grad.element[v])));
        }
        store_run(to + i * V, run);
      }
      const int64_t rest = runs * V + lane;
      if (rest < s.count) store(to + rest, value(kept, load(from + rest), kGrad ? load(grad_from + rest) : A(0)));
    }
    return;
  }
  const Share mine(s.channels, V);
  if (mine.row >= mine.rows) return;
  for (int r = mine.column; r < mine.runs; r += mine.wide) {
    Kept kept[V];
#pragma unroll
    for (int v = 0; v < V; ++v) kept[v] = prepare(r * V + v);
#pragma unroll 2
    for (int64_t i = mine.row; i < s.count; i += mine.rows) {
      Run<T, V> run = load_run<T, V>(x.data + i * x.stride_location + r * V);
      const Run<T, V> of_grad = kGrad ? load_run<T, V>(grad.data + i * grad.stride_location + r * V) : run;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        store(&run.element[v], value(kept[v], load(&run.element[v]), load(&of_grad.element[v])));
      }
      store_run(out.data + i * out.stride_location + r * V, run);
    }
  }
}

// body(std::integral_constant) with the length of runs: 16 bytes where all maps allow.
template <int V> struct Length { static constexpr int value = V; };
template <class T, class Body> __device__ __forceinline__ void by_length(bool vectors, const Body& body) {
  if (vectors) body(Length<kRun<T>>{});
  else body(Length<1>{});
}

template <class A> __device__ __forceinline__ A parameter(const GroupNormInput& in, const void* values, int64_t c) {
  switch (in.parameter_dtype) {
    case DType::f16: return static_cast<A>(load(static_cast<const half_t*>(values) + c));
    case DType::bf16: return static_cast<A>(load(static_cast<const bfloat16_t*>(values) + c));
    case DType::f64: return static_cast<A>(static_cast<const double*>(values)[c]);
    case DType::f32: break;
  }
  return static_cast<A>(static_cast<const float*>(values)[c]);
}

// A channel's coefficients. The value before the ReLU is the same expression in both directions, so that both cut the
// same elements.
template <class A> struct Forward {
  A mean, scale, bias;
  __device__ __forceinline__ A value(A x) const { return std::fma(x - mean, scale, bias); }
  __device__ __forceinline__ A passed(A x, A grad, bool relu) const {
    return relu && value(x) <= A(0) ? A(0) : grad;  // NaN passes
  }
};
template <class A> struct Backward {
  Forward<A> forward;
  A level, slope;
};

template <class A> __device__ __forceinline__ Forward<A> forward_of(const GroupNormInput& in, const Pair<A>& statistic,
                                                                   int64_t channel) {
  return {statistic.first, statistic.second * parameter<A>(in, in.weight, channel),
          parameter<A>(in, in.bias, channel)};
}

// Shared memory: sums of threads, of channels, and pairs of groups.
template <class A> struct Room {
  Pair<A>*scratch, *of_channel, *of_group, *correction;
  __device__ __forceinline__ Room(const Slab& s, int scratch_pairs) {
    scratch = shared<Pair<A>>();
    of_channel = scratch + scratch_pairs;
    of_group = of_channel + s.channels;
    correction = of_group + s.groups;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_relu_moments_kernel(GroupNormInput in, const __grid_constant__ Plan plan, int scratch_pairs,
                                   Pair<acc_t<T>>* partials) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const bool planar = plan.level[s.level].planar;
  const View<T> x = view_of<T>(plan.level[s.level].x, s, planar);
  const auto shift = [&](int c) { return s.count > 0 ? load(x.data + c * x.stride_channel) : A(0); };
  by_length<T>(x.vectors, [&](auto length) {
    slab_sums<false, decltype(length)::value>(
        s, planar, x, x, shift,
        [](A from, A value, A, Pair<A>& sums) {
          const A d = value - from;
          sums.first += d;
          sums.second = std::fma(d, d, sums.second);
        },
        room.scratch, room.of_channel);
  });
  // A channel's moments, then the group's: all its channels have as many values.
  const int each = static_cast<int>(in.group_channels());
  const A count = static_cast<A>(s.count > 0 ? s.count : 1);
  for (int g = static_cast<int>(threadIdx.x); g < s.groups; g += kThreads) {
    A mean = 0, squares = 0, of_means = 0;
    // Counted from the group's first value, so that a large mean is rounded once.
    const A base = shift(g * each);
    const auto mean_of = [&](int c) { return (shift(c) - base) + room.of_channel[c].first / count; };
    for (int c = g * each; c < (g + 1) * each; ++c) {
      const Pair<A> sums = room.of_channel[c];
      const A within = sums.second - sums.first * (sums.first / count);
      squares += within < A(0) ? A(0) : within;
      mean += mean_of(c) / static_cast<A>(each);
    }
    for (int c = g * each; c < (g + 1) * each; ++c) {
      const A difference = mean_of(c) - mean;
      of_means += difference * difference;
    }
    partials[(s.pair * in.groups + s.group + g) * kPieces + s.piece] = {base + mean, squares + of_means * count};
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_relu_forward_kernel(GroupNormInput in, const __grid_constant__ Plan plan, int scratch_pairs,
                                   const Pair<acc_t<T>>* partials, Pair<acc_t<T>>* statistics) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const NormLevel& level = plan.level[s.level];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int each = static_cast<int>(in.group_channels());
  const double total = static_cast<double>(level.locations * each);
  for (int g = warp; g < s.groups; g += kWarps) {
    const int64_t at = s.pair * in.groups + s.group + g;
    double count = 0, mean = 0, squares = 0;
    if (lane < plan.pieces[s.level]) {
      const int64_t left = level.locations - lane * plan.piece[s.level];
      count = static_cast<double>((left < plan.piece[s.level] ? left : plan.piece[s.level]) * each);
      mean = static_cast<double>(partials[at * kPieces + lane].first);
      squares = static_cast<double>(partials[at * kPieces + lane].second);
    }
    const double of_all = total > 0 ? warp_sum(count * mean) / total : 0;
    squares = warp_sum(squares + count * (mean - of_all) * (mean - of_all));
    if (lane != 0) continue;
    const double rstd = total > 0 ? 1 / std::sqrt(squares / total + in.eps) : 0;
    room.of_group[g] = {static_cast<A>(of_all), static_cast<A>(rstd)};
    if (s.piece == 0) statistics[at] = room.of_group[g];
  }
  __syncthreads();
  const View<T> x = view_of<T>(level.x, s, level.planar), y = view_of<T>(plan.out[s.level], s, level.planar);
  by_length<T>(x.vectors && y.vectors, [&](auto length) {
    slab_values<false, decltype(length)::value>(
        s, level.planar, x, x, y, [&](int c) { return forward_of<A>(in, room.of_group[c / each], s.channel + c); },
        [&](const Forward<A>& k, A value, A) {
          const A result = k.value(value);
          return in.relu && result < A(0) ? A(0) : result;
        });
  });
}

// `of_groups` gets Σ γ·g and Σ γ·g·x̂ of the block's groups, `of_channels` Σ g and Σ g·x̂ of its channels.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_relu_sums_kernel(GroupNormInput in, const __grid_constant__ Plan plan, int scratch_pairs,
                                const Pair<acc_t<T>>* statistics, Pair<acc_t<T>>* of_groups,
                                Pair<acc_t<T>>* of_channels) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const bool planar = plan.level[s.level].planar;
  const int each = static_cast<int>(in.group_channels());
  const Pair<A>* statistic = statistics + s.pair * in.groups + s.group;
  const View<T> x = view_of<T>(plan.level[s.level].x, s, planar), grad = view_of<T>(plan.grad[s.level], s, planar);
  by_length<T>(x.vectors && grad.vectors, [&](auto length) {
    slab_sums<true, decltype(length)::value>(
        s, planar, x, grad, [&](int c) { return forward_of<A>(in, statistic[c / each], s.channel + c); },
        [&](const Forward<A>& k, A value, A of_grad, Pair<A>& sums) {
          const A g = k.passed(value, of_grad, in.relu);
          sums.first += g;
          sums.second = std::fma(g, value - k.mean, sums.second);
        },
        room.scratch, room.of_channel);
  });
  for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += kThreads) {
    room.of_channel[c].second *= statistic[c / each].second;
    of_channels[(s.pair * in.channels + s.channel + c) * kPieces + s.piece] = room.of_channel[c];
  }
  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x); g < s.groups; g += kThreads) {
    Pair<A> sums{0, 0};
    for (int c = g * each; c < (g + 1) * each; ++c) {
      const A weight = parameter<A>(in, in.weight, s.channel + c);
      sums.first += weight * room.of_channel[c].first;
      sums.second += weight * room.of_channel[c].second;
    }
    of_groups[(s.pair * in.groups + s.group + g) * kPieces + s.piece] = sums;
  }
}

// A warp sums up a channel over all levels, images and pieces.
template <class A>
__device__ __forceinline__ void parameter_gradients(const GroupNormInput& in, const Plan& plan,
                                                    const Pair<A>* of_channels, void* grad_weight, void* grad_bias) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channel = int64_t(blockIdx.x) * kWarps + warp;
  if (channel >= in.channels) return;
  double weight = 0, bias = 0;
  for (int level = 0; level < plan.levels; ++level) {
    for (int64_t image = 0; image < in.images && lane < plan.pieces[level]; ++image) {
      const Pair<A> sums = of_channels[((level * in.images + image) * in.channels + channel) * kPieces + lane];
      bias += static_cast<double>(sums.first);
      weight += static_cast<double>(sums.second);
    }
  }
  weight = warp_sum(weight);
  bias = warp_sum(bias);
  if (lane != 0) return;
  const auto put = [&](void* to, double value) {
    if (to == nullptr) return;
    switch (in.parameter_dtype) {
      case DType::f16: store(static_cast<half_t*>(to) + channel, static_cast<float>(value)); break;
      case DType::bf16: store(static_cast<bfloat16_t*>(to) + channel, static_cast<float>(value)); break;
      case DType::f64: static_cast<double*>(to)[channel] = value; break;
      case DType::f32: static_cast<float*>(to)[channel] = static_cast<float>(value); break;
    }
  };
  put(grad_weight, weight);
  put(grad_bias, bias);
}

// The first `parameter_blocks` sum up the parameters' gradients, the others write that of x.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_relu_backward_kernel(GroupNormInput in, const __grid_constant__ Plan plan, int scratch_pairs,
                                    int64_t parameter_blocks, const Pair<acc_t<T>>* statistics,
                                    const Pair<acc_t<T>>* of_groups, const Pair<acc_t<T>>* of_channels,
                                    void* grad_weight, void* grad_bias) {
  using A = acc_t<T>;
  if (int64_t(blockIdx.x) < parameter_blocks) {
    parameter_gradients(in, plan, of_channels, grad_weight, grad_bias);
    return;
  }
  const Slab s = slab_of(in, plan, int64_t(blockIdx.x) - parameter_blocks);
  const Room<A> room(s, scratch_pairs);
  const NormLevel& level = plan.level[s.level];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int each = static_cast<int>(in.group_channels());
  const double total = static_cast<double>(level.locations * each);
  for (int g = warp; g < s.groups; g += kWarps) {
    const int64_t at = s.pair * in.groups + s.group + g;
    double grad = 0, product = 0;
    if (lane < plan.pieces[s.level]) {
      grad = static_cast<double>(of_groups[at * kPieces + lane].first);
      product = static_cast<double>(of_groups[at * kPieces + lane].second);
    }
    grad = warp_sum(grad);
    product = warp_sum(product);
    if (lane != 0) continue;
    const double rstd = static_cast<double>(statistics[at].second);
    room.of_group[g] = statistics[at];
    room.correction[g] = {static_cast<A>(rstd * grad / total), static_cast<A>(rstd * rstd * product / total)};
  }
  __syncthreads();
  const View<T> x = view_of<T>(level.x, s, level.planar), of_grad = view_of<T>(plan.grad[s.level], s, level.planar);
  const View<T> out = view_of<T>(plan.out[s.level], s, level.planar);
  by_length<T>(x.vectors && of_grad.vectors && out.vectors, [&](auto length) {
    slab_values<true, decltype(length)::value>(
        s, level.planar, x, of_grad, out,
        [&](int c) {
          const Pair<A> k = room.correction[c / each];
          return Backward<A>{forward_of<A>(in, room.of_group[c / each], s.channel + c), k.first, k.second};
        },
        [&](const Backward<A>& k, A value, A grad) {
          const A g = k.forward.passed(value, grad, in.relu);
          return std::fma(g, k.forward.scale, -std::fma(value - k.forward.mean, k.slope, k.level));
        });
  });
}

Plan plan_of(const GroupNormInput& in, const NormMap* grad, const NormMap* out) {
  Plan plan{};
  plan.levels = static_cast<int>(in.level_count);
  const int64_t each = in.group_channels();
  plan.slab_groups = static_cast<int>(each >= kSlabChannels ? 1 : kSlabChannels / each);
  if (plan.slab_groups > in.groups) plan.slab_groups = static_cast<int>(in.groups);
  plan.slabs = static_cast<int>((in.groups + plan.slab_groups - 1) / plan.slab_groups);
  for (int l = 0; l < plan.levels; ++l) {
    const int64_t locations = in.levels[l].locations;
    plan.level[l] = in.levels[l];
    if (grad != nullptr) plan.grad[l] = grad[l];
    if (out != nullptr) plan.out[l] = out[l];
    // A multiple of 8 locations, so that pieces begin where 16 bytes do. A level without locations has a piece as well:
    // it has statistics.
    const int64_t wanted = (locations + kPieces - 1) / kPieces;
    plan.piece[l] = ((wanted > kFewestLocations ? wanted : kFewestLocations) + 7) / 8 * 8;
    const int64_t pieces = (locations + plan.piece[l] - 1) / plan.piece[l];
    plan.pieces[l] = static_cast<int>(pieces > 0 ? pieces : 1);
    plan.first_block[l] = plan.blocks;
    plan.blocks += in.images * plan.slabs * plan.pieces[l];
  }
  return plan;
}

// Of a block's threads, where channels lie side by side.
int scratch_pairs(const GroupNormInput& in, const Plan& plan) {
  const int64_t run = dispatch(in.dtype, [](auto t) { return int64_t{kRun<decltype(t)>}; });
  const int64_t channels = plan.slab_groups * in.group_channels(), threads = kThreads * run;
  return static_cast<int>(channels > threads ? channels : threads);
}

template <class A> size_t shared_bytes(const GroupNormInput& in, const Plan& plan) {
  const int64_t pairs = scratch_pairs(in, plan) + plan.slab_groups * (in.group_channels() + 2);
  return static_cast<size_t>(pairs) * sizeof(Pair<A>);
}

int64_t group_pairs(const GroupNormInput& in) { return in.level_count * in.images * in.groups * kPieces; }

}  // namespace

bool group_norm_relu_fits(const GroupNormInput& in) {
  if (in.level_count > kGroupNormReluMaxLevels || in.group_channels() > kGroupNormReluMaxGroupChannels) return false;
  return plan_of(in, nullptr, nullptr).blocks + in.channels < int64_t{1} << 31;
}

size_t group_norm_relu_workspace_bytes(const GroupNormInput& in, bool backward) {
  const size_t pair = in.dtype == DType::f64 ? sizeof(Pair<double>) : sizeof(Pair<float>);
  return pair * static_cast<size_t>(group_pairs(in) * (backward ? 1 + in.group_channels() : 1));
}

cudaError_t group_norm_relu_forward(const GroupNormInput& in, void* workspace, const NormMap* y, void* statistics,
                                    cudaStream_t stream) {
  if (!group_norm_relu_fits(in)) return cudaErrorInvalidValue;
  const Plan plan = plan_of(in, nullptr, y);
  if (plan.blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(kThreads);
  const int pairs = scratch_pairs(in, plan);
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    auto* partials = static_cast<Pair<A>*>(workspace);
    const size_t smem = shared_bytes<A>(in, plan);
    GFL_LAUNCH(group_norm_relu_moments_kernel<T>, grid, block, smem, stream, in, plan, pairs, partials);
    GFL_LAUNCH(group_norm_relu_forward_kernel<T>, grid, block, smem, stream, in, plan, pairs, partials,
               static_cast<Pair<A>*>(statistics));
  });
  return cudaGetLastError();
}

cudaError_t group_norm_relu_backward(const GroupNormInput& in, const void* statistics, void* workspace,
                                     const NormMap* grad_y, const NormMap* grad_x, void* grad_weight, void* grad_bias,
                                     cudaStream_t stream) {
  if (!group_norm_relu_fits(in)) return cudaErrorInvalidValue;
  const Plan plan = plan_of(in, grad_y, grad_x);
  const bool parameters = grad_weight != nullptr || grad_bias != nullptr;
  const int64_t parameter_blocks = parameters ? (in.channels + kWarps - 1) / kWarps : 0;
  const int64_t blocks = parameter_blocks + (grad_x != nullptr ? plan.blocks : 0);
  if (blocks == 0) return cudaSuccess;
  const dim3 block(kThreads);
  const int pairs = scratch_pairs(in, plan);
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    auto* of_groups = static_cast<Pair<A>*>(workspace);
    auto* of_channels = of_groups + group_pairs(in);
    const auto* given = static_cast<const Pair<A>*>(statistics);
    const size_t smem = shared_bytes<A>(in, plan);
    if (plan.blocks > 0) {
      GFL_LAUNCH(group_norm_relu_sums_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)), block, smem, stream, in, plan,
                 pairs, given, of_groups, of_channels);
    }
    GFL_LAUNCH(group_norm_relu_backward_kernel<T>, dim3(static_cast<unsigned>(blocks)), block, smem, stream, in, plan,
               pairs, parameter_blocks, given, of_groups, of_channels, grad_weight, grad_bias);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
