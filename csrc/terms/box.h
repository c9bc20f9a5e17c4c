// SPDX-License-Identifier: Apache-2.0
// Overlap of axis-aligned boxes xyxy: the one definition that NMS, post-processing and assignment decide by.
//
//   width  = (x2 − x1) + offset        offset = 1 for GFocal v1's inclusive pixels ("legacy"), else 0
//   area   = width · height            not clamped: an inverted box keeps what the product gives
//   inter  = max((min(x2) − max(x1)) + offset, 0) · max((min(y2) − max(y1)) + offset, 0)
//   union  = (area_a + area_b) − inter
//   IoU    = inter / union             compared `IoU > threshold`, the threshold rounded to the type of the arithmetic
//
// Every operation is rounded once, in exactly this order, in fp32 (fp64 for fp64 boxes), never contracted;
// gfl_ops/ops/boxes/box_ops.py is the same in torch, so that all backends take the same decision. IoU is symmetric in
// its arguments, bit for bit. A union of 0 with no intersection gives NaN, and so does any NaN coordinate: such a pair
// never compares greater. So two degenerate boxes do not suppress each other, as in torchvision. (A negative union,
// from inverted boxes, is divided by.)
#pragma once
#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

// Aligned for the GPU's vector loads.
template <class A> struct alignas(16) Box { A x1, y1, x2, y2; };

// A box with a NaN or an infinity can't be ranked: assignment ignores it, as padding.
GFL_HOST_DEVICE bool is_finite_box(const float* b) {
  bool finite = true;
  for (int i = 0; i < 4; ++i) finite = finite && b[i] - b[i] == 0.0f;
  return finite;
}

// Intersection and union of a pair; assignment divides by max(union, eps) where NMS divides by the union itself.
template <class A> struct Overlap { A intersection, union_area; };

template <class A> GFL_HOST_DEVICE A larger(A a, A b) { return a > b ? a : b; }
template <class A> GFL_HOST_DEVICE A smaller(A a, A b) { return a < b ? a : b; }

// What is added to a width or a height.
template <class A> GFL_HOST_DEVICE A box_offset(bool legacy) { return legacy ? A(1) : A(0); }

template <class A> GFL_HOST_DEVICE A box_area(const Box<A>& b, A offset) {
  return mul_rn(add_rn(sub_rn(b.x2, b.x1), offset), add_rn(sub_rn(b.y2, b.y1), offset));
}

// The areas are passed in: they are those of `box_area`, computed once per box.
template <class A>
GFL_HOST_DEVICE Overlap<A> box_overlap(const Box<A>& a, A area_a, const Box<A>& b, A area_b, A offset) {
  const A width = larger(add_rn(sub_rn(smaller(a.x2, b.x2), larger(a.x1, b.x1)), offset), A(0));
  const A height = larger(add_rn(sub_rn(smaller(a.y2, b.y2), larger(a.y1, b.y1)), offset), A(0));
  const A intersection = mul_rn(width, height);
  return {intersection, sub_rn(add_rn(area_a, area_b), intersection)};
}

template <class A> GFL_HOST_DEVICE A box_iou(const Box<A>& a, A area_a, const Box<A>& b, A area_b, A offset) {
  const Overlap<A> overlap = box_overlap(a, area_a, b, area_b, offset);
  return div_rn(overlap.intersection, overlap.union_area);
}

// A division-free test that every pair with IoU > threshold ≥ 0 passes, whatever its magnitudes: rounding is monotone,
// so a rounded quotient above the threshold means an exact quotient above it, hence intersection > threshold · union
// exactly, hence intersection ≥ the rounded product. What passes is decided by the division.
template <class A> GFL_HOST_DEVICE bool may_exceed(const Overlap<A>& overlap, A threshold) {
  return overlap.intersection > A(0) && overlap.intersection >= mul_rn(threshold, overlap.union_area);
}

// IoU > threshold: the same answer as the comparison itself, with a division only where it matters.
template <class A> GFL_HOST_DEVICE bool iou_exceeds(const Overlap<A>& overlap, A threshold) {
  if (threshold >= A(0) && !may_exceed(overlap, threshold)) return false;
  return div_rn(overlap.intersection, overlap.union_area) > threshold;
}

GFL_ISA_CLOSE
}  // namespace gfl
