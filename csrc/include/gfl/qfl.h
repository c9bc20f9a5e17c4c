// SPDX-License-Identifier: Apache-2.0
// Quality focal loss: loss[n] = Σ_c |t − σ(x[n,c])|^β · BCE(x[n,c], t)          (arXiv 2006.04388, eq. 2)
#pragma once
#include "gfl/types.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where `dtype` is f64, else float.
struct QflInput {
  const void* pred;        // [rows, classes] dtype: logits, or probabilities if `activated`
  DType dtype;
  int64_t stride_row, stride_class;
  const int64_t* label;    // [rows], or null: then `target` is dense
  const void* target;      // [rows] of A: the score at `label` (others 0); or dense [rows, classes] of A, contiguous
  int64_t rows, classes;
  double beta;
  bool activated;
};

namespace cpu {
// Rows [begin, end). loss: [rows] of A.
void qfl_forward(const QflInput& in, void* loss, int64_t begin, int64_t end);
// grad_loss: [rows] of A. grad_pred: [rows, classes] dtype, contiguous, or null. grad_target: shaped as `target`, or null.
void qfl_backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end);
// Both in one walk: loss, and the gradient of Σ scales · loss. scales: [rows] of A.
void qfl_forward_and_gradient(const QflInput& in, const void* scales, void* loss, void* grad_pred, int64_t begin,
                              int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t qfl_forward(const QflInput& in, void* loss, cudaStream_t stream);
cudaError_t qfl_backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
