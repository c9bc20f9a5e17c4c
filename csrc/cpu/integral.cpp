// SPDX-License-Identifier: Apache-2.0
// Integral on the CPU, rows [begin, end) of the caller's chunk.
//
//   pred     [rows, bins] dtype read, any strides     grad_pred [rows, bins] dtype write, contiguous
//   distance [rows]       A     write
// fp64 is served here, every other dtype by the vector code of simd/integral.cpp.
#include "gfl/integral.h"

#include "bin_means.h"
#include "terms/bins.h"

namespace gfl::cpu {
namespace {

void forward(const BinRows& pred, double* distance, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(pred.data) + row_offset(pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * pred.stride_bin]); };
    distance[row] = bin_softmax<double>(static_cast<int>(pred.bins), logit).mean();
  }
}

void backward(const BinRows& pred, const double* grad_distance, double* grad_pred, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(pred.bins);
  double e[kMaxBins];
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(pred.data) + row_offset(pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * pred.stride_bin]); };
    const BinSoftmax<double> s = bin_softmax<double>(bins, logit, [&](int j, double value) { e[j] = value; });
    double* grad = grad_pred + row * bins;
    for (int j = 0; j < bins; ++j) {
      const double gradient = grad_distance[row] * s.mean_gradient(j, e[j] / s.total);
      grad[j] = is_beyond(x[j * pred.stride_bin]) ? 0.0 : gradient;
    }
  }
}

}  // namespace

void integral_forward(const BinRows& pred, void* distance, int64_t begin, int64_t end) {
  if (pred.dtype == DType::f64) return forward(pred, static_cast<double*>(distance), begin, end);
  GFL_BY_ISA(integral_forward, pred, static_cast<float*>(distance), begin, end);
}

void integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end) {
  if (pred.dtype == DType::f64) {
    return backward(pred, static_cast<const double*>(grad_distance), static_cast<double*>(grad_pred), begin, end);
  }
  const SlopeOfMean slope{static_cast<const float*>(grad_distance), nullptr, nullptr};
  GFL_BY_ISA(integral_backward, pred, slope, grad_pred, begin, end);
}

}  // namespace gfl::cpu
