// SPDX-License-Identifier: Apache-2.0
// What the scalar and the vector code of group normalization share: pieces of maps as plain pointers, the coefficients
// of channels, and how moments are combined.
#pragma once
#include <cstdint>

#include "gfl/head.h"
#include "terms/host_device.h"

namespace gfl::cpu {

// Of some values of a group.
struct NormMoments { double count, mean, squares; };  // squares: Σ (x − mean)²

// Of a channel: Σ g and Σ g·x̂.
struct NormSums { double grad, grad_xhat; };

GFL_ISA_OPEN

// Adds the values of another part (Chan, Golub and LeVeque, Updating formulae, 1979).
inline void merge(NormMoments& all, const NormMoments& part) {
  if (part.count == 0) return;
  const double count = all.count + part.count, difference = part.mean - all.mean, share = part.count / count;
  all.squares += part.squares + difference * difference * all.count * share;
  all.mean += difference * share;
  all.count = count;
}

GFL_ISA_CLOSE

// Of a channel: y = max(floor, (x − mean)·scale + bias); backward grad_x = scale·g − level − slope·(x − mean). For all
// maps but f64 each is rounded to float.
struct NormChannel { double mean, scale, bias, level, slope; };

// Of all channels: arrays of `channels` floats, rounded up to a whole number of vectors.
struct NormChannels { const float *mean, *scale, *bias, *level, *slope; };

// Rows: some locations, each with all its channels, which are contiguous. Or a run: the locations of one channel,
// contiguous but in f64, where x_stride, grad_stride and out_stride are the strides between them.
struct NormRows {
  DType dtype;
  const void* x;
  const void* grad;                           // null forward
  void* out;                                  // null for sums
  int64_t x_stride, grad_stride, out_stride;  // between rows, in elements
  int64_t rows, length;
  double floor;  // 0 with a ReLU, else −∞
};

// Rows, not of f64. `shift` (the first row), `sum` (Σd) and `squares` (Σd², d the distance from `shift`), as `product`
// (Σ g·(x − mean)), hold a float per channel, rounded up to a whole number of vectors.
void row_moments(const NormRows& rows, float* shift, float* sum, float* squares);
void row_forward(const NormRows& rows, const NormChannels& channels);
void row_sums(const NormRows& rows, const NormChannels& channels, float* sum, float* product);
void row_backward(const NormRows& rows, const NormChannels& channels);

// Runs. Moments, and the sums Σg and Σ g·(x − mean), are added to `all`.
void run_moments(const NormRows& run, NormMoments& all);
void run_forward(const NormRows& run, const NormChannel& channel);
void run_sums(const NormRows& run, const NormChannel& channel, NormSums& all);
void run_backward(const NormRows& run, const NormChannel& channel);

}  // namespace gfl::cpu
