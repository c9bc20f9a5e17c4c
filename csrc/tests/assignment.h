// SPDX-License-Identifier: Apache-2.0
// What the tests of assignments share: results to compare, drawn scenes, and inputs in the launcher's memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gfl/assign.h"
#include "testing.h"

namespace gfl::testing {

// What is assigned to each location.
struct Assigned {
  std::vector<int64_t> labels, matched;
  std::vector<float> values;  // IoUs or scores

  void add(int64_t label, int64_t slot, float value) {
    labels.push_back(label);
    matched.push_back(slot);
    values.push_back(value);
  }
  int64_t positives() const {
    return std::count_if(matched.begin(), matched.end(), [](int64_t slot) { return slot >= 0; });
  }
};

// Where a launcher writes it.
struct AssignedBuffers {
  Buffer<int64_t> labels, matched;
  Buffer<float> values;

  explicit AssignedBuffers(size_t size) : labels(size), matched(size), values(size) {}

  void check(const Assigned& want, const char* name) const {
    const std::vector<int64_t> got_labels = labels.read(), got_matched = matched.read();
    const std::vector<float> got = values.read();
    for (size_t i = 0; i < want.labels.size(); ++i) {
      CHECK(got_labels[i] == want.labels[i], "%s: label of %zu is %lld, not %lld", name, i,
            static_cast<long long>(got_labels[i]), static_cast<long long>(want.labels[i]));
      CHECK(got_matched[i] == want.matched[i], "%s: slot of %zu is %lld, not %lld", name, i,
            static_cast<long long>(got_matched[i]), static_cast<long long>(want.matched[i]));
      CHECK(got[i] == want.values[i], "%s: value of %zu is %g, not %g", name, i, got[i], want.values[i]);
    }
  }
};

// The indices of values in the order that `before` puts them in, ties by the lower one.
template <class Before> std::vector<size_t> order_of(const std::vector<float>& values, const Before& before) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return before(values[a], values[b]); });
  return order;
}

// Compares a launcher, `run`, with the definition, `by_sorting`, on scores held in T. Returns what the latter gives.
template <class T, class Input, class BySorting, class Run>
Assigned compared(Input in, const std::vector<double>& values, DType dtype, const char* name,
                  const BySorting& by_sorting, const Run& run) {
  const std::vector<T> stored = rounded<T>(values);
  std::vector<float> scores;
  for (const double v : widened(stored)) scores.push_back(static_cast<float>(v));
  in.score_dtype = dtype;
  Assigned want;
  for (int64_t image = 0; image < in.images; ++image) by_sorting(in, scores, image, want);
  AssignedBuffers got(static_cast<size_t>(in.images * in.locations));
  run(in, stored, AssignOutput{got.labels.data(), got.matched.data(), got.values.data()});
  got.check(want, name);
  return want;
}

// Ground truth in the memory of the launcher, in place of the host's.
template <class Input> class OnDevice {
 public:
  explicit OnDevice(Input& in)
      : boxes_(copied(in.gt_boxes, in.images * in.gts * 4)), labels_(copied(in.gt_labels, in.images * in.gts)) {
    in.gt_boxes = boxes_.data();
    in.gt_labels = labels_.data();
  }

 protected:
  template <class T> static std::vector<T> copied(const T* from, int64_t count) {
    return from == nullptr ? std::vector<T>() : std::vector<T>(from, from + count);
  }

 private:
  Buffer<float> boxes_;
  Buffer<int64_t> labels_;
};

// Predictions as well; `columns` of a point.
template <class Input, class T> class PredictionsOnDevice : OnDevice<Input> {
 public:
  PredictionsOnDevice(Input& in, const std::vector<T>& scores, int64_t columns)
      : OnDevice<Input>(in),
        scores_(scores),
        boxes_(this->copied(in.boxes, in.images * in.locations * 4)),
        points_(this->copied(in.points, in.locations * columns)) {
    in.scores = scores_.data();
    in.boxes = boxes_.data();
    if (in.points != nullptr) in.points = points_.data();
  }

 private:
  Buffer<T> scores_;
  Buffer<float> boxes_, points_;
};

struct Scene {
  std::vector<GridLevel> levels;
  std::vector<float> points;  // of every location: x, y and the stride twice
  std::vector<double> scores;
  std::vector<float> boxes, gt_boxes;
  std::vector<int64_t> gt_labels;

  int64_t locations() const { return static_cast<int64_t>(points.size() / 4); }

  // All but what an operator adds to its input.
  void enter(AssignInput& in, int64_t images, int64_t gts, int64_t classes) const {
    in.levels = levels.data();
    in.level_count = static_cast<int64_t>(levels.size());
    in.locations = locations();
    in.score_stride[0] = in.locations * classes;
    in.score_stride[1] = classes;
    in.score_stride[2] = 1;
    in.boxes = boxes.data();
    in.gt_boxes = gt_boxes.data();
    in.gt_labels = gt_labels.data();
    in.images = images;
    in.gts = gts;
    in.classes = classes;
  }
};

// At least four boxes, near which predictions lie but a few; `tied`: coordinates on a grid, and scores of three values.
inline Scene drawn_scene(Generator& draw, int64_t images, int64_t gts, int64_t classes, bool tied,
                         bool many_levels = false) {
  Scene s;
  s.levels = {{9, 13, 8, 0.5f}, {0, 4, 12, 0.5f}, {5, 7, 16, tied ? 0.0f : 0.5f}, {2, 3, 32, 0.5f}};
  for (int i = 0; many_levels && i < 6; ++i) {
    s.levels.push_back({3, 2 + i % 2, 24 + 8.0f * static_cast<float>(i), 0.5f});
  }
  for (const GridLevel& level : s.levels) {
    for (int64_t y = 0; y < level.height; ++y) {
      for (int64_t x = 0; x < level.width; ++x) {
        s.points.push_back((static_cast<float>(x) + level.offset) * level.stride);
        s.points.push_back((static_cast<float>(y) + level.offset) * level.stride);
        s.points.insert(s.points.end(), 2, level.stride);
      }
    }
  }
  const int64_t locations = s.locations();
  for (int64_t i = 0; i < images * gts; ++i) {
    const double x = draw.uniform(-10, 110), y = draw.uniform(-10, 80), w = std::exp(draw.uniform(0, 4.7));
    const double h = std::exp(draw.uniform(0, 4.7)), unit = tied ? 8 : 1e-4;
    for (const double v : {x - w / 2, y - h / 2, x + w / 2, y + h / 2}) {
      s.gt_boxes.push_back(static_cast<float>(std::round(v / unit) * unit));
    }
    s.gt_labels.push_back(draw.integer(-1, classes + (i % 7 == 0 ? 2 : 0)));
  }
  for (int64_t i = 0; i < images * locations; ++i) {
    const double x = s.points[4 * static_cast<size_t>(i % locations)];
    const double y = s.points[4 * static_cast<size_t>(i % locations) + 1];
    const size_t near = static_cast<size_t>(i / locations * gts + draw.integer(0, gts));
    const float* g = s.gt_boxes.data() + 4 * near;
    const bool fits = !tied && draw.integer(0, 3) > 0 && g[0] < x && x < g[2] && g[1] < y && y < g[3];
    const double wild[4] = {x - 14, y - 14, x + 14, y + 14};
    for (int c = 0; c < 4; ++c) {
      s.boxes.push_back(static_cast<float>(fits ? g[c] + draw.normal(2) : wild[c] + (tied ? 0 : draw.normal(4))));
    }
    for (int64_t c = 0; c < classes; ++c) {
      s.scores.push_back(tied ? static_cast<double>(draw.integer(0, 3)) / 2 : draw.uniform(0, 1.02));
    }
  }
  s.boxes[7] = NAN;
  s.boxes[21] = INFINITY;
  s.scores[5] = NAN;
  s.gt_boxes[9] = NAN;
  s.gt_boxes[14] = INFINITY;
  return s;
}

}  // namespace gfl::testing
