// SPDX-License-Identifier: Apache-2.0
// Sums of the head's loss over all tiles, by one block and in a fixed order.
#pragma once
#include <cstdint>

#include "gfl/head.h"
#include "launch.h"
#include "warp.h"

namespace gfl::cuda {

constexpr int kSumThreads = 512;

// What a tile adds.
struct Partial {
  double cls, box, dfl, weight;
  int64_t count;
};

struct Sums {
  double cls, box, dfl, weight;
  int64_t positives, norm;
};

// Sums all tiles; the result is thread 0's. `norm` is Σ max(positives, 1) over the images.
__device__ __forceinline__ Sums sum_partials(const Partial* partials, int64_t images, int tiles) {
  constexpr int warps = kSumThreads / kWarp;
  Sums* of_warp = shared<Sums>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Sums s{0, 0, 0, 0, 0, 0};
  for (int64_t image = warp; image < images; image += warps) {
    int64_t count = 0;
    for (int tile = lane; tile < tiles; tile += kWarp) {
      const Partial p = partials[image * tiles + tile];
      s.cls += p.cls;
      s.box += p.box;
      s.dfl += p.dfl;
      s.weight += p.weight;
      count += p.count;
    }
    count = warp_sum(count);
    s.positives += count;
    s.norm += count > 1 ? count : 1;
  }
  s.cls = warp_sum(s.cls);
  s.box = warp_sum(s.box);
  s.dfl = warp_sum(s.dfl);
  s.weight = warp_sum(s.weight);
  if (lane == 0) of_warp[warp] = s;
  __syncthreads();
  if (threadIdx.x != 0) return s;
  for (int w = 1; w < warps; ++w) {
    s.cls += of_warp[w].cls;
    s.box += of_warp[w].box;
    s.dfl += of_warp[w].dfl;
    s.weight += of_warp[w].weight;
    s.positives += of_warp[w].positives;
    s.norm += of_warp[w].norm;
  }
  return s;
}

constexpr size_t kSumShared = sizeof(Sums) * (kSumThreads / kWarp);

struct Norms { double cls, box; };

template <class A>
__device__ __forceinline__ Norms norms_of(HeadLossKind kind, const HeadLossScalars& scalars, const Sums& s) {
  const A* cls = static_cast<const A*>(scalars.cls_norm);
  const A* box = static_cast<const A*>(scalars.box_norm);
  const double weight = s.weight < 1 ? 1 : s.weight;
  const double count = kind != HeadLossKind::gfl ? weight : static_cast<double>(s.norm > 1 ? s.norm : 1);
  return {cls != nullptr ? static_cast<double>(*cls) : count, box != nullptr ? static_cast<double>(*box) : weight};
}

}  // namespace gfl::cuda
