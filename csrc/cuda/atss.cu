// SPDX-License-Identifier: Apache-2.0
// Adaptive training sample selection on the GPU: three graph nodes for a padded batch, without a [locations, gts]
// matrix.
//
//   gt_boxes [images, gts, 4] float read     gt_labels [images, gts] int64 read     valid_sizes [images, 2] float read
//   labels, matched [images, locations] int64 write                                 iou [images, locations] float write
// Priors are grids, so the k nearest cells of a box lie in a small window around its centre. A block takes a box and a
// warp one of its levels: the lanes hold the window's cells and extract the nearest k times, ties by the lower index;
// the window grows until no cell outside can be as near. Thread 0 sums the threshold in the CPU's order. A cell goes to
// the largest (IoU, ~slot) by a 64-bit maximum in the memory of `matched`, which the last kernel unpacks.
// Bytes per location: 8 cleared, 8 read and 20 written; a box adds a few hundred. Arithmetic: terms/atss.h, rounded as
// on the CPU, so results are bitwise equal. Repeatable: a maximum does not depend on the order of its arguments.
#include "gfl/head.h"

#include <cstring>

#include "terms/atss.h"
#include "launch.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kUnpackThreads = 256;
constexpr size_t kCandidateBytes = 48 * 1024;  // what a block has without cudaFuncSetAttribute
constexpr unsigned kNone = 0xffffffffu;

// The levels, passed to the kernels by value.
struct Levels {
  AtssLevel at[kAtssMaxLevels];
  int64_t start[kAtssMaxLevels];  // first location
};

// Rows or columns [first, last] of a window.
struct Range {
  int64_t first, last;
  __device__ int64_t size() const { return last - first + 1; }
  __device__ void grow(int64_t by, int64_t cells) {
    first = first - by > 0 ? first - by : 0;
    last = last + by < cells - 1 ? last + by : cells - 1;
  }
};

// The two cells of an axis between which the centre lies (one, at the ends): the nearest is among them.
__device__ Range around(const AtssLevel& level, int64_t cells, float centre) {
  const float guess = std::floor((centre - level.shift) / level.stride - level.offset);
  int64_t i = guess > 0.0f ? (guess < static_cast<float>(cells) ? static_cast<int64_t>(guess) : cells - 1) : 0;
  while (i > 0 && cell_centre(level, i) >= centre) --i;
  while (i + 1 < cells && cell_centre(level, i + 1) < centre) ++i;
  return {i, i + 1 < cells ? i + 1 : i};
}

// A lane's best cell; cells order by distance, then index.
struct Cell {
  unsigned distance;  // the bits of a float ≥ 0, which rise with it
  unsigned index;     // row-major in the whole level
};

__device__ __forceinline__ bool before(unsigned distance, unsigned index, const Cell& other) {
  return distance < other.distance || (distance == other.distance && index < other.index);
}

// The least of the warp's cells, in every lane.
__device__ __forceinline__ Cell warp_least(const Cell& mine) {
  const unsigned distance = warp_min(mine.distance);
  return {distance, warp_min(mine.distance == distance ? mine.index : kNone)};
}

// What a warp searches: the valid part of a level, for one box.
struct Search {
  const AtssLevel& level;
  const GtBox& g;
  int64_t height, width;

  __device__ float distance_x(int64_t x) const { return axis_distance(level, x, g.centre_x); }
  __device__ float distance_y(int64_t y) const { return axis_distance(level, y, g.centre_y); }

  // The least cell of the window after `last`; of all cells if `all`.
  __device__ Cell next(const Range& rows, const Range& columns, const Cell& last, bool all) const {
    const unsigned width_here = static_cast<unsigned>(columns.size());
    const unsigned cells = width_here * static_cast<unsigned>(rows.size());
    const unsigned row_step = kWarp / width_here, column_step = kWarp % width_here;
    const unsigned lane = threadIdx.x % kWarp;
    unsigned row = lane / width_here, column = lane % width_here;
    Cell least{kNone, kNone};
    for (unsigned i = lane; i < cells; i += kWarp) {
      const int64_t x = columns.first + column, y = rows.first + row;
      const float distance = add_rn(distance_x(x), distance_y(y));
      const unsigned index = static_cast<unsigned>(y * level.width + x);
      unsigned bits;
      memcpy(&bits, &distance, sizeof bits);
      if ((all || before(last.distance, last.index, {bits, index})) && before(bits, index, least))
        least = {bits, index};
      row += row_step;
      column += column_step;
      if (column >= width_here) {
        column -= width_here;
        ++row;
      }
    }
    return warp_least(least);
  }

  // Writes the indices of the k nearest cells, in order.
  __device__ void nearest(int64_t k, unsigned* indices) const {
    Range columns = around(level, width, g.centre_x), rows = around(level, height, g.centre_y);
    const float least_x = smaller(distance_x(columns.first), distance_x(columns.last));
    const float least_y = smaller(distance_y(rows.first), distance_y(rows.last));
    int64_t reach = 1;
    while (4 * reach * reach < k) ++reach;  // a square of 2·reach cells holds k, where no border cuts it
    columns.grow(reach, width);
    rows.grow(reach, height);
    for (;;) {
      const int64_t here = columns.size() * rows.size();
      const bool full = here >= k;
      Cell last{0, 0};
      for (int64_t i = 0; full && i < k; ++i) {
        last = next(rows, columns, last, i == 0);
        if (threadIdx.x % kWarp == 0) indices[i] = last.index;
      }
      // The least distance beyond each side: its nearest column with the nearest row of all, or vice versa.
      float worst;
      memcpy(&worst, &last.distance, sizeof worst);
      const auto beaten = [&](float best) { return full && best > worst; };
      const bool left = columns.first == 0 || beaten(add_rn(distance_x(columns.first - 1), least_y));
      const bool right = columns.last == width - 1 || beaten(add_rn(distance_x(columns.last + 1), least_y));
      const bool above = rows.first == 0 || beaten(add_rn(least_x, distance_y(rows.first - 1)));
      const bool below = rows.last == height - 1 || beaten(add_rn(least_x, distance_y(rows.last + 1)));
      if (left && right && above && below) return;
      if (!left || !right) columns.grow(reach, width);
      if (!above || !below) rows.grow(reach, height);
      reach *= 2;
    }
  }
};

// The valid rows and columns of a level.
struct Valid { int64_t height, width; };
__device__ __forceinline__ Valid valid_in(const AtssInput& in, const AtssLevel& level, int64_t image) {
  if (in.valid_sizes == nullptr) return {level.height, level.width};
  return {valid_cells(level.height, in.valid_sizes[2 * image], level.stride),
          valid_cells(level.width, in.valid_sizes[2 * image + 1], level.stride)};
}

__device__ __forceinline__ int64_t candidates_in(const AtssInput& in, const Valid& valid) {
  const int64_t cells = valid.height * valid.width;
  return in.topk < cells ? in.topk : cells;
}

// Grid: (boxes of an image, images). Block: a warp per level.
__global__ void atss_candidates_kernel(AtssInput in, const __grid_constant__ Levels levels, int capacity,
                                       unsigned long long* best) {
  float* overlaps = shared<float>();  // [capacity] candidates of all levels, in order
  unsigned* locations = reinterpret_cast<unsigned*>(overlaps + capacity);  // kNone where the centre is not inside
  float* threshold = reinterpret_cast<float*>(locations + capacity);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t image = blockIdx.y; image < in.images; image += gridDim.y) {
    for (int64_t slot = blockIdx.x; slot < in.gts; slot += gridDim.x) {
      const float* corners = in.gt_boxes + (image * in.gts + slot) * 4;
      if (in.gt_labels[image * in.gts + slot] < 0 || !is_finite_box(corners)) continue;  // the same in every thread
      const GtBox g = gt_box(corners, in.legacy);
      int64_t first = 0, total = 0;  // candidates of the levels before this warp's, and of all
      for (int l = 0; l < in.level_count; ++l) {
        const int64_t k = candidates_in(in, valid_in(in, levels.at[l], image));
        if (l < warp) first += k;
        total += k;
      }
      const AtssLevel& level = levels.at[warp];
      const Valid valid = valid_in(in, level, image);
      const int64_t k = candidates_in(in, valid);
      if (k > 0) {
        const Search search{level, g, valid.height, valid.width};
        search.nearest(k, locations + first);
        __syncwarp();
        for (int64_t i = first + threadIdx.x % kWarp; i < first + k; i += kWarp) {
          const unsigned index = locations[i], width = static_cast<unsigned>(level.width);
          const float cx = cell_centre(level, index % width), cy = cell_centre(level, index / width);
          overlaps[i] = prior_iou(level, cx, cy, g, in.legacy);
          locations[i] = centre_inside(cx, cy, g.box) ? static_cast<unsigned>(levels.start[warp]) + index : kNone;
        }
      }
      __syncthreads();
      if (threadIdx.x == 0) *threshold = atss_threshold(overlaps, total);
      __syncthreads();
      for (int64_t i = threadIdx.x; i < total; i += blockDim.x) {
        if (locations[i] == kNone || !(overlaps[i] >= *threshold)) continue;
        unsigned bits;
        const float overlap = overlaps[i] + 0.0f;  // never −0
        memcpy(&bits, &overlap, sizeof bits);
        atomicMax(best + image * in.locations + locations[i],
                  static_cast<unsigned long long>(bits) << 32 | (kNone - static_cast<unsigned>(slot)));
      }
      __syncthreads();
    }
  }
}

// Unpacks what won each location. `matched` holds the keys.
__global__ void __launch_bounds__(kUnpackThreads)
    atss_unpack_kernel(AtssInput in, const __grid_constant__ Levels levels, int64_t* labels, int64_t* matched,
                       float* iou) {
  const int64_t count = in.images * in.locations;
  for (int64_t i = int64_t(blockIdx.x) * kUnpackThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kUnpackThreads) {
    const unsigned long long key = static_cast<unsigned long long>(matched[i]);
    const int64_t image = i / in.locations;
    if (key != 0) {
      const int64_t slot = kNone - static_cast<unsigned>(key);
      const unsigned bits = static_cast<unsigned>(key >> 32);
      memcpy(&iou[i], &bits, sizeof bits);
      labels[i] = in.gt_labels[image * in.gts + slot];
      matched[i] = slot;
      continue;
    }
    bool outside = false;
    if (in.valid_sizes != nullptr) {
      const int64_t location = i - image * in.locations;
      int l = 0;
      while (l + 1 < in.level_count && location >= levels.start[l + 1]) ++l;
      const AtssLevel& level = levels.at[l];
      const Valid valid = valid_in(in, level, image);
      const int64_t cell = location - levels.start[l], y = cell / level.width;
      outside = y >= valid.height || cell - y * level.width >= valid.width;
    }
    labels[i] = outside ? -2 : -1;
    matched[i] = -1;
    iou[i] = 0.0f;
  }
}

// The most candidates that a box can have over all levels.
int64_t most_candidates(const AtssInput& in) {
  int64_t total = 0;
  for (int64_t l = 0; l < in.level_count; ++l) {
    const int64_t cells = in.levels[l].height * in.levels[l].width;
    total += in.topk < cells ? in.topk : cells;
  }
  return total;
}

size_t shared_bytes(int64_t capacity) {
  return static_cast<size_t>(capacity) * (sizeof(float) + sizeof(unsigned)) + sizeof(float);
}

}  // namespace

bool atss_fits(const AtssInput& in) {
  return in.level_count <= kAtssMaxLevels && in.locations < int64_t{1} << 31 && in.gts < int64_t{1} << 31 &&
         shared_bytes(most_candidates(in)) <= kCandidateBytes;
}

cudaError_t atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, cudaStream_t stream) {
  const int64_t count = in.images * in.locations;
  if (count == 0) return cudaSuccess;
  if (!atss_fits(in)) return cudaErrorInvalidValue;
  Levels levels{};
  for (int64_t l = 0, start = 0; l < in.level_count; ++l) {
    levels.at[l] = in.levels[l];
    levels.start[l] = start;
    start += in.levels[l].height * in.levels[l].width;
  }
  const cudaError_t cleared = cudaMemsetAsync(matched, 0, static_cast<size_t>(count) * sizeof(int64_t), stream);
  if (cleared != cudaSuccess) return cleared;
  const int capacity = static_cast<int>(most_candidates(in));
  if (in.gts > 0) {
    const dim3 grid(static_cast<unsigned>(in.gts), static_cast<unsigned>(in.images < 65535 ? in.images : 65535));
    GFL_LAUNCH(atss_candidates_kernel, grid, dim3(static_cast<unsigned>(in.level_count * kWarp)),
               shared_bytes(capacity), stream, in, levels, capacity, reinterpret_cast<unsigned long long*>(matched));
  }
  GFL_LAUNCH(atss_unpack_kernel, strided_grid(count, kUnpackThreads), dim3(kUnpackThreads), 0, stream, in, levels,
             labels, matched, iou);
  return cudaGetLastError();
}

}  // namespace gfl::cuda
