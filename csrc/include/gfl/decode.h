// SPDX-License-Identifier: Apache-2.0
// Boxes from distributions: at each location, the expected distance in bins to each side, in pixels from the point
// there, clipped to the image:
//
//   d[side] = scale · Σ_j softmax(pred[side])[j] · j        box = (x − d₀, y − d₁, x + d₂, y + d₃)
//
// (arXiv 2006.04388, eq. 5).
#pragma once
#include "gfl/rows.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where the dtype of `pred` is f64, else float. Tensors
// are laid over the locations of `pred` by their strides; the last dimension of points and limit is dense.
struct DecodeInput {
  BinRows pred;      // sides = 4: left, top, right, bottom
  const void* points;  // [locations, 2] of A: x, y in pixels
  const void* scale;   // [locations] of A: pixels a bin, the stride of the location's level
  const void* limit;   // [locations, 2] of A: height, width to clip to; or null: unclipped
  LocationStride stride_points, stride_scale, stride_limit;
};

namespace cpu {
// Locations [begin, end). boxes: [locations, 4] of A, contiguous.
void decode_forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end);
// grad_boxes: [locations, 4] of A. grad_pred: [locations, 4, bins] of pred's dtype, contiguous, or null. grad_points:
// [locations, 2] of A, contiguous, or null.
void decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
                     int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t decode_forward(const DecodeInput& in, void* boxes, cudaStream_t stream);
cudaError_t decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points,
                            cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
