// SPDX-License-Identifier: Apache-2.0
// Boxes xyxy: from a point's distances to the four sides and back, and losses of the overlap of aligned boxes.
//
//   distance_to_box   box = (x − l, y − t, x + r, y + b), clipped to [0, width] × [0, height] where a limit is given
//   box_to_distance   (l, t, r, b) = (x − x₁, y − y₁, x₂ − x, y₂ − y), clamped to [0, upper] where asked for
//   iou               loss[n] of pred[n] against target[n], by the kind's formula in csrc/terms/iou.h
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
  double upper;  // with `clamped`
};

// `A` below is double where `dtype` is f64, else float.
struct IouInput {
  const void* pred;  // [rows, 4] dtype
  DType dtype;
  int64_t stride_row, stride_side;
  const void* target;  // [rows, 4] of A, contiguous
  int64_t rows;
  const char* kind;  // a name that `is_iou_kind` knows
  double eps;
  double parameter;  // the kind's own number, where it has one
};

bool is_iou_kind(const char* name);

namespace cpu {
// Locations [begin, end). Results and gradients are contiguous [locations, 4] or [locations, 2] of A; a gradient that
// is not wanted is null.
void distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, int64_t begin, int64_t end);
void distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                              void* grad_distance, int64_t begin, int64_t end);
void box_to_distance_forward(const BoxToDistanceInput& in, void* distance, int64_t begin, int64_t end);
void box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                              void* grad_boxes, int64_t begin, int64_t end);

// Rows [begin, end). loss, grad_loss: [rows] of A. grad_pred: [rows, 4] dtype, contiguous, or null. grad_target:
// [rows, 4] of A, or null.
void iou_forward(const IouInput& in, void* loss, int64_t begin, int64_t end);
void iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, cudaStream_t stream);
cudaError_t distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                                     void* grad_distance, cudaStream_t stream);
cudaError_t box_to_distance_forward(const BoxToDistanceInput& in, void* distance, cudaStream_t stream);
cudaError_t box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                                     void* grad_boxes, cudaStream_t stream);
cudaError_t iou_forward(const IouInput& in, void* loss, cudaStream_t stream);
cudaError_t iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
