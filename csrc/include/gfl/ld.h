// SPDX-License-Identifier: Apache-2.0
// Distillation of distributions with a temperature T, of a box's sides (arXiv 2102.12252) or of classes (1503.02531):
//
//   loss[m] = T²/n Σ_j q[j]·(log q[j] − log p[j]),  p = softmax(pred[m] / T),  q = softmax(teacher[m] / T)
//   ∂loss[m]/∂pred[m,j] = T/n (p[j] − q[j])
//
// The teacher has no gradient. A logit counts at most as a quarter of A's range times min(T, 1): no difference of two
// overflows over T, so an infinite logit makes no NaN. Beyond, the gradient is 0. A NaN spreads over its row.
#pragma once
#include "gfl/types.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where `dtype` is f64, else float.
struct LdInput {
  const void* pred;     // [rows, bins] dtype: the student's logits
  const void* teacher;  // [rows, bins] dtype: the teacher's
  DType dtype;
  int64_t rows, bins;   // bins ≥ 1
  int64_t pred_stride_row, pred_stride_bin, teacher_stride_row, teacher_stride_bin;  // in elements
  double temperature;   // > 0
};

namespace cpu {
// Rows [begin, end). loss: [rows] of A.
void ld_forward(const LdInput& in, void* loss, int64_t begin, int64_t end);
// grad_loss: [rows] of A. grad_pred: [rows, bins] dtype, contiguous.
void ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t ld_forward(const LdInput& in, void* loss, cudaStream_t stream);
cudaError_t ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
