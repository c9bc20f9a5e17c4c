// SPDX-License-Identifier: Apache-2.0
// Adaptive training sample selection on the CPU, images [begin, end) of the caller's chunk.
//
//   gt_boxes [images, gts, 4] float read     gt_labels [images, gts] int64 read     valid_sizes [images, 2] float read
//   labels, matched [images, locations] int64 write                                 iou [images, locations] float write
// Priors are grids, so the k nearest cells of a box lie in a small window around its centre. The window grows until no
// cell outside it can be nearer or equally near, which also covers levels one cell wide, large k and boxes far off the
// image. Boxes are processed in slot order, and a later one must have a larger IoU to win a cell.
#include "gfl/head.h"

#include <algorithm>
#include <vector>

#include "terms/atss.h"

namespace gfl {

AtssLevel atss_level(int64_t height, int64_t width, double stride, double offset, double anchor_scale, bool legacy) {
  const double size = anchor_scale * stride, shift = legacy ? (stride - 1) / 2 : 0;
  const double half = (legacy ? size - 1 : size) / 2;
  return {height,
          width,
          static_cast<float>(stride),
          static_cast<float>(offset),
          static_cast<float>(shift),
          static_cast<float>(half)};
}

namespace cpu {
namespace {

struct Candidate {
  float distance;
  int64_t x, y;
};

// Rows or columns [first, last] of a window.
struct Range {
  int64_t first, last;
  void grow(int64_t by, int64_t cells) {
    first = std::max<int64_t>(first - by, 0);
    last = std::min(last + by, cells - 1);
  }
};

// The two cells of an axis between which the centre lies (one, at the ends): the nearest is among them.
Range around(const AtssLevel& level, int64_t cells, float centre) {
  const float guess = std::floor((centre - level.shift) / level.stride - level.offset);
  int64_t i = guess > 0.0f ? (guess < static_cast<float>(cells) ? static_cast<int64_t>(guess) : cells - 1) : 0;
  while (i > 0 && cell_centre(level, i) >= centre) --i;
  while (i + 1 < cells && cell_centre(level, i + 1) < centre) ++i;
  return {i, std::min(i + 1, cells - 1)};
}

// Fills `nearest` with the k nearest of height × width cells, by distance, ties by row-major index.
void nearest_cells(const AtssLevel& level, int64_t height, int64_t width, const GtBox& g, int64_t k,
                   std::vector<Candidate>& nearest) {
  const auto distance_x = [&](int64_t x) { return axis_distance(level, x, g.centre_x); };
  const auto distance_y = [&](int64_t y) { return axis_distance(level, y, g.centre_y); };
  Range columns = around(level, width, g.centre_x), rows = around(level, height, g.centre_y);
  const float least_x = std::min(distance_x(columns.first), distance_x(columns.last));
  const float least_y = std::min(distance_y(rows.first), distance_y(rows.last));
  int64_t reach = 1;
  while (4 * reach * reach < k) ++reach;  // a square of 2·reach cells holds k, where no border cuts it
  columns.grow(reach, width);
  rows.grow(reach, height);
  for (;;) {
    nearest.clear();
    for (int64_t y = rows.first; y <= rows.last; ++y) {
      const float dy = distance_y(y);
      for (int64_t x = columns.first; x <= columns.last; ++x) {
        const float distance = add_rn(distance_x(x), dy);
        const bool full = static_cast<int64_t>(nearest.size()) == k;
        if (full && !(distance < nearest.back().distance)) continue;
        if (full) nearest.pop_back();
        auto place = nearest.end();
        while (place != nearest.begin() && distance < (place - 1)->distance) --place;
        nearest.insert(place, Candidate{distance, x, y});
      }
    }
    // The least distance beyond each side of the window: its nearest column with the nearest row of all, or vice versa.
    const float worst = nearest.back().distance;
    const bool full = static_cast<int64_t>(nearest.size()) == k;
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

struct Valid { int64_t height, width; };

// Background inside the valid part of every level, "outside" elsewhere.
void clear_image(const AtssInput& in, const Valid* valid, int64_t* labels, int64_t* matched, float* iou) {
  std::fill(matched, matched + in.locations, int64_t{-1});
  std::fill(iou, iou + in.locations, 0.0f);
  for (int64_t l = 0; l < in.level_count; ++l) {
    const AtssLevel& level = in.levels[l];
    if (level.width == 0) continue;
    for (int64_t y = 0; y < level.height; ++y, labels += level.width) {
      const int64_t inside = y < valid[l].height ? valid[l].width : 0;
      std::fill(labels, labels + inside, int64_t{-1});
      std::fill(labels + inside, labels + level.width, int64_t{-2});
    }
  }
}

}  // namespace

void atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, int64_t begin, int64_t end) {
  std::vector<Valid> valid(in.level_count);
  std::vector<Candidate> nearest;
  std::vector<float> overlaps;
  std::vector<int64_t> locations;  // of each candidate, −1 where its centre is not inside the box
  for (int64_t image = begin; image < end; ++image) {
    int64_t* image_labels = labels + image * in.locations;
    int64_t* image_matched = matched + image * in.locations;
    float* image_iou = iou + image * in.locations;
    for (int64_t l = 0; l < in.level_count; ++l) {
      const AtssLevel& level = in.levels[l];
      valid[l] = {level.height, level.width};
      if (in.valid_sizes == nullptr) continue;
      valid[l].height = valid_cells(level.height, in.valid_sizes[2 * image], level.stride);
      valid[l].width = valid_cells(level.width, in.valid_sizes[2 * image + 1], level.stride);
    }
    clear_image(in, valid.data(), image_labels, image_matched, image_iou);

    for (int64_t slot = 0; slot < in.gts; ++slot) {
      const int64_t label = in.gt_labels[image * in.gts + slot];
      const float* corners = in.gt_boxes + (image * in.gts + slot) * 4;
      if (label < 0 || !is_finite_box(corners)) continue;
      const GtBox g = gt_box(corners, in.legacy);
      overlaps.clear();
      locations.clear();
      int64_t start = 0;
      for (int64_t l = 0; l < in.level_count; start += in.levels[l].height * in.levels[l].width, ++l) {
        const AtssLevel& level = in.levels[l];
        const int64_t k = std::min(in.topk, valid[l].height * valid[l].width);
        if (k == 0) continue;
        nearest_cells(level, valid[l].height, valid[l].width, g, k, nearest);
        for (const Candidate& c : nearest) {
          const float cx = cell_centre(level, c.x), cy = cell_centre(level, c.y);
          overlaps.push_back(prior_iou(level, cx, cy, g, in.legacy));
          locations.push_back(centre_inside(cx, cy, g.box) ? start + c.y * level.width + c.x : -1);
        }
      }
      const float threshold = atss_threshold(overlaps.data(), static_cast<int64_t>(overlaps.size()));
      for (size_t i = 0; i < overlaps.size(); ++i) {
        const int64_t location = locations[i];
        if (location < 0 || !(overlaps[i] >= threshold)) continue;
        if (image_matched[location] >= 0 && !(overlaps[i] > image_iou[location])) continue;
        image_labels[location] = label;
        image_matched[location] = slot;
        image_iou[location] = overlaps[i];
      }
    }
  }
}

}  // namespace cpu
}  // namespace gfl
