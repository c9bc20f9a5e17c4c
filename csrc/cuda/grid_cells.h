// SPDX-License-Identifier: Apache-2.0
// The locations of a pyramid of grids that lie inside a box: a rectangle of each level.
#pragma once
#include <cuda_runtime.h>

#include "launch.h"
#include "terms/assign.h"

namespace gfl::cuda {

constexpr int kMaxLevels = 16;

// The levels, passed to the kernels by value.
struct GridLevels {
  GridLevel at[kMaxLevels];
  unsigned start[kMaxLevels];  // first location
  int count;
};

inline GridLevels grid_levels(const GridLevel* levels, int64_t count) {
  GridLevels result{};
  result.count = static_cast<int>(count);
  unsigned start = 0;
  for (int l = 0; l < result.count; ++l) {
    result.at[l] = levels[l];
    result.start[l] = start;
    start += static_cast<unsigned>(levels[l].height * levels[l].width);
  }
  return result;
}

// A grid of blocks: boxes of an image by images.
inline dim3 boxes_and_images(const AssignInput& in) {
  return dim3(strided_grid(in.gts, 1).x, static_cast<unsigned>(in.images < 65535 ? in.images : 65535));
}

// Cells of a level: `first` + row·pitch + column.
struct Rectangle { unsigned first, width, cells, pitch; };

// The first index from `from` on for which `passes` is as `wanted`, which it stays; the search starts near `near`.
template <class Passes> __device__ unsigned first_index(float near, unsigned cells, const Passes& passes) {
  unsigned i = near > 0.0f ? (near < static_cast<float>(cells) ? static_cast<unsigned>(near) : cells) : 0;
  while (i > 0 && passes(i - 1)) --i;
  while (i < cells && !passes(i)) ++i;
  return i;
}

__device__ inline Rectangle rectangle_inside(const GridLevels& levels, int l, const Inside& inside) {
  const GridLevel& level = levels.at[l];
  const unsigned width = static_cast<unsigned>(level.width), height = static_cast<unsigned>(level.height);
  const auto range = [&](unsigned cells, float low, float high) {
    struct { unsigned first, last; } found;
    found.first = first_index(low / level.stride - level.offset, cells,
                              [&](unsigned i) { return sub_rn(grid_centre(level, i), low) > inside.margin; });
    found.last = first_index(high / level.stride - level.offset, cells,
                             [&](unsigned i) { return !(sub_rn(high, grid_centre(level, i)) > inside.margin); });
    return found;
  };
  const auto columns = range(width, inside.x1, inside.x2), rows = range(height, inside.y1, inside.y2);
  if (columns.first >= columns.last || rows.first >= rows.last) return {0, 1, 0, 0};
  const unsigned across = columns.last - columns.first;
  return {levels.start[l] + rows.first * width + columns.first, across, across * (rows.last - rows.first), width};
}

__device__ inline int level_of(const GridLevels& levels, unsigned location) {
  int l = levels.count - 1;
  // An empty level starts where the next one does.
  while (l > 0 && location < levels.start[l]) --l;
  return l;
}

// Coordinates of a location.
struct Point { float x, y; };
__device__ inline Point point_at(const GridLevels& levels, unsigned location) {
  const int l = level_of(levels, location);
  const GridLevel& level = levels.at[l];
  const unsigned i = location - levels.start[l], width = static_cast<unsigned>(level.width), row = i / width;
  return {grid_centre(level, i - row * width), grid_centre(level, row)};
}

}  // namespace gfl::cuda
