// SPDX-License-Identifier: Apache-2.0
// One positive of the head's loss: decode, IoU, GIoU and the four distribution losses, with their derivatives.
#pragma once
#include <cstdint>

#include "bins.h"
#include "gfl/gfl_loss.h"
#include "iou.h"

namespace gfl {

// Of the union and of the enclosing box, in cells squared; what keeps a target below the last bin. As in mmdet's head.
constexpr double kHeadIouEps = 1e-6;
constexpr double kHeadTargetMargin = 0.1;

template <class A> struct HeadGeometry {
  A centre_x, centre_y;  // in cells
  A target[4];           // the box, in cells
};

template <class A>
GFL_HOST_DEVICE HeadGeometry<A> head_geometry(const GflLossInput& in, const HeadLevel& level, const HeadPositive& p) {
  const A stride = static_cast<A>(level.stride);
  const A shift = in.legacy ? static_cast<A>((level.stride - 1) / 2) : A(0);
  const A offset = static_cast<A>(level.offset);
  HeadGeometry<A> g;
  g.centre_x = ((static_cast<A>(p.column) + offset) * stride + shift) / stride;
  g.centre_y = ((static_cast<A>(p.row) + offset) * stride + shift) / stride;
  const A* box = static_cast<const A*>(in.gt_boxes) + (p.image * in.gts + p.slot) * 4;
  for (int i = 0; i < 4; ++i) g.target[i] = box[i] / stride;
  return g;
}

// Sides in order l, t, r, b: the first two lie before the centre, the others after it.
template <class A> GFL_HOST_DEVICE A head_centre(const HeadGeometry<A>& g, int side) {
  return side % 2 == 0 ? g.centre_x : g.centre_y;
}

template <class A> GFL_HOST_DEVICE TwoBins<A> head_bins(const HeadGeometry<A>& g, int side, int reg_max) {
  A y = side < 2 ? head_centre(g, side) - g.target[side] : g.target[side] - head_centre(g, side);
  const A most = static_cast<A>(reg_max - kHeadTargetMargin);
  if (y < A(0)) y = A(0);
  if (y > most) y = most;
  return bins_at_position(y, reg_max + 1, false);
}

// The loss or overlap of the decoded box, whose sides are `distance` from the centre. The +1 of widths is put on the
// far sides.
template <class A, class Kind>
GFL_HOST_DEVICE IouTerm<A> head_iou(const HeadGeometry<A>& g, const A (&distance)[4], Kind kind, bool legacy) {
  A pred[4], target[4];
  for (int side = 0; side < 4; ++side) {
    const A grown = legacy && side >= 2 ? A(1) : A(0);
    pred[side] = (side < 2 ? head_centre(g, side) - distance[side] : head_centre(g, side) + distance[side]) + grown;
    target[side] = g.target[side] + grown;
  }
  return iou_term(pred, target, kind, static_cast<A>(kHeadIouEps));
}

}  // namespace gfl
