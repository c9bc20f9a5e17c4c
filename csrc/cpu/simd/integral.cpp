// SPDX-License-Identifier: Apache-2.0
// Integral of fp32 and 16-bit logits, kLanes rows at a time; decode.cpp of the folder above builds boxes on it.
#include "gfl/integral.h"

#include "../bin_means.h"
#include "bin_rows.h"

namespace gfl::GFL_ISA {
namespace {

template <class T> void forward(const BinRows& pred, float* distance, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(pred.bins);
  Lanes tile[kMaxBins];
  for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, pred.stride_bin, bins, tile);
    BinSums s;
    bin_softmax<false>(tile, bins, s, nullptr);
    Lanes mean;
    s.mean(mean);
    store_rows(mean, group.row, group.count, distance);
  });
}

template <class T>
void backward(const BinRows& pred, const SlopeOfMean& slope, T* grad_pred, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(pred.bins);
  Lanes tile[kMaxBins], e[kMaxBins];
  for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, pred.stride_bin, bins, tile);
    BinSums s;
    bin_softmax<true>(tile, bins, s, e);
    Lanes scale, from_peak;
    if (slope.of_rows == nullptr) {
      load_rows(slope.scales, group.row, scale);
    } else {
      Lanes mean;
      s.mean(mean);
      slope.of_rows(slope.context, group.row, group.count, mean.at, scale.at);
      for (int k = group.count; k < kLanes; ++k) scale[k] = 0.0f;
    }
    GFL_LANES(k) {
      from_peak[k] = s.moment[k] / s.total[k];
      scale[k] /= s.total[k];
    }
    for (int j = 0; j < bins; ++j) {
      const float bin = static_cast<float>(j);
      GFL_LANES(k) {
        const float gradient = scale[k] * (e[j][k] * ((bin - s.peak[k]) - from_peak[k]));
        e[j][k] = absolute_of(tile[j][k]) > kLargestLogit ? 0.0f : gradient;
      }
    }
    if (grad_pred != nullptr) store_tile(e, group, bins, grad_pred);
  });
}

}  // namespace

void integral_forward(const BinRows& pred, float* distance, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) { forward<decltype(t)>(pred, distance, begin, end); });
}

void integral_backward(const BinRows& pred, const SlopeOfMean& slope, void* grad_pred, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) {
    backward(pred, slope, static_cast<decltype(t)*>(grad_pred), begin, end);
  });
}

}  // namespace gfl::GFL_ISA
