// SPDX-License-Identifier: Apache-2.0
// Integral on the CPU, rows [begin, end) of the caller's chunk.
//
//   pred     [rows, bins] dtype read, any strides     grad_pred [rows, bins] dtype write, contiguous
//   distance [rows]       A     write
#include "gfl/integral.h"

#include "bins.h"
#include "scalar.h"

namespace gfl::cpu {
namespace {

template <class T> void forward(const BinRows& pred, void* distance, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(pred.data) + row_offset(pred, row);
    const auto logit = [&](int j) { return bounded_logit<A>(load(x + j * pred.stride_bin)); };
    static_cast<A*>(distance)[row] = bin_softmax<A>(static_cast<int>(pred.bins), logit).mean();
  }
}

template <class T>
void backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(pred.bins);
  A x[kMaxBins], e[kMaxBins];
  const auto logit = [&](int j) { return bounded_logit(x[j]); };
  for (int64_t row = begin; row < end; ++row) {
    const T* from = static_cast<const T*>(pred.data) + row_offset(pred, row);
    for (int j = 0; j < bins; ++j) x[j] = load(from + j * pred.stride_bin);
    const BinSoftmax<A> s = bin_softmax<A>(bins, logit, [&](int j, A value) { e[j] = value; });
    const A scale = static_cast<const A*>(grad_distance)[row];
    T* grad = static_cast<T*>(grad_pred) + row * bins;
    for (int j = 0; j < bins; ++j) {
      store(grad + j, is_beyond(x[j]) ? A(0) : scale * s.mean_gradient(j, e[j] / s.total));
    }
  }
}

}  // namespace

void integral_forward(const BinRows& pred, void* distance, int64_t begin, int64_t end) {
  dispatch(pred.dtype, [&](auto t) { forward<decltype(t)>(pred, distance, begin, end); });
}

void integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end) {
  dispatch(pred.dtype, [&](auto t) { backward<decltype(t)>(pred, grad_distance, grad_pred, begin, end); });
}

}  // namespace gfl::cpu
