// SPDX-License-Identifier: Apache-2.0
// Integral: distance[row] = Σ_j softmax(pred[row])[j] · j                       (arXiv 2006.04388, eq. 5)
#pragma once
#include "gfl/rows.h"

namespace gfl {

// `A` below is double where the dtype of `pred` is f64, else float.
namespace cpu {
// Rows [begin, end). distance: [rows] of A.
void integral_forward(const BinRows& pred, void* distance, int64_t begin, int64_t end);
// grad_distance: [rows] of A. grad_pred: [rows, bins] of pred's dtype, contiguous.
void integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t integral_forward(const BinRows& pred, void* distance, cudaStream_t stream);
cudaError_t integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
