// SPDX-License-Identifier: Apache-2.0
// Task-aligned assignment on the GPU: a few graph nodes for a padded batch, without a [gts, locations] matrix.
//
//   scores [images, locations, classes] any dtype and strides, read    boxes [images, locations, 4] float, read
//   gt_boxes [images, gts, 4] float, read                              gt_labels [images, gts] int64, read
//   labels, matched [images, locations] int64, written                 scores [images, locations] float, written
// A block takes a box: its threads go over the locations inside, each of its warps keeps the best k in shared memory,
// and the first warp puts the four lists together. Until the last kernel the memory of `labels` holds who has selected
// a location (count and sum of slots; for mmdet the best of them) and that of `matched` the largest (overlap, ~slot) of
// all boxes around it. Then a thread per location decides, one maximum per box finds what its scores are divided by,
// and a thread per location writes them.
// Bytes per candidate: 20 read and an atomic in the L2 cache; per location 16 cleared, about 40 read and 20 written.
// Arithmetic: terms/task_aligned.h, rounded as on the CPU. Repeatable: sums of integers and maxima depend on no order.
#include "gfl/assign.h"

#include <cstring>

#include "terms/task_aligned.h"
#include "grid_cells.h"
#include "launch.h"
#include "runtime_dtype.h"
#include "top_keys.h"

namespace gfl::cuda {
namespace {

static_assert(kMaxLevels == kTaskAlignedMaxLevels, "the levels of the launcher");

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLocationThreads = 256;

// What the kernels share: the memory of the results, and the largest (metric, overlap) of each box as bits.
struct Scratch {
  Key *selected, *best;  // [images, locations]; those of `labels` and `matched`
  unsigned* largest;     // [images, gts, 2]
};

struct Call {
  TaskAlignedInput in;
  Power alpha, beta;
  int topk, topk2;  // at most the locations

  __device__ const float* gt_box(int64_t image, int64_t slot) const {
    return in.gt_boxes + (image * in.gts + slot) * 4;
  }
  __device__ RatedBox<float> rated(const float* b) const { return rated_box(in.overlap, b[0], b[1], b[2], b[3]); }
  __device__ RatedBox<float> predicted(int64_t image, unsigned location) const {
    return rated(in.boxes + (image * in.locations + location) * 4);
  }
  __device__ float metric(int64_t image, unsigned location, int64_t slot, float overlap) const {
    const int64_t label = in.gt_labels[image * in.gts + slot];
    const int64_t at = image * in.score_stride[0] + location * in.score_stride[1] + label * in.score_stride[2];
    const float score = in.score_dtype == DType::f64 ? static_cast<float>(load_as<double>(in.scores, DType::f64, at))
                                                     : load_as<float>(in.scores, in.score_dtype, at);
    return task_aligned_metric(alpha, beta, probability(in, score), overlap);
  }
  __device__ Point point(const GridLevels& levels, unsigned location) const {
    if (in.points != nullptr) return {in.points[2 * int64_t(location)], in.points[2 * int64_t(location) + 1]};
    return point_at(levels, location);
  }
  __device__ bool contains(const GridLevels& levels, const Inside& inside, unsigned location) const {
    const Point p = point(levels, location);
    return inside(p.x, p.y);
  }
  // Of a positive; the one that got a conflict without any overlap may lie outside its box, and has none either.
  __device__ float overlap(const GridLevels& levels, int64_t image, unsigned location, int64_t slot) const {
    const float* box = gt_box(image, slot);
    if (in.variant == TaskAlignedVariant::ultralytics && !contains(levels, candidates_of(in, box), location)) return 0;
    return task_aligned_overlap(in.overlap, rated(box), predicted(image, location));
  }
};

// The locations that a block goes over: rectangles of the levels, or all.
struct Region {
  Rectangle* rectangles;  // null: all
  int count;
  unsigned total;

  __device__ unsigned location(unsigned i) const {
    if (rectangles == nullptr) return i;
    int l = 0;
    while (i >= rectangles[l].cells) i -= rectangles[l++].cells;
    const unsigned row = i / rectangles[l].width;
    return rectangles[l].first + row * rectangles[l].pitch + (i - row * rectangles[l].width);
  }
};

// All threads of the block call this together. `rectangles` is shared memory that nobody reads any more.
__device__ Region region_of(const Call& call, const GridLevels& levels, const Inside& inside, Rectangle* rectangles) {
  if (call.in.points != nullptr || call.in.variant == TaskAlignedVariant::mmdet) {
    return {nullptr, 0, static_cast<unsigned>(call.in.locations)};
  }
  if (threadIdx.x < static_cast<unsigned>(levels.count)) {
    rectangles[threadIdx.x] = rectangle_inside(levels, static_cast<int>(threadIdx.x), inside);
  }
  __syncthreads();
  unsigned total = 0;
  for (int l = 0; l < levels.count; ++l) total += rectangles[l].cells;
  return {rectangles, levels.count, total};
}

// Puts the lists of all warps into the first one, which its warp has.
__device__ void merge(TopKeys& top, const Key* lists) {
  for (int other = 1; other < kWarps; ++other) {
    const Key* list = lists + other * top.capacity;
    for (int e = 0; e < top.capacity && list[e] > top.least; ++e) top.insert(list[e]);
  }
}

// Enters the locations that a box has selected. Called by one warp.
__device__ void select(const Call& call, const GridLevels& levels, const Inside& inside, int64_t image, int64_t slot,
                       const TopKeys& top, Key* selected) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool mmdet = call.in.variant == TaskAlignedVariant::mmdet;
  const Key once = static_cast<Key>(1) << 32 | static_cast<unsigned>(slot);
  for (int e = lane; e < top.capacity && top.list[e] != 0; e += kWarp) {
    const unsigned location = index_of(top.list[e]);
    if (!mmdet) {
      atomicAdd(selected + location, once);
    } else if (call.contains(levels, inside, location)) {
      const float overlap = call.overlap(levels, image, location, slot);
      atomicMax(selected + location, key_of(overlap, static_cast<unsigned>(slot)));
    }
  }
  // Too few candidates have a metric: the lowest locations of metric 0 follow, of which those inside count.
  const int ranked = top.count();
  int left = call.topk - ranked;
  for (int first = 0; !mmdet && first < call.topk && left > 0; first += kWarp) {
    const int i = first + lane;
    bool zero = i < call.topk;
    for (int e = 0; e < ranked; ++e) zero = zero && index_of(top.list[e]) != static_cast<unsigned>(i);
    const unsigned zeros = __ballot_sync(kFullMask, zero);
    const bool chosen = zero && __popc(zeros & ((1u << lane) - 1)) < left;
    if (chosen && call.contains(levels, inside, static_cast<unsigned>(i))) atomicAdd(selected + i, once);
    left -= __popc(zeros);
  }
}

// Grid: (boxes of an image, images).
__global__ void __launch_bounds__(kThreads)
    task_aligned_candidates_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                                   Scratch scratch) {
  Key* lists = shared<Key>();  // [warps, topk]
  Rectangle* rectangles = reinterpret_cast<Rectangle*>(lists + kWarps * call.topk);
  const TaskAlignedInput& in = call.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool ranks_all = in.variant == TaskAlignedVariant::mmdet;
  for (int64_t image = blockIdx.y; image < in.images; image += gridDim.y) {
    Key* selected = scratch.selected + image * in.locations;
    Key* best = scratch.best + image * in.locations;
    for (int64_t slot = blockIdx.x; slot < in.gts; slot += gridDim.x) {
      if (!holds_box(in, image * in.gts + slot)) continue;  // the same in every thread
      const float* box = call.gt_box(image, slot);
      const RatedBox<float> g = call.rated(box);
      const Inside inside = candidates_of(in, box);
      __syncthreads();  // the lists and rectangles of the box before
      const Region region = region_of(call, levels, inside, rectangles);
      TopKeys top{lists + warp * call.topk, call.topk, 0};
      top.clear();
      for (unsigned first = static_cast<unsigned>(warp * kWarp); first < region.total; first += kThreads) {
        const unsigned i = first + static_cast<unsigned>(lane);
        const unsigned location = i < region.total ? region.location(i) : 0;
        Key key = 0;
        if (i < region.total && (in.points == nullptr || ranks_all || call.contains(levels, inside, location))) {
          const float overlap = task_aligned_overlap(in.overlap, g, call.predicted(image, location));
          if (overlap > 0.0f) {
            if (in.variant == TaskAlignedVariant::ultralytics) {
              atomicMax(best + location, key_of(overlap, static_cast<unsigned>(slot)));
            }
            const float metric = call.metric(image, location, slot, overlap);
            if (metric > 0.0f) key = key_of(metric, location);
          }
        }
        top.offer(key);
      }
      __syncthreads();
      if (warp == 0) {
        merge(top, lists);
        select(call, levels, inside, image, slot, top, selected);
      }
    }
  }
}

// The box that gets a location which `selected` says to be wanted.
__device__ int64_t winner(const Call& call, int64_t image, unsigned location, Key selected, Key best) {
  const TaskAlignedInput& in = call.in;
  if (in.variant == TaskAlignedVariant::mmdet) return index_of(selected);
  if (selected >> 32 == 1) return static_cast<unsigned>(selected);
  if (in.variant == TaskAlignedVariant::ultralytics && best != 0) return index_of(best);
  int64_t found = -1;
  float largest = 0;
  const RatedBox<float> p = call.predicted(image, location);
  for (int64_t slot = 0; slot < in.gts; ++slot) {
    if (!holds_box(in, image * in.gts + slot)) continue;
    if (found < 0) found = slot;
    if (in.variant == TaskAlignedVariant::ultralytics) break;
    const float overlap = task_aligned_overlap(in.overlap, call.rated(call.gt_box(image, slot)), p);
    if (overlap > largest) {
      largest = overlap;
      found = slot;
    }
  }
  return found;
}

__device__ void raise_largest(unsigned* largest, float metric, float overlap) {
  unsigned bits[2];
  memcpy(&bits[0], &metric, sizeof metric);
  memcpy(&bits[1], &overlap, sizeof overlap);
  for (int i = 0; i < 2; ++i) atomicMax(largest + i, bits[i]);
}

// Decides each location: its slot or −1 to `matched`, its metric to `scores`.
__global__ void __launch_bounds__(kLocationThreads)
    task_aligned_resolve_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                                Scratch scratch, int64_t* matched, float* scores) {
  const TaskAlignedInput& in = call.in;
  const int64_t count = in.images * in.locations;
  for (int64_t i = int64_t(blockIdx.x) * kLocationThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kLocationThreads) {
    const Key selected = scratch.selected[i], best = scratch.best[i];  // the latter is where `matched` is
    if (selected == 0) {
      matched[i] = -1;
      continue;
    }
    const int64_t image = i / in.locations;
    const unsigned location = static_cast<unsigned>(i - image * in.locations);
    const int64_t slot = winner(call, image, location, selected, best);
    const float overlap = call.overlap(levels, image, location, slot);
    const float metric = call.metric(image, location, slot, overlap);
    matched[i] = slot;
    scores[i] = metric;
    if (call.topk2 == call.topk) raise_largest(scratch.largest + 2 * (image * in.gts + slot), metric, overlap);
  }
}

// Leaves each box the best `topk2` of its locations; the others get a metric of −1. Grid: (boxes of an image, images).
__global__ void __launch_bounds__(kThreads)
    task_aligned_keep_kernel(const __grid_constant__ Call call, const __grid_constant__ GridLevels levels,
                             Scratch scratch, const int64_t* matched, float* scores) {
  Key* lists = shared<Key>();  // [warps, topk2]
  Rectangle* rectangles = reinterpret_cast<Rectangle*>(lists + kWarps * call.topk2);
  int* ranked = reinterpret_cast<int*>(rectangles + kMaxLevels);
  const TaskAlignedInput& in = call.in;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t image = blockIdx.y; image < in.images; image += gridDim.y) {
    const int64_t* image_matched = matched + image * in.locations;
    float* metrics = scores + image * in.locations;
    for (int64_t slot = blockIdx.x; slot < in.gts; slot += gridDim.x) {
      if (!holds_box(in, image * in.gts + slot)) continue;
      const Inside inside = candidates_of(in, call.gt_box(image, slot));
      __syncthreads();
      // A conflict may give a box locations anywhere; for ultralytics, outside it only among the lowest.
      Region region{nullptr, 0, static_cast<unsigned>(in.locations)};
      const bool around = in.variant == TaskAlignedVariant::ultralytics;
      if (around) region = region_of(call, levels, inside, rectangles);
      const unsigned total = region.total + (region.rectangles != nullptr ? static_cast<unsigned>(call.topk) : 0);
      const auto own = [&](unsigned i, unsigned& location) {
        if (i >= total) return false;
        location = i < region.total ? region.location(i) : i - region.total;
        if (image_matched[location] != slot) return false;
        return i < region.total || !call.contains(levels, inside, location);
      };
      TopKeys top{lists + warp * call.topk2, call.topk2, 0};
      top.clear();
      for (unsigned first = static_cast<unsigned>(warp * kWarp); first < total; first += kThreads) {
        unsigned location = 0;
        const bool mine = own(first + static_cast<unsigned>(lane), location);
        top.offer(mine && metrics[location] > 0.0f ? key_of(metrics[location], location) : 0);
      }
      __syncthreads();
      if (warp == 0) {
        merge(top, lists);
        const int count = top.count();
        if (lane == 0) *ranked = count;
      }
      __syncthreads();
      const int left = call.topk2 - *ranked;
      const Key least = left > 0 ? 1 : lists[call.topk2 - 1];
      for (unsigned i = threadIdx.x; i < total; i += kThreads) {
        unsigned location = 0;
        if (!own(i, location)) continue;
        const float metric = metrics[location];
        bool keeps = metric > 0.0f && key_of(metric, location) >= least;
        if (metric == 0.0f && left > 0) {
          int before = 0;
          for (int e = 0; e < *ranked; ++e) before += index_of(lists[e]) < location;
          keeps = static_cast<int64_t>(location) - before < left;
        }
        if (keeps) {
          const float overlap = call.overlap(levels, image, location, slot);
          raise_largest(scratch.largest + 2 * (image * in.gts + slot), metric, overlap);
        } else {
          metrics[location] = -1.0f;  // not `matched`, which other blocks read
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kLocationThreads)
    task_aligned_write_kernel(const __grid_constant__ Call call, Scratch scratch, int64_t* labels, int64_t* matched,
                              float* scores) {
  const TaskAlignedInput& in = call.in;
  const int64_t count = in.images * in.locations;
  for (int64_t i = int64_t(blockIdx.x) * kLocationThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kLocationThreads) {
    if (matched[i] < 0 || scores[i] < 0) {
      labels[i] = matched[i] = -1;
      scores[i] = 0;
      continue;
    }
    const int64_t slot = i / in.locations * in.gts + matched[i];
    float largest[2];
    memcpy(largest, scratch.largest + 2 * slot, sizeof largest);
    labels[i] = in.gt_labels[slot];
    scores[i] = normalised_metric(in, scores[i], largest[0], largest[1]);
  }
}

size_t shared_bytes(int topk) {
  return kWarps * static_cast<size_t>(topk) * sizeof(Key) + kMaxLevels * sizeof(Rectangle) + sizeof(int);
}

int at_most(int64_t k, int64_t locations) { return static_cast<int>(k < locations ? k : locations); }

}  // namespace

bool task_aligned_fits(const TaskAlignedInput& in) {
  return in.level_count <= kMaxLevels && in.locations < int64_t{1} << 31 && in.gts < int64_t{1} << 31 &&
         at_most(in.topk, in.locations) <= kTaskAlignedMaxTopk &&
         at_most(in.topk2, in.locations) <= kTaskAlignedMaxTopk;
}

size_t task_aligned_workspace_bytes(const TaskAlignedInput& in) {
  return static_cast<size_t>(in.images * in.gts) * 2 * sizeof(unsigned);
}

cudaError_t task_aligned(const TaskAlignedInput& in, const AssignOutput& out, void* workspace, cudaStream_t stream) {
  const int64_t count = in.images * in.locations;
  if (count == 0) return cudaSuccess;
  if (!task_aligned_fits(in)) return cudaErrorInvalidValue;
  const Call call{in, power_of(in.alpha), power_of(in.beta), at_most(in.topk, in.locations),
                  at_most(in.topk2, in.locations)};
  const GridLevels levels = grid_levels(in.levels, in.points == nullptr ? in.level_count : 0);
  const Scratch scratch{reinterpret_cast<Key*>(out.labels), reinterpret_cast<Key*>(out.matched),
                        static_cast<unsigned*>(workspace)};
  cudaError_t cleared = cudaMemsetAsync(out.labels, 0, static_cast<size_t>(count) * sizeof(int64_t), stream);
  if (cleared == cudaSuccess) {
    cleared = cudaMemsetAsync(out.matched, 0, static_cast<size_t>(count) * sizeof(int64_t), stream);
  }
  if (cleared == cudaSuccess && in.gts > 0) {
    cleared = cudaMemsetAsync(workspace, 0, task_aligned_workspace_bytes(in), stream);
  }
  if (cleared != cudaSuccess) return cleared;
  const dim3 boxes = boxes_and_images(in);
  const dim3 blocks = strided_grid(count, kLocationThreads);
  if (in.gts > 0) {
    GFL_LAUNCH(task_aligned_candidates_kernel, boxes, dim3(kThreads), shared_bytes(call.topk), stream, call, levels,
               scratch);
  }
  GFL_LAUNCH(task_aligned_resolve_kernel, blocks, dim3(kLocationThreads), 0, stream, call, levels, scratch, out.matched,
             out.scores);
  if (in.gts > 0 && call.topk2 != call.topk) {
    GFL_LAUNCH(task_aligned_keep_kernel, boxes, dim3(kThreads), shared_bytes(call.topk2), stream, call, levels, scratch,
               out.matched, out.scores);
  }
  GFL_LAUNCH(task_aligned_write_kernel, blocks, dim3(kLocationThreads), 0, stream, call, scratch, out.labels,
             out.matched, out.scores);
  return cudaGetLastError();
}

}  // namespace gfl::cuda
