// SPDX-License-Identifier: Apache-2.0
// Varifocal loss, element by element                                                     (arXiv 2008.13367, eq. 2):
//   loss[i] = w · BCE(x[i], t[i]), w = t (1 if not iou_weighted) where t > 0, else α|σ(x) − t|^γ
#pragma once
#include "gfl/types.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where `dtype` is f64, else float.
struct VflInput {
  const void* pred;    // [count] dtype: logits, or probabilities if `activated`
  DType dtype;
  const void* target;  // [count] of A, in [0, 1]
  int64_t count;
  double alpha, gamma;
  bool iou_weighted, activated;
};

namespace cpu {
// Elements [begin, end). loss: [count] of A.
void vfl_forward(const VflInput& in, void* loss, int64_t begin, int64_t end);
// grad_loss: of A, element i at i · grad_stride, so that 0 spreads one gradient over all. grad_pred: [count] dtype, or null.
// grad_target: [count] of A, or null.
void vfl_backward(const VflInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred, void* grad_target,
                  int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t vfl_forward(const VflInput& in, void* loss, cudaStream_t stream);
cudaError_t vfl_backward(const VflInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
                         void* grad_target, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
