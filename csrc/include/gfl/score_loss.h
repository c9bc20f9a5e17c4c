// SPDX-License-Identifier: Apache-2.0
// A loss of class scores down to one number, with its gradient from the same walk over the scores:
//
//   loss = factor / (norm + 1.19e-7) · Σ weight · term(x, t)          gradient = d loss / d x, times that of the loss
// term is that of quality focal (arXiv 2006.04388, eq. 2), focal (1708.02002, eq. 5) or varifocal loss (2008.13367, eq. 2).
#pragma once
#include "gfl/types.h"

namespace gfl {

enum class ScoreLoss : int32_t { quality = 0, focal = 1, varifocal = 2, varifocal_unweighted = 3 };

// `A` below is double where `dtype` is f64, else float. Strides are in elements, of image, class and location.
struct ScoreLossInput {
  const void* pred;      // [images, classes, locations] dtype: logits, or probabilities if `activated`
  DType dtype;
  int64_t images, classes, locations;
  int64_t stride[3];
  const int64_t* label;  // [images, locations], or null; of the quality focal loss alone
  const void* target;    // [images, locations] of A: the score at `label`, 0 elsewhere; without labels pred's shape, of A
  int64_t target_stride[3];
  const void* weight;    // [images, locations] of A, or null for 1
  ScoreLoss kind;
  double alpha;          // of focal and varifocal loss
  double exponent;       // β or γ
  bool activated;
};

// What is added to a norm, so that a batch without positives divides by it: float32's epsilon, as in mmdet.
constexpr double kScoreNormEps = 1.1920928955078125e-07;

namespace cpu {
// Rows [begin, end) of one image with classes innermost: stride {·, 1 or any, any}, target and gradient dense.
// Returns Σ weight · loss. grad: [locations, classes] dtype, `scale` times the derivative of that; or null.
double score_loss(const ScoreLossInput& in, double scale, void* grad, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
// `norm`: one number of A on the device, or null for 1 without an epsilon.
struct ScoreLossScale { double factor; const void* norm; };

namespace cuda {
// Whether the kernels can: tiles and their offsets are counted in 32 bits.
bool score_loss_fits(const ScoreLossInput& in);
// Doubles that the forward call needs for its time; what is in them does not matter.
int64_t score_loss_workspace(const ScoreLossInput& in);
// Two launches. loss: one number of A. grad: d loss/d pred, [images, classes, locations] dtype in strides of its own; or null.
cudaError_t score_loss_forward(const ScoreLossInput& in, const ScoreLossScale& by, double* workspace, void* loss,
                               void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream);
// One launch. grad becomes *grad_loss · d loss/d pred. With `grad_stored` it holds d loss/d pred, and the kernel leaves at
// once where *grad_loss, which the host does not read, is 1.
cudaError_t score_loss_backward(const ScoreLossInput& in, const ScoreLossScale& by, const void* grad_loss,
                                bool grad_stored, void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
