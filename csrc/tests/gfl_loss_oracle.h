// SPDX-License-Identifier: Apache-2.0
// The losses of heads by plain loops in double, and drawn heads.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gfl/head.h"
#include "testing.h"

namespace gfl::testing::head {

struct Losses { double cls, box, dfl; };

// Everything in double, but for what a map holds.
struct Case {
  std::vector<std::pair<int64_t, int64_t>> sizes;
  int64_t images, classes, reg_max, gts;
  double beta;
  bool legacy, channels_last;
  std::vector<std::vector<double>> cls, reg;  // per level: [images, channels, height, width]
  std::vector<int64_t> labels, matched;
  std::vector<double> boxes;
  HeadLossKind kind = HeadLossKind::gfl;  // else reg_max may be 0, legacy is of no account, and
  std::vector<double> scores;             // [images, locations] are given
  int64_t locations() const {
    int64_t n = 0;
    for (const auto& [h, w] : sizes) n += h * w;
    return n;
  }
  double stride(size_t level) const { return 8.0 * static_cast<double>(int64_t{1} << level); }
  double unit(size_t level) const { return kind == HeadLossKind::rtmdet ? 1 : stride(level); }
  double offset() const { return kind == HeadLossKind::yolo ? 0.5 : 0; }
};

inline double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// `alpha`: the factor of CIoU's last term, a constant to the gradient.
struct HeadTerms { double score, box, dfl, weight, alpha = 0; };

// 1 − CIoU, by `alpha` if that is given, which is set otherwise.
inline double complete_iou(const double (&p)[4], const double (&t)[4], const double* given, double& alpha) {
  const double eps = 1e-7, w = std::max(std::min(p[2], t[2]) - std::max(p[0], t[0]), 0.0);
  const double h = std::max(std::min(p[3], t[3]) - std::max(p[1], t[1]), 0.0);
  const double ew = std::max(p[2], t[2]) - std::min(p[0], t[0]), eh = std::max(p[3], t[3]) - std::min(p[1], t[1]);
  const double iou = w * h / ((p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - w * h + eps);
  const double dx = p[0] + p[2] - t[0] - t[2], dy = p[1] + p[3] - t[1] - t[3];
  const double turn = std::atan((t[2] - t[0]) / (t[3] - t[1] + eps)) - std::atan((p[2] - p[0]) / (p[3] - p[1] + eps));
  const double v = 4 / (M_PI * M_PI) * turn * turn;
  alpha = given != nullptr ? *given : v / (1 - iou + v + eps);
  return 1 - (iou - (dx * dx + dy * dy) / 4 / (ew * ew + eh * eh + eps) - alpha * v);
}

// The four terms of a location; `box` null where it has none.
inline HeadTerms terms_at(const Case& c, size_t level, int64_t image, int64_t y, int64_t x, const double* box,
                          const double* alpha) {
  const auto [height, width] = c.sizes[level];
  const double s = c.stride(level), offset = c.legacy ? (s - 1) / 2 / s : c.offset(), cell = s / c.unit(level);
  const double centre[2] = {(static_cast<double>(x) + offset) * cell, (static_cast<double>(y) + offset) * cell};
  double pred[4], target[4], dfl = 0, largest = -INFINITY;
  const int64_t bins = c.reg_max + 1;
  for (int side = 0; side < 4; ++side) {
    target[side] = box[side] / c.unit(level);
    std::vector<double> logits;
    double total = 0, mean = 0;
    for (int64_t j = 0; j < bins; ++j) {
      const int64_t channel = image * 4 * bins + side * bins + j;
      logits.push_back(c.reg[level][static_cast<size_t>((channel * height + y) * width + x)]);
      total += std::exp(logits.back());
      mean += std::exp(logits.back()) * static_cast<double>(j);
    }
    mean = bins == 1 ? logits[0] : mean / total;
    pred[side] = centre[side % 2] + (side < 2 ? -mean : mean);
    double distance = side < 2 ? centre[side % 2] - target[side] : target[side] - centre[side % 2];
    if (c.kind == HeadLossKind::rtmdet) continue;
    if (bins == 1) {
      const auto [rows, columns] = c.sizes[0];
      dfl += std::fabs(mean - distance) * s / (static_cast<double>(side % 2 == 0 ? columns : rows) * c.stride(0));
      continue;
    }
    distance =
        std::min(std::max(distance, 0.0), static_cast<double>(c.reg_max) - (c.kind == HeadLossKind::yolo ? 0.01 : 0.1));
    const size_t left = static_cast<size_t>(distance);
    const double right_weight = distance - static_cast<double>(left);
    dfl += (std::log(total) - logits[left]) * (1 - right_weight) + (std::log(total) - logits[left + 1]) * right_weight;
  }
  if (c.kind == HeadLossKind::yolo) {
    HeadTerms terms{0, 0, dfl / 4, 0};
    terms.box = complete_iou(pred, target, alpha, terms.alpha);
    return terms;
  }
  for (int side = 2; side < 4; ++side) pred[side] += c.legacy, target[side] += c.legacy;
  const double w = std::max(std::min(pred[2], target[2]) - std::max(pred[0], target[0]), 0.0);
  const double h = std::max(std::min(pred[3], target[3]) - std::max(pred[1], target[1]), 0.0);
  const double ew = std::max(pred[2], target[2]) - std::min(pred[0], target[0]);
  const double eh = std::max(pred[3], target[3]) - std::min(pred[1], target[1]);
  const double both = (pred[2] - pred[0]) * (pred[3] - pred[1]) + (target[2] - target[0]) * (target[3] - target[1]);
  const double area = both - w * h;
  const double iou = w * h / std::max(area, 1e-6), enclosing = std::max(ew * eh, 1e-6);
  for (int64_t k = 0; k < c.classes; ++k) {
    largest = std::max(largest, c.cls[level][static_cast<size_t>(((image * c.classes + k) * height + y) * width + x)]);
  }
  return {iou, 1 - (iou - (enclosing - std::max(area, 1e-6)) / enclosing), dfl / 4, sigmoid(largest)};
}

// Sums of the three losses. `frozen` holds the IoU and w of the positives, constants to the gradient; filled if empty.
inline Losses by_loops(const Case& c, std::vector<HeadTerms>& frozen) {
  Losses sum{0, 0, 0};
  const bool fill = frozen.empty();
  size_t next = 0;
  int64_t location = 0;
  for (int64_t b = 0; b < c.images; ++b) {
    for (size_t l = 0; l < c.sizes.size(); ++l) {
      const auto [height, width] = c.sizes[l];
      for (int64_t i = 0; i < height * width; ++i, ++location) {
        const int64_t label = c.labels[static_cast<size_t>(location)], slot = c.matched[static_cast<size_t>(location)];
        const bool positive = label >= 0 && label < c.classes && slot >= 0 && slot < c.gts;
        double score = 0;
        if (positive) {
          HeadTerms t =
              terms_at(c, l, b, i / width, i % width, c.boxes.data() + static_cast<size_t>((b * c.gts + slot) * 4),
                       fill ? nullptr : &frozen[next].alpha);
          if (c.kind != HeadLossKind::gfl) t.score = t.weight = c.scores[static_cast<size_t>(location)];
          if (fill) frozen.push_back(t);
          score = frozen[next].score;
          sum.box += frozen[next].weight * t.box;
          sum.dfl += frozen[next].weight * t.dfl;
          ++next;
        }
        for (int64_t k = 0; label != -2 && k < c.classes; ++k) {
          const double x = c.cls[l][static_cast<size_t>((b * c.classes + k) * height * width + i)];
          const double t = positive && k == label ? score : 0;
          sum.cls +=
              (c.kind == HeadLossKind::yolo ? 1 : std::pow(std::fabs(t - sigmoid(x)), c.beta)) * (softplus(x) - x * t);
        }
      }
    }
  }
  return sum;
}

// ---- drawn cases ----

inline Case draw_case(Generator& draw, std::vector<std::pair<int64_t, int64_t>> sizes, int64_t classes, int64_t reg_max,
                      double beta, bool legacy, bool channels_last, int64_t images = 2, double positives = 0.15) {
  Case c{std::move(sizes), images, classes, reg_max, 3, beta, legacy, channels_last, {}, {}, {}, {}, {}};
  for (const auto& [h, w] : c.sizes) {
    for (auto [maps, channels] : {std::pair{&c.cls, classes}, std::pair{&c.reg, 4 * (reg_max + 1)}}) {
      std::vector<double> values(static_cast<size_t>(c.images * channels * h * w));
      for (double& v : values) v = draw.normal(1.5);
      maps->push_back(values);
    }
  }
  for (int64_t i = 0; i < c.images * c.locations(); ++i) {
    const double kind = draw.uniform();
    c.labels.push_back(kind < positives ? draw.integer(0, classes) : (kind > 0.9 ? -2 : (kind > 0.8 ? classes : -1)));
    c.matched.push_back(draw.integer(0, c.gts));
  }
  for (int64_t i = 0; i < c.images * c.gts; ++i) {
    const double x = draw.uniform(0, 80), y = draw.uniform(0, 80);
    for (const double v : {x, y, x + draw.uniform(4, 90), y + draw.uniform(4, 90)}) c.boxes.push_back(v);
  }
  return c;
}

// Of a head whose scores are given.
inline Case draw_scored(Generator& draw, HeadLossKind kind, std::vector<std::pair<int64_t, int64_t>> sizes,
                        int64_t classes, int64_t bins, bool channels_last, double beta = 2.0) {
  Case c = draw_case(draw, std::move(sizes), classes, bins - 1, beta, false, channels_last);
  c.kind = kind;
  for (int64_t i = 0; i < c.images * c.locations(); ++i) c.scores.push_back(draw.uniform());
  // Without bins, distances on both sides of their targets, none so close that a difference crosses it.
  if (bins == 1) {
    for (size_t l = 0; l < c.reg.size(); ++l)
      for (double& v : c.reg[l]) v = (std::fabs(v) * 3 + 0.3) * c.stride(l) / c.unit(l);
  }
  return c;
}

// A map in T, in either layout, with `gap` unused columns, and its strides.
template <class T> struct Map {
  std::vector<T> data;
  int64_t stride[4];
  Map(const std::vector<double>& values, int64_t images, int64_t channels, int64_t height, int64_t width, bool last,
      int64_t gap = 0)
      : data(static_cast<size_t>(images * channels * height * (width + gap))) {
    const int64_t pitch = width + gap;
    const int64_t first[4] = {channels * height * pitch, height * pitch, pitch, 1};
    const int64_t after[4] = {channels * height * pitch, 1, pitch * channels, channels};
    std::copy_n(last ? after : first, 4, stride);
    size_t i = 0;
    for (int64_t b = 0; b < images; ++b)
      for (int64_t k = 0; k < channels; ++k)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x, ++i) store(&data[at(b, k, y, x)], static_cast<acc_t<T>>(values[i]));
  }
  // What the map holds, which is what the oracle uses.
  std::vector<double> held(int64_t images, int64_t channels, int64_t height, int64_t width) const {
    std::vector<double> values;
    for (int64_t b = 0; b < images; ++b)
      for (int64_t k = 0; k < channels; ++k)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < width; ++x) values.push_back(static_cast<double>(load(&data[at(b, k, y, x)])));
    return values;
  }
  size_t at(int64_t b, int64_t k, int64_t y, int64_t x) const {
    return static_cast<size_t>(b * stride[0] + k * stride[1] + y * stride[2] + x * stride[3]);
  }
};

}  // namespace gfl::testing::head
