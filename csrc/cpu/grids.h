// SPDX-License-Identifier: Apache-2.0
// The locations of an assignment as grids, in which those inside a box are a rectangle that bisection finds.
#pragma once
#include <algorithm>
#include <vector>

#include "location_rows.h"
#include "terms/assign.h"

namespace gfl::cpu {

// A grid: x [width], rising, shared by all rows, and y [height], rising.
struct Grid {
  int64_t first, width, height;
  const float *x, *y;
  float stride_x, stride_y;  // 0 for points that have none
};

// The rows and columns of a grid that lie inside; none: a height of 0.
inline LocationRows rows_inside(const Grid& grid, const Inside& inside) {
  struct Range { int64_t first, last; };
  const auto between = [&](const float* v, int64_t count, float low, float high) -> Range {
    const float* end = v + count;
    const float* from = std::partition_point(v, end, [&](float c) { return !(sub_rn(c, low) > inside.margin); });
    const float* to = std::partition_point(from, end, [&](float c) { return sub_rn(high, c) > inside.margin; });
    return {from - v, to - v};
  };
  const Range columns = between(grid.x, grid.width, inside.x1, inside.x2);
  if (columns.first >= columns.last) return {0, 0, 0, grid.width};
  const Range rows = between(grid.y, grid.height, inside.y1, inside.y2);
  return {grid.first + rows.first * grid.width + columns.first, columns.last - columns.first, rows.last - rows.first,
          grid.width};
}

// The grids of an input, in the order of the locations. Points are cut into the grids that they form, of a single
// location at worst.
struct Grids {
  std::vector<Grid> grids;

  // `columns` of a point: x, y and, if there are four, the strides.
  Grids(const AssignInput& in, int columns) {
    if (in.points == nullptr) {
      lay(in);
    } else {
      cut(in, columns);
    }
  }
  Grids(const Grids&) = delete;
  Grids& operator=(const Grids&) = delete;

 private:
  void lay(const AssignInput& in) {
    size_t count = 0;
    for (int64_t l = 0; l < in.level_count; ++l) {
      count += static_cast<size_t>(in.levels[l].width + in.levels[l].height);
    }
    coordinates_.resize(count);
    float* next = coordinates_.data();
    int64_t first = 0;
    for (int64_t l = 0; l < in.level_count; ++l) {
      const GridLevel& level = in.levels[l];
      float *x = next, *y = next + level.width;
      for (int64_t i = 0; i < level.width; ++i) x[i] = grid_centre(level, i);
      for (int64_t i = 0; i < level.height; ++i) y[i] = grid_centre(level, i);
      next = y + level.height;
      if (level.width * level.height > 0) {
        grids.push_back({first, level.width, level.height, x, y, level.stride, level.stride});
      }
      first += level.width * level.height;
    }
  }

  // Rows are runs of points of the same y and strides and rising x; rows of the same x and rising y make a grid.
  void cut(const AssignInput& in, int columns) {
    const int64_t count = in.locations;
    coordinates_.resize(static_cast<size_t>(2 * count));
    float *x = coordinates_.data(), *y = x + count;
    for (int64_t i = 0; i < count; ++i) x[i] = in.points[columns * i];
    const auto y_of = [&](int64_t i) { return in.points[columns * i + 1]; };
    const auto stride = [&](int64_t i, int axis) { return columns == 4 ? in.points[columns * i + 2 + axis] : 0.0f; };
    const auto alike = [&](int64_t i, int64_t j) {
      return stride(i, 0) == stride(j, 0) && stride(i, 1) == stride(j, 1);
    };
    for (int64_t first = 0; first < count;) {
      int64_t width = 1;
      while (first + width < count && y_of(first + width) == y_of(first) && x[first + width] > x[first + width - 1] &&
             alike(first + width, first)) {
        ++width;
      }
      int64_t height = 1;
      const float* rows = y;
      *y++ = y_of(first);
      for (int64_t next = first + width; next + width <= count; next += width, ++height) {
        bool same = y_of(next) > y_of(next - 1) && std::equal(x + first, x + first + width, x + next);
        for (int64_t i = 0; same && i < width; ++i) same = y_of(next + i) == y_of(next) && alike(next + i, first);
        if (!same) break;
        *y++ = y_of(next);
      }
      grids.push_back({first, width, height, x + first, rows, stride(first, 0), stride(first, 1)});
      first += width * height;
    }
  }

  std::vector<float> coordinates_;
};

}  // namespace gfl::cpu
