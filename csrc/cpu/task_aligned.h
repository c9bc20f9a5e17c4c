// SPDX-License-Identifier: Apache-2.0
// What the vector code of task-aligned assignment works on.
#pragma once
#include "gfl/assign.h"
#include "location_rows.h"

namespace gfl::cpu {

// Floats that may be read and written past the end of an array: one register less one.
constexpr int64_t kTaskAlignedPadding = 15;

// The predictions of an image as a structure of arrays, and the largest overlap at each location so far with its slot.
struct TaskAlignedImage {
  float *x1, *y1, *x2, *y2, *area, *angle;  // [locations] and the padding
  float* best;                              // 0 where there is none; null: not wanted
  int32_t* best_slot;
  const void* scores;  // [locations, classes] of the input's dtype and strides
};

// The best candidates of a box, falling by metric, ties by rising location; metrics are above 0.
struct TaskAlignedTop {
  float *metric, *overlap;
  int32_t* location;
  int64_t count, capacity;
};

}  // namespace gfl::cpu
