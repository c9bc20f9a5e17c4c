// SPDX-License-Identifier: Apache-2.0
// Arithmetic of task-aligned assignment, once for CPU, vector registers and CUDA: `V` is a float or a register of
// floats. Every operation is rounded by itself and in the order of the reference, because each result ranks a candidate
// or decides a conflict. So the arc tangent is a polynomial of ours, and powers are products where the exponent allows.
#pragma once
#include <math.h>

#include "elementary.h"

namespace gfl {
GFL_ISA_OPEN

// Within 2.8 ulp, from one division: atan |x| is 0, π/4 or π/2 plus atan t with |t| ≤ tan π/8, odd in t and a minimax
// polynomial there.
template <class V> GFL_HOST_DEVICE V arc_tangent(V x) {
  const V a = x < constant<V>(0) ? -x : x, one = constant<V>(1);
  const auto large = a > constant<V>(2.4142135f);
  const auto middle = a > constant<V>(0.41421357f);
  const V above = large ? constant<V>(-1) : middle ? sub_rn(a, one) : a;
  const V below = large ? a : middle ? add_rn(a, one) : one;
  const V t = div_rn(above, below), z = mul_rn(t, t);
  V p = add_rn(mul_rn(constant<V>(0.080598205f), z), constant<V>(-0.1387971f));
  p = add_rn(mul_rn(p, z), constant<V>(0.19977914f));
  p = add_rn(mul_rn(p, z), constant<V>(-0.33332956f));
  const V r = add_rn(mul_rn(mul_rn(t, z), p), t);
  const V angle = add_rn(large ? constant<V>(1.5707964f) : middle ? constant<V>(0.78539819f) : constant<V>(0), r);
  return x < constant<V>(0) ? -angle : angle;
}

// x^exponent where twice the exponent is an integer up to 64: the square root and products of squares.
struct Power {
  int whole;  // −1: any other exponent
  bool half;
  double exponent;
};

inline Power power_of(double exponent) {
  const double twice = 2 * exponent;
  if (!(twice >= 0 && twice <= 64) || twice != ::floor(twice)) return {-1, false, exponent};
  return {static_cast<int>(twice) / 2, static_cast<int>(twice) % 2 != 0, exponent};
}

template <class V> GFL_HOST_DEVICE V product_power(V x, int whole, V first) {
  for (V square = x; whole > 0; whole >>= 1) {
    if (whole & 1) first = mul_rn(first, square);
    square = mul_rn(square, square);
  }
  return first;
}

// Any other exponent in double, rounded to float, so that all backends get the same bits but for a few in 10^8.
GFL_HOST_DEVICE float power(const Power& p, float x) {
  if (p.whole < 0) return static_cast<float>(::pow(static_cast<double>(x), p.exponent));
  return product_power(x, p.whole, p.half ? square_root(x) : 1.0f);
}

// A box with what its overlaps need of it: the area as the kind of overlap has it and, for CIoU, the sides' angle.
template <class V> struct RatedBox { V x1, y1, x2, y2, area, angle; };

template <class V>
GFL_HOST_DEVICE RatedBox<V> rated_box(TaskAlignedOverlap kind, const V& x1, const V& y1, const V& x2, const V& y2) {
  V width = sub_rn(x2, x1), height = sub_rn(y2, y1), angle = constant<V>(0);
  if (kind == TaskAlignedOverlap::ciou) {
    height = add_rn(height, constant<V>(1e-7f));
    angle = arc_tangent(div_rn(width, height));
  } else if (kind == TaskAlignedOverlap::clipped_iou) {
    // NaN stays.
    width = width < constant<V>(0) ? constant<V>(0) : width;
    height = height < constant<V>(0) ? constant<V>(0) : height;
  }
  return {x1, y1, x2, y2, mul_rn(width, height), angle};
}

// The overlap of a ground-truth box with a predicted one; 0 where that is negative or NaN.
template <class V>
GFL_HOST_DEVICE V task_aligned_overlap(TaskAlignedOverlap kind, const RatedBox<V>& g, const RatedBox<V>& p) {
  const V zero = constant<V>(0), one = constant<V>(1), eps = constant<V>(1e-7f);
  const V width = larger(sub_rn(smaller(p.x2, g.x2), larger(p.x1, g.x1)), zero);
  const V height = larger(sub_rn(smaller(p.y2, g.y2), larger(p.y1, g.y1)), zero);
  const V inner = mul_rn(width, height);
  const V united = sub_rn(add_rn(g.area, p.area), inner);
  V overlap;
  if (kind == TaskAlignedOverlap::ciou) {
    const V iou = div_rn(inner, add_rn(united, eps));
    const V outer_x = sub_rn(larger(p.x2, g.x2), smaller(p.x1, g.x1));
    const V outer_y = sub_rn(larger(p.y2, g.y2), smaller(p.y1, g.y1));
    const V diagonal = add_rn(add_rn(mul_rn(outer_x, outer_x), mul_rn(outer_y, outer_y)), eps);
    const V shift_x = sub_rn(sub_rn(add_rn(p.x1, p.x2), g.x1), g.x2);
    const V shift_y = sub_rn(sub_rn(add_rn(p.y1, p.y2), g.y1), g.y2);
    const V distance = mul_rn(add_rn(mul_rn(shift_x, shift_x), mul_rn(shift_y, shift_y)), constant<V>(0.25f));
    const V turn = sub_rn(p.angle, g.angle);
    const V v = mul_rn(constant<V>(0.40528473f), mul_rn(turn, turn));  // 4/π²
    const V share = div_rn(v, add_rn(add_rn(sub_rn(one, iou), v), eps));
    overlap = sub_rn(iou, add_rn(div_rn(distance, diagonal), mul_rn(v, share)));
  } else if (kind == TaskAlignedOverlap::clipped_iou) {
    overlap = div_rn(inner, add_rn(united, constant<V>(1e-9f)));
  } else {
    overlap = div_rn(inner, united < constant<V>(1e-6f) ? constant<V>(1e-6f) : united);
  }
  return overlap > zero ? overlap : zero;
}

// At most 1; NaN stays.
GFL_HOST_DEVICE float probability(const TaskAlignedInput& in, float score) {
  if (!in.logits) return score > 1.0f ? 1.0f : score;
  return score == score ? Sigmoid<float>(score).p : score;
}

// What ranks a candidate: 0 where it is not positive or NaN.
GFL_HOST_DEVICE float task_aligned_metric(const Power& alpha, const Power& beta, float p, float overlap) {
  const float metric = mul_rn(power(alpha, p), power(beta, overlap));
  return metric > 0.0f ? metric : 0.0f;
}

// The score of a positive, from its metric and the largest of its box.
GFL_HOST_DEVICE float normalised_metric(const TaskAlignedInput& in, float metric, float largest, float overlap) {
  if (in.variant == TaskAlignedVariant::mmdet) return metric;
  return div_rn(mul_rn(metric, overlap), add_rn(largest, in.eps));
}

// With a least side, all coordinates go by way of centre and sides, which rounds them.
GFL_HOST_DEVICE Inside candidates_of(const TaskAlignedInput& in, const float* b) {
  const float margin = in.variant == TaskAlignedVariant::mmdet ? 0.01f : 1e-9f;
  if (!(in.min_side > 0.0f)) return {b[0], b[1], b[2], b[3], margin};
  const float x = mul_rn(add_rn(b[0], b[2]), 0.5f), y = mul_rn(add_rn(b[1], b[3]), 0.5f);
  const float width = larger(sub_rn(b[2], b[0]), in.min_side), height = larger(sub_rn(b[3], b[1]), in.min_side);
  const float half_x = mul_rn(width, 0.5f), half_y = mul_rn(height, 0.5f);
  return {sub_rn(x, half_x), sub_rn(y, half_y), add_rn(x, half_x), add_rn(y, half_y), margin};
}

GFL_ISA_CLOSE
}  // namespace gfl
