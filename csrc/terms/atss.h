// SPDX-License-Identifier: Apache-2.0
// Arithmetic of the assignment. Every operation is rounded by itself and in the order of the reference, because each
// result decides something: which cells are nearest, which of them are positive, which box wins a cell.
#pragma once
#include <cmath>
#include <cstdint>

#include "box.h"
#include "gfl/head.h"
#include "grid.h"
#include "host_device.h"

namespace gfl {

struct GtBox {
  Box<float> box;
  float area;
  float centre_x, centre_y;
};

GFL_HOST_DEVICE GtBox gt_box(const float* b, bool legacy) {
  const Box<float> box{b[0], b[1], b[2], b[3]};
  return {box, box_area(box, box_offset<float>(legacy)), mul_rn(add_rn(box.x1, box.x2), 0.5f),
          mul_rn(add_rn(box.y1, box.y2), 0.5f)};
}

GFL_HOST_DEVICE float cell_centre(const AtssLevel& level, int64_t index) {
  return cell_centre(static_cast<float>(index), level.offset, level.stride, level.shift);
}

// One axis' part of the squared distance. As a function of the cell's index it decreases up to the box's centre and
// increases after it, even rounded, since every step is monotone.
GFL_HOST_DEVICE float axis_distance(const AtssLevel& level, int64_t index, float centre) {
  const float d = sub_rn(cell_centre(level, index), centre);
  return mul_rn(d, d);
}

// IoU of a box with the prior centred at (cx, cy), over a union of at least 1e-6; a NaN union stays a NaN IoU.
GFL_HOST_DEVICE float prior_iou(const AtssLevel& level, float cx, float cy, const GtBox& g, bool legacy) {
  const float half = level.half;
  const Box<float> prior{sub_rn(cx, half), sub_rn(cy, half), add_rn(cx, half), add_rn(cy, half)};
  const float offset = box_offset<float>(legacy);
  const Overlap<float> o = box_overlap(prior, box_area(prior, offset), g.box, g.area, offset);
  return div_rn(o.intersection, o.union_area < 1e-6f ? 1e-6f : o.union_area);
}

// The centre lies inside the box, by more than 0.01 pixels on every side.
GFL_HOST_DEVICE bool centre_inside(float cx, float cy, const Box<float>& b) {
  return sub_rn(cx, b.x1) > 0.01f && sub_rn(cy, b.y1) > 0.01f && sub_rn(b.x2, cx) > 0.01f && sub_rn(b.y2, cy) > 0.01f;
}

// Mean plus unbiased standard deviation of a box's candidates, summed one after another in double. Both are rounded to
// float before they are added, as if they came from a float tensor. One candidate has no deviation: NaN, nothing is ≥.
GFL_HOST_DEVICE float atss_threshold(const float* iou, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum = add_rn(sum, static_cast<double>(iou[i]));
  const double mean = div_rn(sum, static_cast<double>(count));
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = sub_rn(static_cast<double>(iou[i]), mean);
    squares = add_rn(squares, mul_rn(d, d));
  }
  const double deviation = std::sqrt(div_rn(squares, static_cast<double>(count - 1)));
  return add_rn(static_cast<float>(mean), static_cast<float>(deviation));
}

// Cells of one axis in the valid part of an image: ceil(valid / stride), at most all; none for NaN.
GFL_HOST_DEVICE int64_t valid_cells(int64_t cells, float valid, float stride) {
  const float count = std::ceil(div_rn(valid, stride));
  if (!(count > 0.0f)) return 0;
  return count < static_cast<float>(cells) ? static_cast<int64_t>(count) : cells;
}

}  // namespace gfl
