// SPDX-License-Identifier: Apache-2.0
// What the assignments that read predictions share: which boxes count and which locations lie inside them.
#pragma once
#include <math.h>

#include <cstdint>

#include "box.h"
#include "gfl/assign.h"
#include "grid.h"
#include "host_device.h"
#if defined(GFL_ISA)
#include "cpu/simd/vector_math.h"
#endif

namespace gfl {
GFL_ISA_OPEN

template <class V> GFL_HOST_DEVICE V constant(float x) { return V{} + x; }

GFL_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return ::sqrtf(x);
#endif
}

// Where the points of a box's candidates lie: more than `margin` within all four sides.
struct Inside {
  float x1, y1, x2, y2, margin;

  GFL_HOST_DEVICE bool column(float x) const { return sub_rn(x, x1) > margin && sub_rn(x2, x) > margin; }
  GFL_HOST_DEVICE bool row(float y) const { return sub_rn(y, y1) > margin && sub_rn(y2, y) > margin; }
  GFL_HOST_DEVICE bool operator()(float x, float y) const { return column(x) && row(y); }
};

GFL_HOST_DEVICE float grid_centre(const GridLevel& level, int64_t index) {
  return cell_centre(static_cast<float>(index), level.offset, level.stride);
}

// Whether a slot holds a box: of a known class and finite.
GFL_HOST_DEVICE bool holds_box(const AssignInput& in, int64_t image_slot) {
  const int64_t label = in.gt_labels[image_slot];
  return label >= 0 && label < in.classes && is_finite_box(in.gt_boxes + 4 * image_slot);
}

GFL_ISA_CLOSE
}  // namespace gfl
