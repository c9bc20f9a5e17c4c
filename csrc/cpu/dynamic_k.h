// SPDX-License-Identifier: Apache-2.0
// What the vector code of assignment with a dynamic k works on.
#pragma once
#include "gfl/assign.h"

namespace gfl::cpu {

// Floats that may be read and written past the end of an array: one register less one.
constexpr int64_t kDynamicKPadding = 15;

// Boxes as a structure of arrays, [count] and the padding.
struct BoxArrays { float *x1, *y1, *x2, *y2, *area; };

// The locations of an image that count: first the candidates, then those that count for k alone.
struct DynamicKImage {
  BoxArrays boxes;
  float *x, *y, *stride_x, *stride_y;
  float* others;      // sum of the background costs of all classes; −1: not yet computed
  int32_t* location;  // rising among the candidates
  int64_t count, candidates;
  const void* scores;  // [locations, classes] of the input's dtype and strides
};

// The boxes of an image, those of padding left out.
struct DynamicKObjects {
  BoxArrays boxes;
  const int64_t* labels;
  int64_t count;
};

// The best of a box, at most `capacity` each.
struct DynamicKTop {
  float* overlap;  // falling
  int64_t overlaps;
  float* cost;  // rising, ties by rising place
  int32_t* place;
  int64_t costs, capacity;
};

// Who gets a location.
struct DynamicKWinner {
  int32_t object;
  float overlap;
};

}  // namespace gfl::cpu
