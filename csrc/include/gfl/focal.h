// SPDX-License-Identifier: Apache-2.0
// Focal loss: loss[i] = α_t (1 − p_t)^γ · BCE(x[i], t[i]), element by element           (arXiv 1708.02002, eq. 5)
#pragma once
#include "gfl/types.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where `dtype` is f64, else float.
struct FocalInput {
  const void* pred;    // [count] dtype: logits, or probabilities if `activated`
  DType dtype;
  const void* target;  // [count] of A, in [0, 1]
  int64_t count;
  double alpha, gamma;  // a negative alpha: no balance
  bool activated;
};

namespace cpu {
// Elements [begin, end). loss: [count] of A.
void focal_forward(const FocalInput& in, void* loss, int64_t begin, int64_t end);
// grad_loss: of A, element i at i · grad_stride, so that 0 spreads one gradient over all. grad_pred: [count] dtype, or null.
// grad_target: [count] of A, or null.
void focal_backward(const FocalInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
                    void* grad_target, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t focal_forward(const FocalInput& in, void* loss, cudaStream_t stream);
cudaError_t focal_backward(const FocalInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
                           void* grad_target, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
