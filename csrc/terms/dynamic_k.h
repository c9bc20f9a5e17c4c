// SPDX-License-Identifier: Apache-2.0
// Arithmetic of assignment with a dynamic k, once for CPU, vector registers and CUDA: `V` is a float or a register of
// floats. Every operation is rounded by itself and in the order of the reference, because each result ranks a candidate
// or decides a conflict.
#pragma once
#include "elementary.h"
#include "task_aligned.h"

namespace gfl {
GFL_ISA_OPEN

GFL_HOST_DEVICE bool takes_probabilities(DynamicKCost cost) {
  return cost == DynamicKCost::nanodet || cost == DynamicKCost::simota;
}

// Probabilities within [0, 1]; NaN stays.
template <class V> GFL_HOST_DEVICE V prepared_score(DynamicKCost cost, const V& x) {
  if (!takes_probabilities(cost)) return x;
  const V zero = constant<V>(0.0f), one = constant<V>(1.0f);
  return x < zero ? zero : x > one ? one : x;
}

// The cost of a class that is not the box's; 0 for a logit of −∞ and a probability of 0.
template <class V> GFL_HOST_DEVICE V background_cost(DynamicKCost cost, const V& x) {
  const V zero = constant<V>(0.0f);
  if (cost == DynamicKCost::mmyolo) return zero;
  if (takes_probabilities(cost)) {
    const V loss = -logarithm_of_sum(-x, sub_rn(constant<V>(1.0f), x));
    return cost == DynamicKCost::simota ? loss : mul_rn(loss, mul_rn(x, x));
  }
  const Sigmoid<V> s(x);
  return mul_rn(add_rn(s.log, x < zero ? zero : x), mul_rn(s.p, s.p));
}

// The cost of the box's class.
GFL_HOST_DEVICE float foreground_cost(DynamicKCost cost, float x, float iou) {
  if (cost == DynamicKCost::simota) return -logarithm(x);
  float p = x, loss;
  if (cost == DynamicKCost::nanodet) {
    loss = -add_rn(mul_rn(iou, logarithm(x)), mul_rn(sub_rn(1.0f, iou), logarithm_of_sum(-x, sub_rn(1.0f, x))));
  } else {
    const Sigmoid<float> s(x);
    p = s.p;
    loss = add_rn(mul_rn(sub_rn(1.0f, iou), x), sub_rn(s.log, x > 0.0f ? 0.0f : x));
  }
  const float miss = sub_rn(iou, p);
  return mul_rn(loss, mul_rn(miss, miss));
}

template <class V> struct Location { V x, y, stride_x, stride_y; };

// Where points lie within `radius` strides of a box's centre in both directions.
GFL_HOST_DEVICE Inside near_centre(const float* b, float radius, float stride_x, float stride_y) {
  const float x = mul_rn(add_rn(b[0], b[2]), 0.5f), y = mul_rn(add_rn(b[1], b[3]), 0.5f);
  const float reach_x = mul_rn(stride_x, radius), reach_y = mul_rn(stride_y, radius);
  return {sub_rn(x, reach_x), sub_rn(y, reach_y), add_rn(x, reach_x), add_rn(y, reach_y), 0.0f};
}
GFL_HOST_DEVICE Inside inside_box(const float* b) { return {b[0], b[1], b[2], b[3], 0.0f}; }

// What a pair costs beside its class.
template <class V> struct PairCost {
  V overlap, log;  // the logarithm of the overlap, weighted
  V penalty;

  // The cost without that of the class, which is never more: rounding is monotone, and a class costs at least 0.
  GFL_HOST_DEVICE V bound() const { return add_rn(sub_rn(constant<V>(0.0f), log), penalty); }
};

template <class V>
GFL_HOST_DEVICE PairCost<V> pair_cost(const DynamicKInput& in, const RatedBox<V>& g, const RatedBox<V>& p,
                                      const Location<V>& at) {
  PairCost<V> c;
  const V zero = constant<V>(0.0f), half = constant<V>(0.5f);
  c.overlap = task_aligned_overlap(TaskAlignedOverlap::iou, g, p);
  c.log = mul_rn(logarithm(add_rn(c.overlap, constant<V>(1e-7f))), constant<V>(in.iou_weight));
  c.penalty = zero;
  if (in.cost == DynamicKCost::nanodet) return c;
  const V x = mul_rn(add_rn(g.x1, g.x2), half), y = mul_rn(add_rn(g.y1, g.y2), half);
  if (in.cost == DynamicKCost::simota) {
    const V reach_x = mul_rn(at.stride_x, constant<V>(in.center_radius));
    const V reach_y = mul_rn(at.stride_y, constant<V>(in.center_radius));
    const auto inside = (sub_rn(at.x, g.x1) > zero) & (sub_rn(g.x2, at.x) > zero) & (sub_rn(at.y, g.y1) > zero) &
                        (sub_rn(g.y2, at.y) > zero);
    const auto near = (sub_rn(at.x, sub_rn(x, reach_x)) > zero) & (sub_rn(add_rn(x, reach_x), at.x) > zero) &
                      (sub_rn(at.y, sub_rn(y, reach_y)) > zero) & (sub_rn(add_rn(y, reach_y), at.y) > zero);
    c.penalty = (inside & near) ? zero : constant<V>(1e5f);
    return c;
  }
  const V dx = sub_rn(at.x, x), dy = sub_rn(at.y, y);
  const V distance = div_rn(square_root(add_rn(mul_rn(dx, dx), mul_rn(dy, dy))), at.stride_x);
  c.penalty = power_of_ten(sub_rn(distance, constant<V>(in.center_radius)));
  return c;
}

// The cost of a pair whose prediction has the score x for the box's class and `others` as the sum of the background
// costs of all classes; infinite where it is NaN.
GFL_HOST_DEVICE float whole_cost(const DynamicKInput& in, const PairCost<float>& c, float x, float others) {
  const float own = sub_rn(foreground_cost(in.cost, x, c.overlap), background_cost(in.cost, x));
  const float found = add_rn(others, own);
  const float cost = add_rn(sub_rn(mul_rn(found < 0.0f ? 0.0f : found, in.cls_weight), c.log), c.penalty);
  return cost == cost ? cost : kInfinity;
}

// What mmyolo has a location cost that lies in no box.
constexpr float kOutsideAll = 1e8f;

// How many candidates a box selects, by the sum of its largest overlaps, at most `count`.
GFL_HOST_DEVICE int64_t selected_count(float sum, int64_t count) {
  const int64_t k = sum < 1.0f ? 1 : static_cast<int64_t>(sum);
  return k < count ? k : count;
}

GFL_ISA_CLOSE
}  // namespace gfl
