// SPDX-License-Identifier: Apache-2.0
// Integral of fp32 and 16-bit logits, kLanes rows at a time; decode.cpp of the folder above builds boxes on it.
#include "gfl/integral.h"

#include "../bin_means.h"
#include "bin_rows.h"

namespace gfl::GFL_ISA {
namespace {

template <class T, class Bins>
void forward(const BinRows& pred, Bins bins, float* distance, int64_t begin, int64_t end) {
  Lanes tile[kMaxBins];
  for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, pred.stride_bin, bins, tile);
    BinSums s;
    bin_softmax<false>(tile, bins, s, nullptr);
    Lanes mean;
    s.mean(mean);
    store_rows(mean, group, distance);
  });
}

template <class T, class Bins>
void backward(const BinRows& pred, Bins bins, const SlopeOfMean& given, T* grad_pred, int64_t begin, int64_t end) {
  Lanes tile[kMaxBins], e[kMaxBins];
  for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, pred.stride_bin, bins, tile);
    BinSums s;
    bin_softmax<true>(tile, bins, s, e[0].at);
    Lanes scale;
    if (given.of_rows == nullptr) {
      load_rows(given.scales, group, scale);
    } else {
      Lanes mean;
      s.mean(mean);
      int64_t rows[kLanes];
      for (int k = 0; k < kLanes; ++k) rows[k] = group.row_at(k);
      given.of_rows(given.context, rows, group.count, mean.at, scale.at);
      for (int k = group.count; k < kLanes; ++k) scale[k] = 0.0f;
    }
    const auto gradient = [&](int k) {
      const Floats total = lanes_at(s.total, k);
      const Floats mean = lanes_at(s.moment, k) / total, slope = lanes_at(scale, k) / total;
      return [=](float bin, Floats value) GFL_INLINED { return slope * (value * (bin - mean)); };
    };
    bin_gradients(tile, e[0].at, bins, s, gradient, e);
    if (grad_pred != nullptr) store_tile(e, group, bins, grad_pred);
  });
}

}  // namespace

void integral_forward(const BinRows& pred, float* distance, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) {
    with_bins(pred.bins, [&](auto bins) { forward<decltype(t)>(pred, bins, distance, begin, end); });
  });
}

void integral_backward(const BinRows& pred, const SlopeOfMean& slope, void* grad_pred, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) {
    with_bins(pred.bins,
              [&](auto bins) { backward(pred, bins, slope, static_cast<decltype(t)*>(grad_pred), begin, end); });
  });
}

}  // namespace gfl::GFL_ISA
