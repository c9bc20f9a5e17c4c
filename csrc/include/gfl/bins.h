// SPDX-License-Identifier: Apache-2.0
// Operators on distributions over bins. p = softmax(pred[row]) throughout; `A` is double where the logits' dtype is
// f64, else float.
//
//   integral   distance[row] = Σ_j p[j]·j                                                   arXiv 2006.04388, eq. 5
//   decode     box = (x − s·d₀, y − s·d₁, x + s·d₂, y + s·d₃), d[side] = Σ_j p[side, j]·j, clipped to the image
//   dfl        loss[row] = −wₗ log p[l] − wᵣ log p[r], optionally with Σ_j p[j]·j              arXiv 2006.04388, eq. 6
//   ld         loss[row] = T²/n Σ_j q[j]·(log q[j] − log p[j]), p and q the softmax of pred / T and teacher / T, of the
//              sides of a box (arXiv 2102.12252) or of classes (1503.02531)
//
// A logit counts at most as a quarter of A's range (ld: times min(T, 1)): no difference of two overflows, so an
// infinite logit makes no NaN. Beyond that its gradient is 0. A NaN spreads over its row.
#pragma once
#include "gfl/rows.h"

namespace gfl {

// Tensors are laid over the locations of `pred` by their strides; the last dimension of points and limit is dense.
struct DecodeInput {
  BinRows pred;        // sides = 4: left, top, right, bottom
  const void* points;  // [locations, 2] of A: x, y in pixels
  const void* scale;   // [locations] of A: pixels per bin, the stride of the location's level
  const void* limit;   // [locations, 2] of A: height, width to clip to; or null: unclipped
  LocationStride stride_points, stride_scale, stride_limit;
};

// Either `target` gives a position y in bins: l = trunc(y), r = l+1, wₗ = r−y, wᵣ = y−l; y is clamped to [0, R] first,
// and a NaN (with `ignore_out_of_range`, anything outside [0, R]) has no loss and no gradient. Or `left` and the two
// weights are given: r = left+1, and a bin that does not exist is replaced by the nearest.
struct DflInput {
  BinRows pred;              // sides = 1
  const void* target;        // [rows] of A, or null
  bool ignore_out_of_range;  // with `target`
  const int64_t* left;       // [rows], without `target`
  const void* weight_left;   // [rows] of A, without `target`
  const void* weight_right;  // [rows] of A, without `target`
};

// What a backward launcher of dfl writes; null where not wanted.
struct DflGradients {
  void* pred;          // [rows, bins] of pred's dtype, contiguous
  void* target;        // [rows] of A
  void* weight_left;   // [rows] of A
  void* weight_right;  // [rows] of A
};

// What an fp32 forward pass of dfl keeps, so that backward needs neither maxima nor exponentials again.
struct DflKept {
  float* exponentials;  // [rows, bins], in an order that only the kernels know
  float* sums;          // [2, rows]
  int64_t rows;
};

// How the losses of rows become one number, where they do: factor · Σ weight[m]·loss[m] / (norm + ε), the ε of a mean.
struct DflReduction {
  const float* weight;  // [rows], or null: all 1
  const float* norm;    // one number, or null: no quotient
  double factor;
};

// The teacher has no gradient.
struct LdInput {
  const void* pred;     // [rows, bins] dtype: the student's logits
  const void* teacher;  // [rows, bins] dtype: the teacher's
  DType dtype;
  int64_t rows, bins;                                                                // bins ≥ 1
  int64_t pred_stride_row, pred_stride_bin, teacher_stride_row, teacher_stride_bin;  // in elements
  double temperature;                                                                // > 0
};

// Rows [begin, end); of decode, locations.
namespace cpu {
// distance, grad_distance: [rows] of A. grad_pred: [rows, bins] of pred's dtype, contiguous.
void integral_forward(const BinRows& pred, void* distance, int64_t begin, int64_t end);
void integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, int64_t begin, int64_t end);

// boxes, grad_boxes: [locations, 4] of A, contiguous. grad_pred: [locations, 4, bins] of pred's dtype, contiguous, or
// null. grad_points: [locations, 2] of A, contiguous, or null.
void decode_forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end);
void decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
                     int64_t end);

// loss, distance and their gradients: [rows] of A; those of the distance may be null.
void dfl_forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end);
void dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end);

// The same of fp32 logits, keeping what dfl_finish needs; the two have to go through the same chunks. Without
// `reduction` loss is [rows]; with it, dfl_sum_keeping returns Σ weight·loss of the chunk, and dfl_reduce turns the
// sums of all chunks into the one loss.
void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end);
double dfl_sum_keeping(const DflInput& in, const DflReduction& reduction, float* distance, const DflKept& kept,
                       int64_t begin, int64_t end);
float dfl_reduce(const DflReduction& reduction, const double* sums, int64_t chunks);
// Turns the exponentials into the gradient of `pred`, contiguous; bit for bit what backward gives. grad_loss is one
// number with `reduction`, which may be null, else [rows].
void dfl_finish(const DflInput& in, const DflReduction* reduction, const float* grad_loss, const float* grad_distance,
                const DflKept& kept, int64_t begin, int64_t end);

// loss, grad_loss: [rows] of A. grad_pred: [rows, bins] dtype, contiguous.
void ld_forward(const LdInput& in, void* loss, int64_t begin, int64_t end);
void ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
// The same over all rows.
namespace cuda {
cudaError_t integral_forward(const BinRows& pred, void* distance, cudaStream_t stream);
cudaError_t integral_backward(const BinRows& pred, const void* grad_distance, void* grad_pred, cudaStream_t stream);
cudaError_t decode_forward(const DecodeInput& in, void* boxes, cudaStream_t stream);
cudaError_t decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points,
                            cudaStream_t stream);
cudaError_t dfl_forward(const DflInput& in, void* loss, void* distance, cudaStream_t stream);
cudaError_t dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                         cudaStream_t stream);
cudaError_t ld_forward(const LdInput& in, void* loss, cudaStream_t stream);
cudaError_t ld_backward(const LdInput& in, const void* grad_loss, void* grad_pred, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
