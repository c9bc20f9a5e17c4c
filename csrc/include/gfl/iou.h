// SPDX-License-Identifier: Apache-2.0
// IoU losses of aligned boxes: loss[n] = 1 − IoU(pred[n], target[n]), or its GIoU, DIoU, CIoU form.
#pragma once
#include "gfl/types.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where `dtype` is f64, else float.
struct IouInput {
  const void* pred;    // [rows, 4] dtype, boxes xyxy
  DType dtype;
  int64_t stride_row, stride_side;
  const void* target;  // [rows, 4] of A, contiguous
  int64_t rows;
  int kind;            // 0 iou, 1 giou, 2 diou, 3 ciou: one minus it; 4: the IoU itself
  double eps;
};

namespace cpu {
// Rows [begin, end). loss: [rows] of A.
void iou_forward(const IouInput& in, void* loss, int64_t begin, int64_t end);
// grad_loss: [rows] of A. grad_pred: [rows, 4] dtype, contiguous, or null. grad_target: [rows, 4] of A, or null.
void iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t iou_forward(const IouInput& in, void* loss, cudaStream_t stream);
cudaError_t iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
