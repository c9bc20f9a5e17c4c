// SPDX-License-Identifier: Apache-2.0
// One row, a register of its elements at a time: reading and writing it at any distance between elements, and its sum.
#pragma once
#include "vector_math.h"

namespace gfl::GFL_ISA {

// kLanes partial sums of one row, added up in a tree that does not depend on the instruction set.
struct RowSum {
  Floats parts[kParts] = {};
  float total() {
    for (int count = kParts / 2; count > 0; count /= 2) {
      for (int i = 0; i < count; ++i) parts[i] += parts[i + count];
    }
    return sum_of(parts[0]);
  }
};

// kWidth elements `step` apart, of which `count` are there; the others are read as `fill` and not written.
template <class T> inline Floats load_every(const T* from, int64_t step, int64_t count, float fill) {
  if (step == 1) return load_floats(from, count, fill);
  float lanes[kWidth];
  for (int j = 0; j < kWidth; ++j) lanes[j] = j < count ? load(from + j * step) : fill;
  return load_floats(lanes);
}
template <class T> inline void store_every(Floats v, int64_t step, int64_t count, T* to) {
  if (step == 1) return store_floats(v, count, to);
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof v);
  for (int j = 0; j < kWidth && j < count; ++j) store(to + j * step, lanes[j]);
}

}  // namespace gfl::GFL_ISA
