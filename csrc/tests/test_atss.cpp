// SPDX-License-Identifier: Apache-2.0
// The assignment against every distance of every box to every cell, sorted.
#include "gfl/head.h"

#include "assignment.h"
#include "terms/atss.h"

namespace {

using namespace gfl;
using gfl::testing::Assigned;
using gfl::testing::Buffer;
using gfl::testing::Generator;

struct Cell {
  float distance;
  int64_t x, y, location;
};

Assigned by_sorting(const AtssInput& in) {
  Assigned r;
  for (int64_t image = 0; image < in.images; ++image) {
    const int64_t base = image * in.locations;
    std::vector<std::vector<Cell>> cells(static_cast<size_t>(in.level_count));
    int64_t location = 0;
    for (int64_t l = 0; l < in.level_count; ++l) {
      const AtssLevel& level = in.levels[l];
      for (int64_t y = 0; y < level.height; ++y) {
        for (int64_t x = 0; x < level.width; ++x, ++location) {
          const bool inside = in.valid_sizes == nullptr ||
                              (static_cast<float>(y) < std::ceil(in.valid_sizes[2 * image] / level.stride) &&
                               static_cast<float>(x) < std::ceil(in.valid_sizes[2 * image + 1] / level.stride));
          r.add(inside ? -1 : -2, -1, 0);
          if (inside) cells[static_cast<size_t>(l)].push_back({0, x, y, location});
        }
      }
    }
    for (int64_t slot = 0; slot < in.gts; ++slot) {
      const int64_t label = in.gt_labels[image * in.gts + slot];
      const float* b = in.gt_boxes + (image * in.gts + slot) * 4;
      if (label < 0 || !is_finite_box(b)) continue;
      const GtBox g = gt_box(b, in.legacy);
      std::vector<float> overlaps;
      std::vector<Cell> candidates;
      for (int64_t l = 0; l < in.level_count; ++l) {
        const AtssLevel& level = in.levels[l];
        std::vector<Cell> sorted = cells[static_cast<size_t>(l)];
        for (Cell& c : sorted) {
          const float dx = cell_centre(level, c.x) - g.centre_x, dy = cell_centre(level, c.y) - g.centre_y;
          const float dx2 = dx * dx, dy2 = dy * dy;
          c.distance = dx2 + dy2;
        }
        const auto nearer = [](const Cell& a, const Cell& c) { return a.distance < c.distance; };
        std::stable_sort(sorted.begin(), sorted.end(), nearer);
        sorted.resize(std::min(sorted.size(), static_cast<size_t>(in.topk)));
        for (const Cell& c : sorted) {
          overlaps.push_back(prior_iou(level, cell_centre(level, c.x), cell_centre(level, c.y), g, in.legacy));
          candidates.push_back(c);
          if (!centre_inside(cell_centre(level, c.x), cell_centre(level, c.y), g.box)) candidates.back().location = -1;
        }
      }
      const float threshold = atss_threshold(overlaps.data(), static_cast<int64_t>(overlaps.size()));
      for (size_t i = 0; i < candidates.size(); ++i) {
        if (candidates[i].location < 0 || !(overlaps[i] >= threshold)) continue;
        const size_t at = static_cast<size_t>(base + candidates[i].location);
        if (r.matched[at] >= 0 && !(overlaps[i] > r.values[at])) continue;
        r.labels[at] = label;
        r.matched[at] = slot;
        r.values[at] = overlaps[i];
      }
    }
  }
  return r;
}

int64_t positives = 0;

void run(AtssInput in, int64_t* labels, int64_t* matched, float* iou) {
#if defined(GFL_TEST_CUDA)
  const gfl::testing::OnDevice<AtssInput> moved(in);
  const bool whole = in.valid_sizes == nullptr;
  const Buffer<float> valid(std::vector<float>(in.valid_sizes, in.valid_sizes + (whole ? 0 : in.images * 2)));
  if (!whole) in.valid_sizes = valid.data();
  CHECK_CUDA(cuda::atss(in, labels, matched, iou, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
#else
  // Image by image, as chunks may come.
  for (int64_t b = 0; b < in.images; ++b) cpu::atss(in, labels, matched, iou, b, b + 1);
#endif
}

void compare(const AtssInput& in, const char* name) {
  gfl::testing::AssignedBuffers got(static_cast<size_t>(in.images * in.locations));
  run(in, got.labels.data(), got.matched.data(), got.values.data());
  const gfl::testing::Assigned want = by_sorting(in);
  got.check(want, name);
  positives += want.positives();
}

std::vector<AtssLevel> pyramid(const std::vector<std::pair<int64_t, int64_t>>& sizes, float offset, bool legacy) {
  std::vector<AtssLevel> levels;
  float stride = 8;
  for (const auto& [height, width] : sizes) {
    const float extra = legacy ? 1 : 0;
    levels.push_back({height, width, stride, offset, legacy ? (stride - 1) / 2 : 0, (8 * stride - extra) / 2});
    stride *= 2;
  }
  return levels;
}

}  // namespace

int main() {
  Generator draw(20);
  const std::vector<std::vector<std::pair<int64_t, int64_t>>> shapes = {{{20, 30}, {10, 15}, {5, 8}, {3, 4}, {2, 2}},
                                                                        {{1, 30}, {30, 1}},
                                                                        {{2, 30}, {7, 11}},
                                                                        {{7, 11}, {2, 30}},
                                                                        {{1, 1}},
                                                                        {{40, 40}, {0, 3}}};
  for (const auto& shape : shapes) {
    // On levels a cell or two wide the window reaches furthest, and each k has a reach of its own.
    std::vector<int64_t> topks = {1, 2, 4, 9, 25, 60};
    if (shape[0].first * shape[0].second < 100) {
      topks = {60};
      for (int64_t k = 1; k <= 25; ++k) topks.push_back(k);
    }
    for (const int64_t topk : topks) {
      for (const bool legacy : {false, true}) {
        const std::vector<AtssLevel> levels = pyramid(shape, topk == 4 ? 0.5f : 0.0f, legacy);
        const int64_t images = 2, gts = 24;
        int64_t locations = 0;
        for (const AtssLevel& level : levels) locations += level.height * level.width;
        const double extent = 8.0 * static_cast<double>(std::max(shape[0].first, shape[0].second));
        std::vector<float> boxes;
        std::vector<int64_t> labels;
        for (int64_t i = 0; i < images * gts; ++i) {
          double x = draw.uniform(-0.3 * extent, 1.3 * extent), y = draw.uniform(-0.3 * extent, 1.3 * extent);
          double w = std::exp(draw.uniform(0, 6)), h = std::exp(draw.uniform(0, 6));
          if (i % 3 == 0) x = std::round(x / 4) * 4, y = std::round(y / 4) * 4, w = std::round(w) * 2, h = w;
          if (i % 11 == 0) x *= 1e5, w = 1e7, h = 1e7;  // so far away that rounding makes whole rows equally far
          for (const double v : {x - w / 2, y - h / 2, x + w / 2, y + h / 2}) boxes.push_back(static_cast<float>(v));
          labels.push_back(draw.integer(-1, 5));
        }
        labels[0] = 3;
        const float middle = static_cast<float>(extent / 2);
        std::copy_n(std::vector<float>{-40, -40, middle + 40, middle + 40}.begin(), 4, boxes.begin());
        // At the corners of the first level, on its last cells and just outside.
        const float right = 8.0f * static_cast<float>(shape[0].second),
                    below = 8.0f * static_cast<float>(shape[0].first);
        const float corners[4][2] = {{0, 0}, {right - 8, 0}, {0, below - 8}, {right + 3, below + 3}};
        for (size_t i = 0; i < 4; ++i) {
          const float x = corners[i][0], y = corners[i][1];
          std::copy_n(std::vector<float>{x - 20, y - 20, x + 20, y + 20}.begin(), 4, boxes.begin() + 4 * (7 + i));
          labels[7 + i] = 2;
        }
        boxes[4 * 5 + 1] = NAN;
        boxes[4 * 6 + 2] = INFINITY;
        const std::vector<float> valid = {70, 70, 33, 0};
        for (const bool whole : {true, false}) {
          const AtssInput in{levels.data(), static_cast<int64_t>(levels.size()),
                             locations,     boxes.data(),
                             labels.data(), whole ? nullptr : valid.data(),
                             images,        gts,
                             topk,          legacy};
          char name[80];
          std::snprintf(name, sizeof name, "%lldx%lld topk %lld%s%s", static_cast<long long>(shape[0].first),
                        static_cast<long long>(shape[0].second), static_cast<long long>(topk), legacy ? " legacy" : "",
                        whole ? "" : " valid");
          compare(in, name);
        }
      }
    }
  }
  // No object, one, a thousand in one place.
  for (const int64_t gts : {0, 1, 1000}) {
    const std::vector<AtssLevel> levels = pyramid({{12, 17}, {6, 9}, {3, 5}}, 0, false);
    std::vector<float> boxes;
    for (int64_t i = 0; i < 2 * gts; ++i) {
      // Multiples of 8: many are equal, and so are many overlaps.
      const float x = 8.0f * static_cast<float>(draw.integer(0, 12)), y = 8.0f * static_cast<float>(draw.integer(0, 9));
      const float w = 8.0f * static_cast<float>(draw.integer(1, 9)), h = 8.0f * static_cast<float>(draw.integer(1, 9));
      for (const float v : {x, y, x + w, y + h}) boxes.push_back(v);
    }
    const std::vector<int64_t> labels(static_cast<size_t>(2 * gts), 1);
    compare({levels.data(), 3, 12 * 17 + 6 * 9 + 3 * 5, boxes.data(), labels.data(), nullptr, 2, gts, 9, false},
            "crowd");
  }
  CHECK(positives > 1000, "only %lld positives in all", static_cast<long long>(positives));
  return gfl::testing::result("atss");
}
