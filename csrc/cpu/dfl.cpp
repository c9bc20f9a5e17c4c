// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss on the CPU, rows [begin, end) of the caller's chunk; one softmax a row serves loss and
// distance.
//
//   pred        [rows, bins] dtype read, any strides     target                    [rows] A     read, or these three:
//   loss        [rows]       A     write                 left                      [rows] int64 read
//   distance    [rows]       A     write                 weight_left, weight_right [rows] A     read
//   grad_pred   [rows, bins] dtype write, contiguous     grad_target or grad_weight_left, grad_weight_right as these
// fp64 is served here, every other dtype by the vector code of simd/dfl.cpp.
#include "gfl/dfl.h"

#include "terms/bins.h"
#include "isa.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void dfl_forward(const DflInput& in, float* loss, float* distance, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_backward(const DflInput& in, const float* grad_loss, const float* grad_distance,
                                      const DflGradients& out, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept,
                                             int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance,
                                    const DflKept& kept, int64_t begin, int64_t end))
}  // namespace gfl

namespace gfl::cpu {
namespace {

double at(const void* values, int64_t row) { return static_cast<const double*>(values)[row]; }
void put(void* values, int64_t row, double value) { static_cast<double*>(values)[row] = value; }

TwoBins<double> bins_of(const DflInput& in, int64_t row) {
  const int bins = static_cast<int>(in.pred.bins);
  if (in.target != nullptr) return bins_at_position(at(in.target, row), bins, in.ignore_out_of_range);
  return bins_given(in.left[row], at(in.weight_left, row), at(in.weight_right, row), bins);
}

void forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.pred.bins);
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(in.pred.data) + row_offset(in.pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * in.pred.stride_bin]); };
    const BinSoftmax<double> s = bin_softmax<double>(bins, logit);
    const TwoBins<double> b = bins_of(in, row);
    put(loss, row, b.counted ? two_bin_loss(b, two_bin_entropy(s, b, logit)) : 0.0);
    if (distance != nullptr) put(distance, row, s.mean());
  }
}

void backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
              int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.pred.bins);
  double e[kMaxBins];
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(in.pred.data) + row_offset(in.pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * in.pred.stride_bin]); };
    const BinSoftmax<double> s = bin_softmax<double>(bins, logit, [&](int j, double value) { e[j] = value; });
    const TwoBins<double> b = bins_of(in, row);
    const TwoBinEntropy<double> entropy = two_bin_entropy(s, b, logit);
    const double scale = at(grad_loss, row), scale_distance = grad_distance != nullptr ? at(grad_distance, row) : 0.0;
    if (out.target != nullptr) {
      put(out.target, row, b.counted && !b.clamped ? scale * (entropy.right - entropy.left) : 0.0);
    }
    if (out.weight_left != nullptr) put(out.weight_left, row, scale * entropy.left);
    if (out.weight_right != nullptr) put(out.weight_right, row, scale * entropy.right);
    if (out.pred == nullptr) continue;
    for (int j = 0; j < bins; ++j) {
      const double p = e[j] / s.total;
      double gradient = b.counted ? scale * two_bin_gradient(b, j, p) : 0.0;
      if (grad_distance != nullptr) gradient += scale_distance * s.mean_gradient(j, p);
      put(out.pred, row * bins + j, is_beyond(x[j * in.pred.stride_bin]) ? 0.0 : gradient);
    }
  }
}

}  // namespace

void dfl_forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end) {
  if (in.pred.dtype == DType::f64) return forward(in, loss, distance, begin, end);
  GFL_BY_ISA(dfl_forward, in, static_cast<float*>(loss), static_cast<float*>(distance), begin, end);
}

void dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  if (in.pred.dtype == DType::f64) return backward(in, grad_loss, grad_distance, out, begin, end);
  GFL_BY_ISA(dfl_backward, in, static_cast<const float*>(grad_loss), static_cast<const float*>(grad_distance), out,
             begin, end);
}

void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end) {
  GFL_BY_ISA(dfl_forward_keeping, in, loss, distance, kept, begin, end);
}

void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflKept& kept,
                int64_t begin, int64_t end) {
  GFL_BY_ISA(dfl_finish, in, grad_loss, grad_distance, kept, begin, end);
}

}  // namespace gfl::cpu
