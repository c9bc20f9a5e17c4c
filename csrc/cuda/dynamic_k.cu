// SPDX-License-Identifier: Apache-2.0
// Assignment with a dynamic k on the GPU: a few graph nodes for a padded batch, without a [gts, locations] matrix.
//
//   scores [images, locations, classes] any dtype and strides, read    boxes [images, locations, 4] float, read
//   gt_boxes [images, gts, 4] float, read                              gt_labels [images, gts] int64, read
//   labels, matched [images, locations] int64, written                 scores [images, locations] float, written
// A block per box marks the locations inside it; half a warp per marked location sums the background costs of its
// classes. Then a block takes a box: its warps go over all marked locations and keep the largest overlaps and the least
// costs in shared memory, the first warp puts the lists together and enters the k locations that it selects. A thread
// per location decides and writes. Until then the memory of `labels` holds who has selected a location (count and sum
// of slots) and that of `matched` its mark and its sum.
// Bytes per pair of a box and a location: 28 read, from the L2 cache; per location 16 cleared, its classes and 16 read,
// 20 written. Arithmetic: terms/dynamic_k.h, rounded as on the CPU. Repeatable: sums of integers depend on no order,
// and the classes are summed in a fixed one.
#include "terms/dynamic_k.h"

#include "grid_cells.h"
#include "launch.h"
#include "runtime_dtype.h"
#include "terms/ranking.h"
#include "top_keys.h"

namespace gfl::cuda {
namespace {

static_assert(kMaxLevels == kDynamicKMaxLevels, "the levels of the launcher");

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLocationThreads = 256;
constexpr int kLanes = 16;  // partial sums of a row of classes

// What is known of a location.
struct alignas(8) Spot {
  float others;     // sum of the background costs of all classes
  unsigned inside;  // 1 for a candidate
};

// The memory of `labels` and `matched`, [images, locations].
struct Scratch {
  Key* selected;
  Spot* spots;
};

struct Call {
  DynamicKInput in;
  int topk;  // at most the locations

  __device__ const float* gt_box(int64_t image, int64_t slot) const {
    return in.gt_boxes + (image * in.gts + slot) * 4;
  }
  __device__ RatedBox<float> rated(const float* b) const {
    return rated_box(TaskAlignedOverlap::iou, b[0], b[1], b[2], b[3]);
  }
  __device__ RatedBox<float> predicted(int64_t image, unsigned location) const {
    return rated(in.boxes + (image * in.locations + location) * 4);
  }
  __device__ Location<float> where(const GridLevels& levels, unsigned location) const {
    if (in.points != nullptr) {
      const float* p = in.points + 4 * int64_t(location);
      return {p[0], p[1], p[2], p[3]};
    }
    const Point p = point_at(levels, location);
    const float stride = levels.at[level_of(levels, location)].stride;
    return {p.x, p.y, stride, stride};
  }
  __device__ float score(int64_t image, unsigned location, int64_t label) const {
    const int64_t at = image * in.score_stride[0] + location * in.score_stride[1] + label * in.score_stride[2];
    return prepared_score(in.cost, in.score_dtype == DType::f64
                                       ? static_cast<float>(load_as<double>(in.scores, DType::f64, at))
                                       : load_as<float>(in.scores, in.score_dtype, at));
  }
  __device__ float cost(int64_t image, unsigned location, int64_t slot, const PairCost<float>& pair,
                        float others) const {
    return whole_cost(in, pair, score(image, location, in.gt_labels[image * in.gts + slot]), others);
  }
};

// Greater for a lower cost, then for the lower location.
__device__ Key cost_key(float cost, unsigned location) { return ranking_key(rank_of(-cost), location); }

__device__ void mark(const GridLevels& levels, const Inside& inside, int l, Spot* spots) {
  const Rectangle r = rectangle_inside(levels, l, inside);
  for (unsigned i = threadIdx.x; i < r.cells; i += kThreads) {
    const unsigned row = i / r.width;
    spots[r.first + row * r.pitch + (i - row * r.width)].inside = 1;
  }
}

// Grid: (boxes of an image, images).
__global__ void __launch_bounds__(kThreads)
    dynamic_k_mark_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                          Scratch scratch) {
  const DynamicKInput& in = call.in;
  for (int64_t image = blockIdx.y; image < in.images; image += gridDim.y) {
    Spot* spots = scratch.spots + image * in.locations;
    for (int64_t slot = blockIdx.x; slot < in.gts; slot += gridDim.x) {
      if (!holds_box(in, image * in.gts + slot)) continue;
      const float* box = call.gt_box(image, slot);
      for (int l = 0; l < levels.count; ++l) {
        mark(levels, inside_box(box), l, spots);
        if (in.cost != DynamicKCost::simota) continue;
        const float stride = levels.at[l].stride;
        mark(levels, near_centre(box, in.center_radius, stride, stride), l, spots);
      }
      if (in.points == nullptr) continue;
      for (int64_t i = threadIdx.x; i < in.locations; i += kThreads) {
        const float* p = in.points + 4 * i;
        const bool inside = inside_box(box)(p[0], p[1]) || (in.cost == DynamicKCost::simota &&
                                                            near_centre(box, in.center_radius, p[2], p[3])(p[0], p[1]));
        if (inside) spots[i].inside = 1;
      }
    }
  }
}

// Half a warp per location.
__global__ void __launch_bounds__(kLocationThreads)
    dynamic_k_classes_kernel(const __grid_constant__ Call call, Scratch scratch) {
  const DynamicKInput& in = call.in;
  const int64_t count = in.images * in.locations;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  constexpr int64_t kPerBlock = kLocationThreads / kLanes;
  // The same turns for both halves of a warp.
  for (int64_t first = int64_t(blockIdx.x) * kPerBlock; first < count; first += int64_t(gridDim.x) * kPerBlock) {
    const int64_t i = first + threadIdx.x / kLanes;
    const bool wanted = i < count && scratch.spots[i].inside != 0;
    float sum = 0.0f;
    if (wanted) {
      const int64_t image = i / in.locations;
      const unsigned location = static_cast<unsigned>(i - image * in.locations);
      for (int64_t c = lane; c < in.classes; c += kLanes) {
        sum = add_rn(sum, background_cost(in.cost, call.score(image, location, c)));
      }
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum = add_rn(sum, __shfl_xor_sync(kFullMask, sum, offset));
    }
    if (wanted && lane == 0) scratch.spots[i].others = sum;
  }
}

// Puts the lists of all warps into the first one, which its warp has.
__device__ void merge(TopKeys& top, const Key* lists, int pitch) {
  for (int other = 1; other < kWarps; ++other) {
    const Key* list = lists + other * pitch;
    for (int e = 0; e < top.capacity && list[e] > top.least; ++e) top.insert(list[e]);
  }
}

// Enters the k locations of the least cost. Called by one warp.
__device__ void select(const TopKeys& overlaps, const TopKeys& costs, int64_t slot, Key* selected) {
  float sum = 0.0f;
  for (int e = 0; e < overlaps.capacity && overlaps.list[e] != 0; ++e) {
    const unsigned bits = static_cast<unsigned>(overlaps.list[e] >> 32);
    float overlap;
    memcpy(&overlap, &bits, sizeof overlap);
    sum = add_rn(sum, overlap);
  }
  const int k = static_cast<int>(selected_count(sum, costs.capacity));
  const Key once = static_cast<Key>(1) << 32 | static_cast<unsigned>(slot);
  for (int e = static_cast<int>(threadIdx.x) % kWarp; e < k && costs.list[e] != 0; e += kWarp) {
    atomicAdd(selected + index_of(costs.list[e]), once);
  }
}

// Grid: (boxes of an image, images). With minBlocksPerSM, without which ptxas spills.
__global__ void __launch_bounds__(kThreads, 8)
    dynamic_k_candidates_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                                Scratch scratch) {
  Key* lists = shared<Key>();  // [warps, 2, topk]: overlaps, costs
  const DynamicKInput& in = call.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned locations = static_cast<unsigned>(in.locations);
  const bool all = in.cost == DynamicKCost::mmyolo;
  for (int64_t image = blockIdx.y; image < in.images; image += gridDim.y) {
    const Spot* spots = scratch.spots + image * in.locations;
    for (int64_t slot = blockIdx.x; slot < in.gts; slot += gridDim.x) {
      if (!holds_box(in, image * in.gts + slot)) continue;  // the same in every thread
      const RatedBox<float> g = call.rated(call.gt_box(image, slot));
      __syncthreads();  // the lists of the box before
      TopKeys overlaps{lists + 2 * warp * call.topk, call.topk, 0};
      TopKeys costs{overlaps.list + call.topk, call.topk, 0};
      overlaps.clear();
      costs.clear();
      for (unsigned first = static_cast<unsigned>(warp * kWarp); first < locations; first += kThreads) {
        const unsigned location = first + static_cast<unsigned>(lane);
        const Spot spot = location < locations ? spots[location] : Spot{0.0f, 0};
        Key overlap = 0, cost = 0;
        if (location < locations && (all || spot.inside != 0)) {
          const PairCost<float> pair = pair_cost(in, g, call.predicted(image, location), call.where(levels, location));
          if (pair.overlap > 0.0f) overlap = key_of(pair.overlap, location);
          if (spot.inside == 0) {
            cost = cost_key(kOutsideAll, location);
          } else {
            // A NaN is not ruled out; costs are at least the bound.
            const float bound = pair.bound();
            if (bound != bound || cost_key(bound, location) > costs.least) {
              cost = cost_key(call.cost(image, location, slot, pair, spot.others), location);
            }
          }
        }
        overlaps.offer(overlap);
        costs.offer(cost);
      }
      __syncthreads();
      if (warp == 0) {
        merge(overlaps, lists, 2 * call.topk);
        merge(costs, lists + call.topk, 2 * call.topk);
        select(overlaps, costs, slot, scratch.selected + image * in.locations);
      }
    }
  }
}

// The box of the least cost at a candidate, or the first one where all cost the same.
__device__ int64_t winner(const Call& call, const GridLevels& levels, int64_t image, unsigned location,
                          const Spot& spot) {
  const DynamicKInput& in = call.in;
  const RatedBox<float> p = call.predicted(image, location);
  const Location<float> at = call.where(levels, location);
  int64_t found = -1;
  float best = kInfinity;
  for (int64_t slot = 0; slot < in.gts; ++slot) {
    if (!holds_box(in, image * in.gts + slot)) continue;
    if (found < 0) found = slot;
    if (spot.inside == 0) break;
    const PairCost<float> pair = pair_cost(in, call.rated(call.gt_box(image, slot)), p, at);
    if (pair.bound() >= best) continue;
    const float cost = call.cost(image, location, slot, pair, spot.others);
    if (cost < best) {
      best = cost;
      found = slot;
    }
  }
  return found;
}

__global__ void __launch_bounds__(kLocationThreads)
    dynamic_k_write_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                           Scratch scratch, int64_t* labels, int64_t* matched, float* scores) {
  const DynamicKInput& in = call.in;
  const int64_t count = in.images * in.locations;
  for (int64_t i = int64_t(blockIdx.x) * kLocationThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kLocationThreads) {
    const Key selected = scratch.selected[i];  // where `labels` is
    const Spot spot = scratch.spots[i];        // where `matched` is
    if (selected == 0) {
      labels[i] = matched[i] = -1;
      scores[i] = 0;
      continue;
    }
    const int64_t image = i / in.locations;
    const unsigned location = static_cast<unsigned>(i - image * in.locations);
    const int64_t slot =
        selected >> 32 == 1 ? static_cast<unsigned>(selected) : winner(call, levels, image, location, spot);
    labels[i] = in.gt_labels[image * in.gts + slot];
    matched[i] = slot;
    scores[i] = task_aligned_overlap(TaskAlignedOverlap::iou, call.rated(call.gt_box(image, slot)),
                                     call.predicted(image, location));
  }
}

}  // namespace

bool dynamic_k_fits(const DynamicKInput& in) {
  return in.level_count <= kMaxLevels && in.locations < int64_t{1} << 31 && in.gts < int64_t{1} << 31 &&
         (in.topk < in.locations ? in.topk : in.locations) <= kDynamicKMaxTopk;
}

cudaError_t dynamic_k(const DynamicKInput& in, const AssignOutput& out, cudaStream_t stream) {
  const int64_t count = in.images * in.locations;
  if (count == 0) return cudaSuccess;
  if (!dynamic_k_fits(in)) return cudaErrorInvalidValue;
  const Call call{in, static_cast<int>(in.topk < in.locations ? in.topk : in.locations)};
  const GridLevels levels = grid_levels(in.levels, in.points == nullptr ? in.level_count : 0);
  const Scratch scratch{reinterpret_cast<Key*>(out.labels), reinterpret_cast<Spot*>(out.matched)};
  cudaError_t cleared = cudaMemsetAsync(out.labels, 0, static_cast<size_t>(count) * sizeof(int64_t), stream);
  if (cleared == cudaSuccess) {
    cleared = cudaMemsetAsync(out.matched, 0, static_cast<size_t>(count) * sizeof(int64_t), stream);
  }
  if (cleared != cudaSuccess) return cleared;
  if (in.gts > 0) {
    const dim3 boxes = boxes_and_images(in);
    GFL_LAUNCH(dynamic_k_mark_kernel, boxes, dim3(kThreads), 0, stream, call, levels, scratch);
    if (in.cost != DynamicKCost::mmyolo) {
      GFL_LAUNCH(dynamic_k_classes_kernel, strided_grid(count, kLocationThreads / kLanes), dim3(kLocationThreads), 0,
                 stream, call, scratch);
    }
    GFL_LAUNCH(dynamic_k_candidates_kernel, boxes, dim3(kThreads),
               kWarps * 2 * static_cast<size_t>(call.topk) * sizeof(Key), stream, call, levels, scratch);
  }
  GFL_LAUNCH(dynamic_k_write_kernel, strided_grid(count, kLocationThreads), dim3(kLocationThreads), 0, stream, call,
             levels, scratch, out.labels, out.matched, out.scores);
  return cudaGetLastError();
}

}  // namespace gfl::cuda
