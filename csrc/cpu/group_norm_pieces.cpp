// SPDX-License-Identifier: Apache-2.0
// Rows and runs of group normalization: fp32 and 16 bits in the vector code of this processor's instruction set, runs
// of fp64 in scalar code.
#include <algorithm>

#include "group_norm_relu.h"
#include "isa.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void norm_row_moments(const cpu::NormRows& in, float* shift, float* sum, float* squares))
GFL_DECLARE_PER_ISA(void norm_row_forward(const cpu::NormRows& in, const cpu::NormChannels& channels))
GFL_DECLARE_PER_ISA(void norm_row_sums(const cpu::NormRows& in, const cpu::NormChannels& channels, float* sum,
                                       float* product))
GFL_DECLARE_PER_ISA(void norm_row_backward(const cpu::NormRows& in, const cpu::NormChannels& channels))
GFL_DECLARE_PER_ISA(void norm_run_moments(const cpu::NormRows& in, cpu::NormMoments& all))
GFL_DECLARE_PER_ISA(void norm_run_forward(const cpu::NormRows& in, const cpu::NormChannel& channel))
GFL_DECLARE_PER_ISA(void norm_run_sums(const cpu::NormRows& in, const cpu::NormChannel& channel, cpu::NormSums& all))
GFL_DECLARE_PER_ISA(void norm_run_backward(const cpu::NormRows& in, const cpu::NormChannel& channel))
}  // namespace gfl

namespace gfl::cpu {
namespace {

bool is_f64(const NormRows& rows) { return rows.dtype == DType::f64; }

const double& x_at(const NormRows& run, int64_t i) { return static_cast<const double*>(run.x)[i * run.x_stride]; }
double& out_at(const NormRows& run, int64_t i) { return static_cast<double*>(run.out)[i * run.out_stride]; }
// The gradient behind the ReLU.
double grad_at(const NormRows& run, const NormChannel& k, int64_t i) {
  const bool cut = (x_at(run, i) - k.mean) * k.scale + k.bias <= run.floor;
  return cut ? 0 : static_cast<const double*>(run.grad)[i * run.grad_stride];
}

void f64_moments(const NormRows& run, NormMoments& all) {
  NormMoments m{static_cast<double>(run.length), 0, 0};
  for (int64_t i = 0; i < run.length; ++i) m.mean += x_at(run, i);
  m.mean /= std::max(m.count, 1.0);
  for (int64_t i = 0; i < run.length; ++i) m.squares += (x_at(run, i) - m.mean) * (x_at(run, i) - m.mean);
  merge(all, m);
}
void f64_forward(const NormRows& run, const NormChannel& k) {
  for (int64_t i = 0; i < run.length; ++i) {
    const double value = (x_at(run, i) - k.mean) * k.scale + k.bias;
    out_at(run, i) = value < run.floor ? run.floor : value;
  }
}
void f64_sums(const NormRows& run, const NormChannel& k, NormSums& all) {
  for (int64_t i = 0; i < run.length; ++i) {
    const double g = grad_at(run, k, i);
    all.grad += g;
    all.grad_xhat += g * (x_at(run, i) - k.mean);
  }
}
void f64_backward(const NormRows& run, const NormChannel& k) {
  for (int64_t i = 0; i < run.length; ++i) {
    out_at(run, i) = k.scale * grad_at(run, k, i) - (k.level + k.slope * (x_at(run, i) - k.mean));
  }
}

}  // namespace

void row_moments(const NormRows& in, float* shift, float* sum, float* squares) {
  GFL_BY_ISA(norm_row_moments, in, shift, sum, squares);
}
void row_forward(const NormRows& in, const NormChannels& channels) { GFL_BY_ISA(norm_row_forward, in, channels); }
void row_sums(const NormRows& in, const NormChannels& channels, float* sum, float* product) {
  GFL_BY_ISA(norm_row_sums, in, channels, sum, product);
}
void row_backward(const NormRows& in, const NormChannels& channels) { GFL_BY_ISA(norm_row_backward, in, channels); }
void run_moments(const NormRows& in, NormMoments& all) {
  if (is_f64(in)) return f64_moments(in, all);
  GFL_BY_ISA(norm_run_moments, in, all);
}
void run_forward(const NormRows& in, const NormChannel& channel) {
  if (is_f64(in)) return f64_forward(in, channel);
  GFL_BY_ISA(norm_run_forward, in, channel);
}
void run_sums(const NormRows& in, const NormChannel& channel, NormSums& all) {
  if (is_f64(in)) return f64_sums(in, channel, all);
  GFL_BY_ISA(norm_run_sums, in, channel, all);
}
void run_backward(const NormRows& in, const NormChannel& channel) {
  if (is_f64(in)) return f64_backward(in, channel);
  GFL_BY_ISA(norm_run_backward, in, channel);
}

}  // namespace gfl::cpu
