// SPDX-License-Identifier: Apache-2.0
// Where the cells of a level lie.
#pragma once
#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

// The centre of a cell along one axis, in pixels; `offset` in cells.
template <class A> GFL_HOST_DEVICE A cell_centre(A index, A offset, A stride) {
  return mul_rn(add_rn(index, offset), stride);
}

// The same moved by `shift` pixels.
template <class A> GFL_HOST_DEVICE A cell_centre(A index, A offset, A stride, A shift) {
  return add_rn(cell_centre(index, offset, stride), shift);
}

GFL_ISA_CLOSE
}  // namespace gfl
