// SPDX-License-Identifier: Apache-2.0
// What the scalar and the vector code of group normalization share: the walk's pieces as plain pointers, and how moments
// are put together.
#pragma once
#include <cstdint>

#include "gfl/group_norm_relu.h"
#include "terms/host_device.h"

namespace gfl::cpu {

GFL_ISA_OPEN

// Adds values of another part to a part (Chan, Golub and LeVeque, Updating formulae, 1979).
inline void merge(NormMoments& all, const NormMoments& part) {
  if (part.count == 0) return;
  const double count = all.count + part.count, difference = part.mean - all.mean, share = part.count / count;
  all.squares += part.squares + difference * difference * all.count * share;
  all.mean += difference * share;
  all.count = count;
}

GFL_ISA_CLOSE

// A channel's coefficients: y = max(floor, (x − mean)·scale + bias); backward grad_x = scale·g − level − slope·(x − mean).
struct NormChannel { float mean, scale, bias, level, slope; };

// The same of all channels, each an array of `channels` floats rounded up to a whole number of vectors.
struct NormChannels { const float *mean, *scale, *bias, *level, *slope; };

// Some locations with all their channels, side by side; or one channel's locations, side by side.
struct NormRows {
  DType dtype;
  const void* x;
  const void* grad;     // null forward
  void* out;            // null where only sums are wanted
  int64_t x_stride, grad_stride, out_stride;  // between rows, in elements
  int64_t rows, length;
  float floor;          // 0 with a ReLU, else −∞
};

}  // namespace gfl::cpu
