// SPDX-License-Identifier: Apache-2.0
// One positive of the head's loss: decode, IoU, GIoU and the four distribution losses, with their derivatives.
#pragma once
#include <cstdint>

#include "bins.h"
#include "distance.h"
#include "gfl/head.h"
#include "grid.h"
#include "iou.h"

namespace gfl {

// Of the union and of the enclosing box, in cells squared; and what keeps a target below the last bin. As in mmdet's
// head.
constexpr double kHeadIouEps = 1e-6;
constexpr double kHeadTargetMargin = 0.1;

constexpr int64_t kHeadNotCounted = -2;  // the label of locations that no loss looks at

// A location with a class and a box.
struct HeadPositive {
  int64_t image, level, row, column;
  int64_t location;  // its index in `labels`
  int64_t label, slot;
};

GFL_HOST_DEVICE bool is_positive(const GflLossInput& in, int64_t label, int64_t slot) {
  return label >= 0 && label < in.classes && slot >= 0 && slot < in.gts;
}

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
  g.centre_x = cell_centre(static_cast<A>(p.column), offset, stride, shift) / stride;
  g.centre_y = cell_centre(static_cast<A>(p.row), offset, stride, shift) / stride;
  const A* box = static_cast<const A*>(in.gt_boxes) + (p.image * in.gts + p.slot) * 4;
  for (int i = 0; i < 4; ++i) g.target[i] = box[i] / stride;
  return g;
}

template <class A> GFL_HOST_DEVICE A head_centre(const HeadGeometry<A>& g, int side) {
  return side % 2 == 0 ? g.centre_x : g.centre_y;
}

// The two bins of a side's target.
template <class A> GFL_HOST_DEVICE TwoBins<A> head_bins(A centre, A target, int side, int reg_max) {
  const A distance = distance_to_side(centre, target, side);
  const A most = static_cast<A>(reg_max - kHeadTargetMargin);
  return bins_at_position(clamp_passing_grad(distance, A(0), most).value, reg_max + 1, false);
}

// The loss or overlap of the decoded box, whose sides are `distance` from the centre. The legacy +1 of widths is added
// to the far sides.
template <class A, class Kind>
GFL_HOST_DEVICE IouTerm<A> head_iou(const HeadGeometry<A>& g, const A (&distance)[4], Kind kind, bool legacy) {
  A pred[4], target[4];
  for (int side = 0; side < 4; ++side) {
    const A grown = legacy && side >= 2 ? A(1) : A(0);
    pred[side] = side_at(head_centre(g, side), distance[side], side) + grown;
    target[side] = g.target[side] + grown;
  }
  return iou_term(pred, target, kind, static_cast<A>(kHeadIouEps));
}

}  // namespace gfl
