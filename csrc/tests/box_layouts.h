// SPDX-License-Identifier: Apache-2.0
// Layouts of boxes for the tests of suppression: plain ones, and such as a grid could get wrong.
#pragma once
#include <algorithm>
#include <limits>

#include "testing.h"

namespace gfl::testing {

constexpr int kLayouts = 12;

// How many times over the layouts are drawn: a program's argument.
inline int64_t rounds_of(int argc, char** argv) { return argc > 1 ? std::strtol(argv[1], nullptr, 10) : 1; }

// `count` boxes xyxy of a layout, for a threshold. Few of them overlap, but in crowds.
inline std::vector<double> draw_layout(int layout, int64_t count, double threshold, Generator& g) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const double extent = 30 * std::sqrt(static_cast<double>(count));
  std::vector<double> boxes;
  const auto size = [&] { return g.uniform(1, 60); };
  for (int64_t i = 0; i < count; ++i) {
    double x = g.uniform(0, extent), y = g.uniform(0, extent), w = size(), h = size();
    switch (layout) {
      case 0: break;
      case 1:  // sizes of all magnitudes, many of them where the grid takes no box
        w = std::exp2(g.uniform(-50, 50));
        h = std::exp2(g.uniform(-50, 50));
        x = g.uniform(-1, 1) * std::exp2(g.uniform(-10, 50));
        break;
      case 2:  // clusters
        x = extent * static_cast<double>(i % 40) / 40 + g.normal(6);
        y = extent * static_cast<double>(i % 7) / 7 + g.normal(6);
        w = 40 + g.normal(8);
        h = 40 + g.normal(8);
        break;
      case 3:  // whole numbers: corners and sizes on the bounds of cells and levels, sides that touch
        x = 8.0 * static_cast<double>(g.integer(0, 64));
        y = 8.0 * static_cast<double>(g.integer(0, 64));
        w = std::exp2(static_cast<double>(g.integer(2, 6)));
        h = std::exp2(static_cast<double>(g.integer(2, 6)));
        break;
      case 4:  // a few boxes many times
        x = 100.0 * static_cast<double>(i % 37);
        y = 100.0 * static_cast<double>(i % 3);
        w = h = 70;
        break;
      case 5: {  // beside another, just where their IoU is the threshold
        if (boxes.empty() || g.integer(0, 4) == 0) break;
        const size_t other = 4 * static_cast<size_t>(g.integer(0, i));
        w = boxes[other + 2] - boxes[other];
        h = boxes[other + 3] - boxes[other + 1];
        const double near = 1 + g.uniform(-1e-6, 1e-6), t = std::min(std::max(threshold, 0.0), 1.0);
        const double shift = (1 - t) / (1 + t) * near * (g.integer(0, 2) == 0 ? 1 : -1);
        const int64_t way = g.integer(0, 4);
        x = boxes[other] + (way == 0 ? shift * w : 0);
        y = boxes[other + 1] + (way == 1 ? shift * h : 0);
        if (way == 2) w *= std::max(t, 0.01) * near;
        if (way == 3) h /= std::max(t, 0.01) * near;
        break;
      }
      case 6:  // far from the origin, where corners are coarser than sizes
        x = 1e6 + 16 * g.uniform(0, 300);
        y = -1e6 - 16 * g.uniform(0, 300);
        w = g.uniform(0, 2);
        break;
      case 7:  // areas that are infinite or 0
        w = std::exp2(g.uniform(-140, 127));
        h = std::exp2(g.uniform(-140, 127));
        break;
      case 8:  // lines
        if (i % 2 == 0) w *= 30;
        else h *= 30;
        break;
      case 9:  // inverted and empty ones
        if (g.integer(0, 3) == 0) w = -w;
        if (g.integer(0, 3) == 0) h = 0;
        if (g.integer(0, 3) == 0) h = -h / 40;
        break;
      case 10:  // one place for all corners along an axis
        x = 5;
        w = size();
        break;
      default:  // everything can overlap everything
        x = g.uniform(0, 8);
        y = g.uniform(0, 8);
        w = 90 + g.uniform(0, 20);
        h = 90 + g.uniform(0, 20);
    }
    boxes.insert(boxes.end(), {x, y, x + w, y + h});
    if (g.integer(0, 60) != 0) continue;
    const double odd[] = {nan, infinity, -infinity, 1e30, -1e30, 3e38, 1e-30, -0.0};
    boxes[boxes.size() - static_cast<size_t>(g.integer(1, 5))] = odd[g.integer(0, 8)];
  }
  return boxes;
}

}  // namespace gfl::testing
