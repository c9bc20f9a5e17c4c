// SPDX-License-Identifier: Apache-2.0
// How the kernels of group normalization divide a pyramid, and their one walk over a block's values: 16 bytes per
// access along the contiguous dimension where alignment allows.
#pragma once
#include "gfl/head.h"
#include "launch.h"
#include "terms/scalar.h"
#include "vec.h"
#include "warp.h"

namespace gfl::cuda {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarp;
constexpr int kPieces = kWarp;            // of a level's locations at most: one per lane where they are combined
constexpr int64_t kFewestLocations = 64;  // of a piece
constexpr int64_t kSlabChannels = 64;

// The levels by value, and how they are divided.
struct NormPlan {
  NormLevel level[kGroupNormReluMaxLevels];
  NormMap grad[kGroupNormReluMaxLevels];  // grad_y
  NormMap out[kGroupNormReluMaxLevels];   // y or grad_x
  int64_t first_block[kGroupNormReluMaxLevels];
  int64_t piece[kGroupNormReluMaxLevels];  // locations
  int pieces[kGroupNormReluMaxLevels];
  int levels, slabs, slab_groups;
  int64_t blocks;
};

inline NormPlan norm_plan(const GroupNormInput& in, const NormMap* grad, const NormMap* out) {
  NormPlan plan{};
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
    // A multiple of 8 locations, so that pieces begin on 16 bytes. A level without locations has a piece too, for its
    // statistics.
    const int64_t wanted = (locations + kPieces - 1) / kPieces;
    plan.piece[l] = ((wanted > kFewestLocations ? wanted : kFewestLocations) + 7) / 8 * 8;
    const int64_t pieces = (locations + plan.piece[l] - 1) / plan.piece[l];
    plan.pieces[l] = static_cast<int>(pieces > 0 ? pieces : 1);
    plan.first_block[l] = plan.blocks;
    plan.blocks += in.images * plan.slabs * plan.pieces[l];
  }
  return plan;
}

template <class A> struct Pair { A first, second; };

// What a block works on: some groups of an image of a level, and one piece of the locations.
struct Slab {
  int level, piece;
  int64_t image, pair;    // level · images + image
  int group, groups;      // first, number
  int channel, channels;  // first, number
  int64_t begin, count;   // locations
  bool planar;
};

__device__ __forceinline__ Slab slab_of(const GroupNormInput& in, const NormPlan& plan, int64_t block) {
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
  s.planar = plan.level[s.level].planar;
  return s;
}

// `length` elements along locations if planar, else along channels.
template <bool kPlanar, int kLength> struct RunShape {
  static constexpr bool planar = kPlanar;
  static constexpr int length = kLength;
};

// The slab's part of a map.
template <class T> struct SlabView {
  T* data;
  int64_t stride_channel, stride_location;
  bool vectors;  // all runs of 16 bytes along the contiguous dimension are aligned

  template <class Shape> __device__ __forceinline__ T* at(Shape, int channel, int64_t location) const {
    return Shape::planar ? data + channel * stride_channel + location : data + location * stride_location + channel;
  }
};

template <class T> __device__ __forceinline__ SlabView<T> view_of(const NormMap& map, const Slab& s) {
  constexpr int run = kRun<T>;
  SlabView<T> v;
  v.data = static_cast<T*>(map.data) + s.image * map.stride_image + s.channel * map.stride_channel +
           s.begin * map.stride_location;
  v.stride_channel = map.stride_channel;
  v.stride_location = map.stride_location;
  v.vectors =
      is_aligned(v.data) && (s.planar ? s.channels == 1 || map.stride_channel % run == 0
                                      : s.channels % run == 0 && (s.count <= 1 || map.stride_location % run == 0));
  return v;
}

template <class T, int V> __device__ __forceinline__ void load_run(const T* from, T (&to)[V]) {
  if constexpr (V == 1) to[0] = *from;
  else load_vec(from, to);
}
template <class T, int V> __device__ __forceinline__ void store_run(T* to, const T (&from)[V]) {
  if constexpr (V == 1) *to = from[0];
  else store_vec(to, from);
}

// A thread's share of a slab whose channels are contiguous: every `rows`-th location of its runs of channels.
struct Share {
  int runs, width, rows, column, row;
  __device__ __forceinline__ Share(int channels, int length) {
    const int thread = static_cast<int>(threadIdx.x);
    runs = channels / length;
    width = runs < kNormThreads ? runs : kNormThreads;
    rows = kNormThreads / width;
    column = thread % width;
    row = thread / width;
  }
};

// The walk over a slab in runs of V elements. For each channel of its own a thread keeps what prepare(channel) returns;
// use(shape, kept, channel, location) takes a run from there on, whose element v belongs to kept[shape.planar ? 0 : v];
// done(shape, kept, channel, row) follows the last. In planar maps a warp takes a channel, in others a thread takes V
// channels and, of the locations, those of its row.
template <int V, int kUnroll, class Prepare, class Use, class Done>
__device__ __forceinline__ void for_runs(const Slab& s, const Prepare& prepare, const Use& use, const Done& done) {
  using Kept = decltype(prepare(0));
  if (s.planar) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t runs = s.count / V;
    for (int c = warp; c < s.channels; c += kNormWarps) {
      Kept kept[1] = {prepare(c)};
#pragma unroll kUnroll
      for (int64_t i = lane; i < runs; i += kWarp) use(RunShape<true, V>{}, kept, c, i * V);
      const int64_t rest = runs * V + lane;
      if (rest < s.count) use(RunShape<true, 1>{}, kept, c, rest);
      done(RunShape<true, V>{}, kept, c, 0);
    }
    return;
  }
  const Share mine(s.channels, V);
  if (mine.row >= mine.rows) return;
  for (int r = mine.column; r < mine.runs; r += mine.width) {
    Kept kept[V];
#pragma unroll
    for (int v = 0; v < V; ++v) kept[v] = prepare(r * V + v);
#pragma unroll kUnroll
    for (int64_t i = mine.row; i < s.count; i += mine.rows) use(RunShape<false, V>{}, kept, r * V, i);
    done(RunShape<false, V>{}, kept, r * V, mine.row);
  }
}

// Two sums over the block's values of each channel, to of_channel: add(kept, x, grad, sums) adds a value. `grad` is
// read if kGrad. `scratch`: a pair per channel and row.
template <bool kGrad, int V, class T, class Prepare, class Add>
__device__ __forceinline__ void slab_sums(const Slab& s, const SlabView<T>& x, const SlabView<T>& grad,
                                          const Prepare& prepare, const Add& add, Pair<acc_t<T>>* scratch,
                                          Pair<acc_t<T>>* of_channel) {
  using A = acc_t<T>;
  struct Kept {
    decltype(prepare(0)) prepared;
    Pair<A> sums;
  };
  for_runs<V, 4>(
      s, [&](int c) { return Kept{prepare(c), {0, 0}}; },
      [&](auto shape, Kept* kept, int channel, int64_t location) {
        using Shape = decltype(shape);
        T of_x[Shape::length], of_grad[Shape::length];
        load_run(x.at(shape, channel, location), of_x);
        if constexpr (kGrad) load_run(grad.at(shape, channel, location), of_grad);
#pragma unroll
        for (int v = 0; v < Shape::length; ++v) {
          Kept& k = kept[Shape::planar ? 0 : v];
          add(k.prepared, load(&of_x[v]), kGrad ? load(&of_grad[v]) : A(0), k.sums);
        }
      },
      [&](auto shape, Kept* kept, int channel, int row) {
        using Shape = decltype(shape);
        if constexpr (Shape::planar) {
          const Pair<A> sums{warp_sum(kept[0].sums.first), warp_sum(kept[0].sums.second)};
          if (threadIdx.x % kWarp == 0) of_channel[channel] = sums;
        } else {
#pragma unroll
          for (int v = 0; v < Shape::length; ++v) scratch[row * s.channels + channel + v] = kept[v].sums;
        }
      });
  __syncthreads();
  if (s.planar) return;
  const int rows = Share(s.channels, V).rows;
  for (int c = static_cast<int>(threadIdx.x); c < s.channels; c += kNormThreads) {
    Pair<A> sums{0, 0};
    for (int row = 0; row < rows; ++row) {
      sums.first += scratch[row * s.channels + c].first;
      sums.second += scratch[row * s.channels + c].second;
    }
    of_channel[c] = sums;
  }
  __syncthreads();
}

// out = value(what prepare returned, x, grad) for the block's values.
template <bool kGrad, int V, class T, class Prepare, class Value>
__device__ __forceinline__ void slab_values(const Slab& s, const SlabView<T>& x, const SlabView<T>& grad,
                                            const SlabView<T>& out, const Prepare& prepare, const Value& value) {
  using A = acc_t<T>;
  using Kept = decltype(prepare(0));
  for_runs<V, 2>(
      s, prepare,
      [&](auto shape, const Kept* kept, int channel, int64_t location) {
        using Shape = decltype(shape);
        T element[Shape::length], of_grad[Shape::length];
        load_run(x.at(shape, channel, location), element);
        if constexpr (kGrad) load_run(grad.at(shape, channel, location), of_grad);
#pragma unroll
        for (int v = 0; v < Shape::length; ++v) {
          const A g = kGrad ? load(&of_grad[v]) : A(0);
          store(&element[v], value(kept[Shape::planar ? 0 : v], load(&element[v]), g));
        }
        store_run(out.at(shape, channel, location), element);
      },
      [](auto, const Kept*, int, int) {});
}

// body(length) with the number of elements per access: 16 bytes if all maps allow it.
template <int V> struct AccessLength { static constexpr int value = V; };
template <class T, class Body> __device__ __forceinline__ void by_length(bool vectors, const Body& body) {
  if (vectors) body(AccessLength<kRun<T>>{});
  else body(AccessLength<1>{});
}

}  // namespace gfl::cuda
