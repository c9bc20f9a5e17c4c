// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss, optionally with the expected distance from the same softmax:
//
//   loss[m] = −wₗ log p[l] − wᵣ log p[r],  distance[m] = Σ_j p[j]·j,  p = softmax(pred[m])
//
// (arXiv 2006.04388, eq. 6 and 5).
//
// Either `target` gives a position y in bins: l = trunc(y), r = l+1, wₗ = r−y, wᵣ = y−l; y is clamped to [0, R] first,
// and a NaN (with `ignore_out_of_range`, anything outside [0, R]) has no loss and no gradient. Or `left` and the two
// weights are given: r = left+1, and a bin that does not exist is replaced by the nearest.
#pragma once
#include "gfl/rows.h"

namespace gfl {

// What every launcher of this operator reads. `A` below is double where the dtype of `pred` is f64, else float.
struct DflInput {
  BinRows pred;               // sides = 1
  const void* target;         // [rows] of A, or null
  bool ignore_out_of_range;   // with `target`
  const int64_t* left;        // [rows], without `target`
  const void* weight_left;    // [rows] of A, without `target`
  const void* weight_right;   // [rows] of A, without `target`
};

// What a backward launcher writes; null where not wanted.
struct DflGradients {
  void* pred;          // [rows, bins] of pred's dtype, contiguous
  void* target;        // [rows] of A
  void* weight_left;   // [rows] of A
  void* weight_right;  // [rows] of A
};

// What an fp32 forward pass keeps, so that backward needs neither maxima nor exponentials again.
struct DflKept {
  float* exponentials;  // [rows, bins]; how they lie is the kernels' own affair
  float* sums;          // [2, rows]
  int64_t rows;
};

namespace cpu {
// Rows [begin, end). loss, distance: [rows] of A; distance may be null.
void dfl_forward(const DflInput& in, void* loss, void* distance, int64_t begin, int64_t end);
// grad_loss, grad_distance: [rows] of A; grad_distance may be null.
void dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end);

// The same of fp32 logits, with what `settle` needs. Keeping and settling have to go through the same chunks.
void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end);
// Puts the gradient of `pred`, contiguous, into the place of the exponentials; bit for bit what backward gives.
void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflKept& kept,
                int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
cudaError_t dfl_forward(const DflInput& in, void* loss, void* distance, cudaStream_t stream);
cudaError_t dfl_backward(const DflInput& in, const void* grad_loss, const void* grad_distance, const DflGradients& out,
                         cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
