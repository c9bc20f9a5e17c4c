// SPDX-License-Identifier: Apache-2.0
// Overlaps of a box with rows of locations, a register at a time. What depends on the prediction alone is computed once
// per image. A score is read only where the overlap does not yet rule the location out: most scores are in no cache.
#include "cpu/task_aligned.h"

#include "terms/task_aligned.h"

namespace gfl::GFL_ISA {
namespace {

inline Floats power_of_each(const Power& p, Floats x) {
  if (p.whole < 0) {
    for (int j = 0; j < kWidth; ++j) x[j] = power(p, x[j]);
    return x;
  }
  return product_power(x, p.whole, p.half ? square_root(x) : splat<Floats>(1.0f));
}

inline Ints lane_numbers() {
  Ints lane;
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  return lane;
}

void insert(cpu::TaskAlignedTop& top, float metric, float overlap, int64_t location) {
  int64_t at = top.count < top.capacity ? top.count++ : top.capacity - 1;
  for (; at > 0 && top.metric[at - 1] < metric; --at) {
    top.metric[at] = top.metric[at - 1];
    top.overlap[at] = top.overlap[at - 1];
    top.location[at] = top.location[at - 1];
  }
  top.metric[at] = metric;
  top.overlap[at] = overlap;
  top.location[at] = static_cast<int32_t>(location);
}

template <class T>
void rank(const TaskAlignedInput& in, const cpu::TaskAlignedImage& image, const RatedBox<Floats>& g, int64_t label,
          int32_t slot, const cpu::LocationRows& rows, cpu::TaskAlignedTop& top) {
  const Power alpha = power_of(in.alpha), beta = power_of(in.beta);
  const T* scores = static_cast<const T*>(image.scores) + label * in.score_stride[2];
  const Ints lane = lane_numbers();
  const int64_t registers = (rows.width + kWidth - 1) / kWidth;
  for (int64_t step = 0; step < rows.height * registers; ++step) {
    const int64_t y = step / registers, x = (step - y * registers) * kWidth, i = rows.first + y * rows.pitch + x;
    const int32_t here = static_cast<int32_t>(rows.width - x < kWidth ? rows.width - x : kWidth);
    const RatedBox<Floats> p{load_floats(image.x1 + i), load_floats(image.y1 + i),   load_floats(image.x2 + i),
                             load_floats(image.y2 + i), load_floats(image.area + i), load_floats(image.angle + i)};
    const Floats every = task_aligned_overlap(in.overlap, g, p);
    const Floats overlap = lane < here ? every : splat<Floats>(0.0f);
    if (!any_of(overlap > 0.0f)) continue;
    if (image.best != nullptr) {
      const Floats best = load_floats(image.best + i);
      const Ints wins = overlap > best;
      Ints slots;
      std::memcpy(&slots, image.best_slot + i, sizeof slots);
      store_floats(wins ? overlap : best, image.best + i);
      slots = wins ? Ints{} + slot : slots;
      std::memcpy(image.best_slot + i, &slots, sizeof slots);
    }
    // A score is at most 1, so a metric is at most this.
    const Floats bound = power_of_each(beta, overlap);
    const float least = top.count == top.capacity ? top.metric[top.count - 1] : 0.0f;
    if (!any_of(bound > least)) continue;
    float bounds[kWidth], overlaps[kWidth];
    store_floats(bound, bounds);
    store_floats(overlap, overlaps);
    for (int32_t j = 0; j < here; ++j) {
      if (bounds[j] > least) __builtin_prefetch(scores + (i + j) * in.score_stride[1]);
    }
    for (int32_t j = 0; j < here; ++j) {
      const float now = top.count == top.capacity ? top.metric[top.count - 1] : 0.0f;
      if (!(bounds[j] > now)) continue;
      const float score = static_cast<float>(load(scores + (i + j) * in.score_stride[1]));
      const float metric = mul_rn(power(alpha, probability(in, score)), bounds[j]);
      if (metric > now) insert(top, metric, overlaps[j], i + j);
    }
  }
}

}  // namespace

void task_aligned_prepare(const TaskAlignedInput& in, const float* boxes, const cpu::TaskAlignedImage& image) {
  for (int64_t i = 0; i < in.locations; ++i) {
    image.x1[i] = boxes[4 * i];
    image.y1[i] = boxes[4 * i + 1];
    image.x2[i] = boxes[4 * i + 2];
    image.y2[i] = boxes[4 * i + 3];
  }
  for (int64_t i = 0; i < in.locations; i += kWidth) {
    const RatedBox<Floats> p = rated_box(in.overlap, load_floats(image.x1 + i), load_floats(image.y1 + i),
                                         load_floats(image.x2 + i), load_floats(image.y2 + i));
    store_floats(p.area, image.area + i);
    store_floats(p.angle, image.angle + i);
  }
}

void task_aligned_rank(const TaskAlignedInput& in, const cpu::TaskAlignedImage& image, const float* gt_box,
                       int64_t label, int32_t slot, const cpu::LocationRows& rows, cpu::TaskAlignedTop& top) {
  const RatedBox<Floats> g = rated_box(in.overlap, splat<Floats>(gt_box[0]), splat<Floats>(gt_box[1]),
                                       splat<Floats>(gt_box[2]), splat<Floats>(gt_box[3]));
  dispatch(in.score_dtype, [&](auto t) { rank<decltype(t)>(in, image, g, label, slot, rows, top); });
}

}  // namespace gfl::GFL_ISA
