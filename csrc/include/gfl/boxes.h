// SPDX-License-Identifier: Apache-2.0
// Between boxes and the distances from a point to their sides; the arithmetic is in common/distance.h.
//
//   distance_to_box   box = (x − l, y − t, x + r, y + b), clipped to [0, width] × [0, height] where a limit is given
//   box_to_distance   (l, t, r, b) = (x − x₁, y − y₁, x₂ − x, y₂ − y), clamped to [0, upper] where asked for
#pragma once
#include "gfl/rows.h"

namespace gfl {

// Tensors of one dtype, f32 or f64 (`A` below), laid over count_outer · count_inner locations by their strides; the
// last dimension of each is dense.
struct DistanceToBoxInput {
  DType dtype;
  int64_t count_outer, count_inner;
  const void* points;    // [locations, 2]: x, y
  const void* distance;  // [locations, 4]: left, top, right, bottom
  const void* limit;     // [locations, 2]: height, width; or null: unclipped
  LocationStride stride_points, stride_distance, stride_limit;
};

struct BoxToDistanceInput {
  DType dtype;
  int64_t count_outer, count_inner;
  const void* points;  // [locations, 2]: x, y
  const void* boxes;   // [locations, 4]: x₁, y₁, x₂, y₂
  LocationStride stride_points, stride_boxes;
  bool clamped;
  double upper;        // with `clamped`
};

namespace cpu {
// Locations [begin, end). Results and gradients are contiguous [locations, 4] or [locations, 2] of A; a gradient that
// is not wanted is null.
void distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, int64_t begin, int64_t end);
void distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                              void* grad_distance, int64_t begin, int64_t end);
void box_to_distance_forward(const BoxToDistanceInput& in, void* distance, int64_t begin, int64_t end);
void box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                              void* grad_boxes, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, cudaStream_t stream);
cudaError_t distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                                     void* grad_distance, cudaStream_t stream);
cudaError_t box_to_distance_forward(const BoxToDistanceInput& in, void* distance, cudaStream_t stream);
cudaError_t box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                                     void* grad_boxes, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
