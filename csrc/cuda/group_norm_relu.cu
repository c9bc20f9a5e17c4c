// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU on the GPU: two launches forward and two backward for any number of levels and images.
//                                                                                             (arXiv 1803.08494, eq. 1)
//   x, grad_y            maps of up to 16 levels  dtype read    y, grad_x   the same  dtype  write
//   weight, bias         [channels]               dtype or A    statistics  [levels, images, groups, 2] A write, read
//   partials             pairs of A, written by the first launch and read by the second
// A block takes a slab of whole groups, about 64 channels, and one of up to 32 pieces of a level's locations. The first
// launch sums over the block's values; the second combines the pieces of its groups, a warp per group, and computes the
// values. Backward, the first blocks of the second launch sum the gradients of weight and bias.
// Bytes per element: forward 2 reads and 1 write, backward twice 2 and 1; the second read comes from the L2 cache where
// a batch fits there. Accumulator: A within a block, about a value of the piece, double beyond. Repeatable bit for bit:
// every sum has a fixed order.
#include "gfl/head.h"

#include <cmath>

#include "group_norm_slab.h"
#include "runtime_dtype.h"

namespace gfl::cuda {
namespace {

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
  return {statistic.first, statistic.second * load_as<A>(in.weight, in.parameter_dtype, channel),
          load_as<A>(in.bias, in.parameter_dtype, channel)};
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
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_relu_moments_kernel(GroupNormInput in, const __grid_constant__ NormPlan plan, int scratch_pairs,
                                   Pair<acc_t<T>>* partials) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const SlabView<T> x = view_of<T>(plan.level[s.level].x, s);
  const auto shift = [&](int c) { return s.count > 0 ? load(x.data + c * x.stride_channel) : A(0); };
  by_length<T>(x.vectors, [&](auto length) {
    slab_sums<false, decltype(length)::value>(
        s, x, x, shift,
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
  for (int g = static_cast<int>(threadIdx.x); g < s.groups; g += kNormThreads) {
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
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_relu_forward_kernel(GroupNormInput in, const __grid_constant__ NormPlan plan, int scratch_pairs,
                                   const Pair<acc_t<T>>* partials, Pair<acc_t<T>>* statistics) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const NormLevel& level = plan.level[s.level];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int each = static_cast<int>(in.group_channels());
  const double total = static_cast<double>(level.locations * each);
  for (int g = warp; g < s.groups; g += kNormWarps) {
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
  const SlabView<T> x = view_of<T>(level.x, s), y = view_of<T>(plan.out[s.level], s);
  by_length<T>(x.vectors && y.vectors, [&](auto length) {
    slab_values<false, decltype(length)::value>(
        s, x, x, y, [&](int c) { return forward_of<A>(in, room.of_group[c / each], s.channel + c); },
        [&](const Forward<A>& k, A value, A) {
          const A result = k.value(value);
          return in.relu && result < A(0) ? A(0) : result;
        });
  });
}

// `of_groups` gets Σ γ·g and Σ γ·g·x̂ of the block's groups, `of_channels` Σ g and Σ g·x̂ of its channels.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_relu_sums_kernel(GroupNormInput in, const __grid_constant__ NormPlan plan, int scratch_pairs,
                                const Pair<acc_t<T>>* statistics, Pair<acc_t<T>>* of_groups,
                                Pair<acc_t<T>>* of_channels) {
  using A = acc_t<T>;
  const Slab s = slab_of(in, plan, blockIdx.x);
  const Room<A> room(s, scratch_pairs);
  const int each = static_cast<int>(in.group_channels());
  const Pair<A>* statistic = statistics + s.pair * in.groups + s.group;
  const SlabView<T> x = view_of<T>(plan.level[s.level].x, s), grad = view_of<T>(plan.grad[s.level], s);
  by_length<T>(x.vectors && grad.vectors, [&](auto length) {
    slab_sums<true, decltype(length)::value>(
        s, x, grad, [&](int c) { return forward_of<A>(in, statistic[c / each], s.channel + c); },
        [&](const Forward<A>& k, A value, A of_grad, Pair<A>& sums) {
          const A g = k.passed(value, of_grad, in.relu);
          sums.first += g;
          sums.second = std::fma(g, value - k.mean, sums.second);
        },
        room.scratch, room.of_channel);
  });
  for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += kNormThreads) {
    room.of_channel[c].second *= statistic[c / each].second;
    of_channels[(s.pair * in.channels + s.channel + c) * kPieces + s.piece] = room.of_channel[c];
  }
  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x); g < s.groups; g += kNormThreads) {
    Pair<A> sums{0, 0};
    for (int c = g * each; c < (g + 1) * each; ++c) {
      const A weight = load_as<A>(in.weight, in.parameter_dtype, s.channel + c);
      sums.first += weight * room.of_channel[c].first;
      sums.second += weight * room.of_channel[c].second;
    }
    of_groups[(s.pair * in.groups + s.group + g) * kPieces + s.piece] = sums;
  }
}

// A warp sums up a channel over all levels, images and pieces.
template <class A>
__device__ __forceinline__ void parameter_gradients(const GroupNormInput& in, const NormPlan& plan,
                                                    const Pair<A>* of_channels, void* grad_weight, void* grad_bias) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channel = int64_t(blockIdx.x) * kNormWarps + warp;
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
    if (to != nullptr) store_as<A>(to, in.parameter_dtype, channel, static_cast<A>(value));
  };
  put(grad_weight, weight);
  put(grad_bias, bias);
}

// The first `parameter_blocks` sum up the parameters' gradients, the others write that of x.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    group_norm_relu_backward_kernel(GroupNormInput in, const __grid_constant__ NormPlan plan, int scratch_pairs,
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
  for (int g = warp; g < s.groups; g += kNormWarps) {
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
  const SlabView<T> x = view_of<T>(level.x, s), of_grad = view_of<T>(plan.grad[s.level], s);
  const SlabView<T> out = view_of<T>(plan.out[s.level], s);
  by_length<T>(x.vectors && of_grad.vectors && out.vectors, [&](auto length) {
    slab_values<true, decltype(length)::value>(
        s, x, of_grad, out,
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

// For the threads of a block, where channels are contiguous.
int scratch_pairs(const GroupNormInput& in, const NormPlan& plan) {
  const int64_t run = dispatch(in.dtype, [](auto t) { return int64_t{kRun<decltype(t)>}; });
  const int64_t channels = plan.slab_groups * in.group_channels(), threads = kNormThreads * run;
  return static_cast<int>(channels > threads ? channels : threads);
}

template <class A> size_t shared_bytes(const GroupNormInput& in, const NormPlan& plan) {
  const int64_t pairs = scratch_pairs(in, plan) + plan.slab_groups * (in.group_channels() + 2);
  return static_cast<size_t>(pairs) * sizeof(Pair<A>);
}

int64_t group_pairs(const GroupNormInput& in) { return in.level_count * in.images * in.groups * kPieces; }

}  // namespace

bool group_norm_relu_fits(const GroupNormInput& in) {
  if (in.level_count > kGroupNormReluMaxLevels || in.group_channels() > kGroupNormReluMaxGroupChannels) return false;
  return norm_plan(in, nullptr, nullptr).blocks + in.channels < int64_t{1} << 31;
}

size_t group_norm_relu_workspace_bytes(const GroupNormInput& in, bool backward) {
  const size_t pair = in.dtype == DType::f64 ? sizeof(Pair<double>) : sizeof(Pair<float>);
  return pair * static_cast<size_t>(group_pairs(in) * (backward ? 1 + in.group_channels() : 1));
}

cudaError_t group_norm_relu_forward(const GroupNormInput& in, void* workspace, const NormMap* y, void* statistics,
                                    cudaStream_t stream) {
  if (!group_norm_relu_fits(in)) return cudaErrorInvalidValue;
  const NormPlan plan = norm_plan(in, nullptr, y);
  if (plan.blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(plan.blocks)), block(kNormThreads);
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
  const NormPlan plan = norm_plan(in, grad_y, grad_x);
  const bool parameters = grad_weight != nullptr || grad_bias != nullptr;
  const int64_t parameter_blocks = parameters ? (in.channels + kNormWarps - 1) / kNormWarps : 0;
  const int64_t blocks = parameter_blocks + (grad_x != nullptr ? plan.blocks : 0);
  if (blocks == 0) return cudaSuccess;
  const dim3 block(kNormThreads);
  const int pairs = scratch_pairs(in, plan);
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    auto* of_groups = static_cast<Pair<A>*>(workspace);
    auto* of_channels = of_groups + group_pairs(in);
    const auto* given = static_cast<const Pair<A>*>(statistics);
    const size_t smem = shared_bytes<A>(in, plan);
    if (plan.blocks > 0) {
      GFL_LAUNCH(group_norm_relu_sums_kernel<T>, dim3(static_cast<unsigned>(plan.blocks)), block, smem, stream, in,
                 plan, pairs, given, of_groups, of_channels);
    }
    GFL_LAUNCH(group_norm_relu_backward_kernel<T>, dim3(static_cast<unsigned>(blocks)), block, smem, stream, in, plan,
               pairs, parameter_blocks, given, of_groups, of_channels, grad_weight, grad_bias);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
