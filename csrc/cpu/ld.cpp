// SPDX-License-Identifier: Apache-2.0
// Distillation with a temperature on the CPU, rows [begin, end) of the caller's chunk.
//
//   pred, teacher [rows, bins] dtype read, any strides     loss, grad_loss [rows] A write, read
//   grad_pred     [rows, bins] dtype write, contiguous
// fp64 runs here, every other dtype in the vector code of simd/ld.cpp.
#include "isa.h"
#include "terms/bins.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void ld_forward(const LdInput& in, float* loss, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void ld_backward(const LdInput& in, const float* grad_loss, void* grad_pred, int64_t begin,
                                     int64_t end))
}  // namespace gfl

namespace gfl::cpu {
namespace {

// The logits of a row, as ld_sums walks over them.
struct Row {
  const double *x, *z;
  int64_t step_x, step_z, bins;

  Row(const LdInput& in, int64_t row)
      : x(static_cast<const double*>(in.pred) + row * in.pred_stride_row),
        z(static_cast<const double*>(in.teacher) + row * in.teacher_stride_row),
        step_x(in.pred_stride_bin),
        step_z(in.teacher_stride_bin),
        bins(in.bins) {}

  template <class Visit> void operator()(const Visit& visit) const {
    for (int64_t j = 0; j < bins; ++j) {
      double at_x = x[j * step_x], at_z = z[j * step_z];
      visit(at_x, at_z);
    }
  }
};

LdSums<double> sums_of(const LdScale<double>& scale, const Row& row) {
  const auto whole_row = [](double value) { return value; };
  return ld_sums<false>(scale, row, whole_row, whole_row);
}

void forward(const LdInput& in, double* loss, int64_t begin, int64_t end) {
  const LdScale<double> scale(in);
  for (int64_t row = begin; row < end; ++row) loss[row] = scale.loss * sums_of(scale, Row(in, row)).divergence();
}

void backward(const LdInput& in, const double* grad_loss, double* grad_pred, int64_t begin, int64_t end) {
  const LdScale<double> scale(in);
  for (int64_t index = begin; index < end; ++index) {
    const Row row(in, index);
    const LdSums<double> s = sums_of(scale, row);
    const double factor = scale.gradient * grad_loss[index];
    double* grad = grad_pred + index * in.bins;
    row([&](double x, double z) { *grad++ = ld_gradient(scale, s, factor, x, z); });
  }
}

}  // namespace

void ld_forward(const LdInput& in, void* loss, int64_t begin, int64_t end) {
  if (in.dtype == DType::f64) return forward(in, static_cast<double*>(loss), begin, end);
  GFL_BY_ISA(ld_forward, in, static_cast<float*>(loss), begin, end);
}

void ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, int64_t begin, int64_t end) {
  if (in.dtype == DType::f64) {
    return backward(in, static_cast<const double*>(grad_loss), static_cast<double*>(grad_pred), begin, end);
  }
  GFL_BY_ISA(ld_backward, in, static_cast<const float*>(grad_loss), grad_pred, begin, end);
}

}  // namespace gfl::cpu
