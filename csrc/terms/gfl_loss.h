// SPDX-License-Identifier: Apache-2.0
// One positive of a head's loss: decode, overlaps and the four losses of its sides, with their derivatives; and what
// tells the heads apart.
#pragma once
#include <cstdint>

#include "bins.h"
#include "distance.h"
#include "gfl/head.h"
#include "grid.h"
#include "iou.h"
#include "score.h"

namespace gfl {

// Each has its losses of class scores and of boxes; whether an assigner gave the scores that classes learn, which weigh
// the boxes too; whether distances are in pixels or in cells; the eps of overlaps, in the same unit squared; and what
// keeps a target below the last bin.
struct GflHead {  // as mmdet's; the class learns the IoU, and a positive weighs its largest probability
  using Score = Qfl;
  using Box = iou_kind::giou;
  static constexpr bool scores_given = false, in_pixels = false;
  static constexpr double iou_eps = 1e-6, target_margin = 0.1;
};
struct YoloHead {  // as ultralytics'; the class learns the alignment
  using Score = SoftBce;
  using Box = iou_kind::full_ciou;
  static constexpr bool scores_given = true, in_pixels = false;
  static constexpr double iou_eps = 1e-7, target_margin = 0.01;
};
struct RtmdetHead {  // as mmdet's; the class learns the overlap, and the maps hold distances
  using Score = Qfl;
  using Box = iou_kind::giou;
  static constexpr bool scores_given = true, in_pixels = true;
  static constexpr double iou_eps = 1e-6, target_margin = 0;
};

// Calls f with the head that the input is of.
template <class F> void dispatch_head(const HeadLossInput& in, const F& f) {
  switch (in.kind) {
    case HeadLossKind::yolo: return f(YoloHead{});
    case HeadLossKind::rtmdet: return f(RtmdetHead{});
    default: return f(GflHead{});
  }
}

constexpr int64_t kHeadNotCounted = -2;  // the label of locations that no loss looks at

// A location with a class and a box.
struct HeadPositive {
  int64_t image, level, row, column;
  int64_t location;  // its index in `labels`
  int64_t label, slot;
};

GFL_HOST_DEVICE bool is_positive(const HeadLossInput& in, int64_t label, int64_t slot) {
  return label >= 0 && label < in.classes && slot >= 0 && slot < in.gts;
}

template <class A> struct HeadGeometry {
  A centre_x, centre_y;  // in cells, or in pixels if the head's distances are
  A target[4];           // the box, in the same unit
};

template <class Head, class A>
GFL_HOST_DEVICE HeadGeometry<A> head_geometry(const HeadLossInput& in, const HeadLevel& level, const HeadPositive& p) {
  const A stride = static_cast<A>(level.stride), unit = Head::in_pixels ? A(1) : stride;
  const A shift = in.legacy ? static_cast<A>((level.stride - 1) / 2) : A(0);
  const A offset = static_cast<A>(level.offset);
  HeadGeometry<A> g;
  g.centre_x = cell_centre(static_cast<A>(p.column), offset, stride, shift) / unit;
  g.centre_y = cell_centre(static_cast<A>(p.row), offset, stride, shift) / unit;
  const A* box = static_cast<const A*>(in.gt_boxes) + (p.image * in.gts + p.slot) * 4;
  for (int i = 0; i < 4; ++i) g.target[i] = box[i] / unit;
  return g;
}

template <class A> GFL_HOST_DEVICE A head_centre(const HeadGeometry<A>& g, int side) {
  return side % 2 == 0 ? g.centre_x : g.centre_y;
}

// The two bins of a side's target.
template <class Head, class A> GFL_HOST_DEVICE TwoBins<A> head_bins(A centre, A target, int side, int reg_max) {
  const A distance = distance_to_side(centre, target, side);
  const A most = static_cast<A>(reg_max - Head::target_margin);
  return bins_at_position(clamp_passing_grad(distance, A(0), most).value, reg_max + 1, false);
}

// Whether the maps hold the distances themselves, which then have an L1 loss in place of the distributions'; distances
// in pixels always do.
template <class Head> GFL_HOST_DEVICE bool has_distances(const HeadLossInput& in) {
  return Head::in_pixels || (Head::scores_given && in.reg_max == 0);
}

// That loss of a side, in widths or heights of the image, and its derivative; an RTMDet head has none.
template <class A> struct SideError { A value, slope; };
template <class Head, class A>
GFL_HOST_DEVICE SideError<A> side_error(const HeadLossInput& in, const HeadLevel& level, A centre, A target, int side,
                                        A distance) {
  if constexpr (Head::in_pixels) return {A(0), A(0)};
  const A error = distance - distance_to_side(centre, target, side);
  const A unit = static_cast<A>(level.stride / (side % 2 == 0 ? in.image_width : in.image_height));
  return {(error < A(0) ? -error : error) * unit, A((A(0) < error) - (error < A(0))) * unit};
}

// The loss or overlap of the decoded box, whose sides are `distance` from the centre. The legacy +1 of widths is added
// to the far sides.
template <class Head, class A, class Kind>
GFL_HOST_DEVICE IouTerm<A> head_iou(const HeadGeometry<A>& g, const A (&distance)[4], Kind kind, bool legacy) {
  A pred[4], target[4];
  for (int side = 0; side < 4; ++side) {
    const A grown = legacy && side >= 2 ? A(1) : A(0);
    pred[side] = side_at(head_centre(g, side), distance[side], side) + grown;
    target[side] = g.target[side] + grown;
  }
  return iou_term(pred, target, kind, static_cast<A>(Head::iou_eps));
}

}  // namespace gfl
