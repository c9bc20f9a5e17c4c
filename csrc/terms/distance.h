// SPDX-License-Identifier: Apache-2.0
// Between a point's distances to the four sides and the box, one coordinate at a time. Sides: 0 left, 1 top, 2 right,
// 3 bottom; the box's coordinates x₁, y₁, x₂, y₂ have the same order, and side & 1 is the axis of both.
#pragma once
#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

// A coordinate clamped to an interval, and whether it was inside, where alone it has a gradient; one on a bound is. A
// NaN stays, with its gradient. The lower bound comes first, so that an upper bound below it wins, as in torch.clamp.
template <class A> struct Clamped {
  A value;
  bool inside;
};
template <class A> GFL_HOST_DEVICE Clamped<A> clamp_passing_grad(A x, A lower, A upper) {
  Clamped<A> h{x, true};
  if (h.value < lower) h = {lower, false};
  if (h.value > upper) h = {upper, false};
  return h;
}

template <class A> GFL_HOST_DEVICE A side_sign(int side) { return side < 2 ? A(-1) : A(1); }

// A side's coordinate from the point's on the same axis.
template <class A> GFL_HOST_DEVICE A side_at(A point, A distance, int side) {
  return side < 2 ? sub_rn(point, distance) : add_rn(point, distance);
}

// The same clipped to the image; `limit` is (height, width) or null.
template <class A> GFL_HOST_DEVICE Clamped<A> clipped_side_at(A point, A distance, int side, const A* limit) {
  const A x = side_at(point, distance, side);
  if (limit == nullptr) return {x, true};
  return clamp_passing_grad(x, A(0), limit[1 - (side & 1)]);
}

template <class A> GFL_HOST_DEVICE A distance_to_side(A point, A coordinate, int side) {
  return side < 2 ? sub_rn(point, coordinate) : sub_rn(coordinate, point);
}

GFL_ISA_CLOSE
}  // namespace gfl
