// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss on the CPU, rows [begin, end) of the caller's chunk; one softmax a row serves loss and
// distance.
//
//   pred        [rows, bins] dtype read, any strides     target                    [rows] A     read, or these three:
//   loss        [rows]       A     write                 left                      [rows] int64 read
//   distance    [rows]       A     write                 weight_left, weight_right [rows] A     read
//   grad_pred   [rows, bins] dtype write, contiguous     grad_target or grad_weight_left, grad_weight_right as these
#include "gfl/dfl.h"

#include "bins.h"
#include "scalar.h"

namespace gfl::cpu {
namespace {

template <class A> TwoBins<A> bins_of(const DflInput& in, int64_t row) {
  const int bins = static_cast<int>(in.pred.bins);
  if (in.target != nullptr) {
    return bins_at_position(static_cast<const A*>(in.target)[row], bins, in.ignore_out_of_range);
  }
  return bins_given(in.left[row], static_cast<const A*>(in.weight_left)[row],
                    static_cast<const A*>(in.weight_right)[row], bins);
}

template <class T> void forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(in.pred.bins);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(in.pred.data) + row_offset(in.pred, row);
    const auto logit = [&](int j) { return bounded_logit<A>(load(x + j * in.pred.stride_bin)); };
    const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
    const TwoBins<A> b = bins_of<A>(in, row);
    static_cast<A*>(loss)[row] = b.counted ? two_bin_loss(b, two_bin_entropy(s, b, logit)) : A(0);
    if (distance != nullptr) static_cast<A*>(distance)[row] = s.mean();
  }
}

template <class T>
void backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
              int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(in.pred.bins);
  A x[kMaxBins], e[kMaxBins];
  const auto logit = [&](int j) { return bounded_logit(x[j]); };
  for (int64_t row = begin; row < end; ++row) {
    const T* pred = static_cast<const T*>(in.pred.data) + row_offset(in.pred, row);
    for (int j = 0; j < bins; ++j) x[j] = load(pred + j * in.pred.stride_bin);
    const BinSoftmax<A> s = bin_softmax<A>(bins, logit, [&](int j, A value) { e[j] = value; });
    const TwoBins<A> b = bins_of<A>(in, row);
    const TwoBinEntropy<A> entropy = two_bin_entropy(s, b, logit);
    const A scale = static_cast<const A*>(grad_loss)[row];
    const A scale_distance = grad_distance != nullptr ? static_cast<const A*>(grad_distance)[row] : A(0);
    if (out.target != nullptr) {
      static_cast<A*>(out.target)[row] = b.counted && !b.clamped ? scale * (entropy.right - entropy.left) : A(0);
    }
    if (out.weight_left != nullptr) static_cast<A*>(out.weight_left)[row] = scale * entropy.left;
    if (out.weight_right != nullptr) static_cast<A*>(out.weight_right)[row] = scale * entropy.right;
    if (out.pred == nullptr) continue;
    T* grad = static_cast<T*>(out.pred) + row * bins;
    for (int j = 0; j < bins; ++j) {
      const A p = e[j] / s.total;
      A g = b.counted ? scale * two_bin_gradient(b, j, p) : A(0);
      if (grad_distance != nullptr) g += scale_distance * s.mean_gradient(j, p);
      store(grad + j, is_beyond(x[j]) ? A(0) : g);
    }
  }
}

}  // namespace

void dfl_forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end) {
  dispatch(in.pred.dtype, [&](auto t) { forward<decltype(t)>(in, loss, distance, begin, end); });
}

void dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  dispatch(in.pred.dtype,
           [&](auto t) { backward<decltype(t)>(in, grad_loss, grad_distance, out, begin, end); });
}

}  // namespace gfl::cpu
