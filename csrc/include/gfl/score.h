// SPDX-License-Identifier: Apache-2.0
// Losses of class scores: one input and three outputs, for every loss of csrc/terms/score.h, which has their formulas.
//
//   rows       loss[n]   = Σ_c term(x[n, c], t[n, c])                      and its gradients
//   elements   loss[i]   = term(x[i], t[i])                                and its gradients
//   reduced    loss      = factor / (norm + 1.19e-7) · Σ weight · term     with d loss/d x from the same walk
#pragma once
#include "gfl/types.h"

namespace gfl {

constexpr int kScoreParams = 3;

// `A` below is double where `dtype` is f64, else float. Strides are in elements, of image, class and location.
struct ScoreInput {
  const char* loss;  // its stem: "qfl", "focal", "vfl", …
  const void* pred;  // [images, classes, locations] dtype: logits, or probabilities if `activated`
  DType dtype;
  int64_t images, classes, locations;
  int64_t stride[3];
  const int64_t* label;  // [images, locations], null for a dense target; outside [0, classes) is background
  const void* target;    // of A: with labels [images, locations], the score at `label`, 0 elsewhere; else pred's shape
  int64_t target_stride[3];
  const void* weight;           // [images, locations] of A, or null for 1; of the reduced form alone
  double params[kScoreParams];  // those of the loss in its own order; the first is the exponent, if it has one
  bool activated;
};

// What is added to a norm, so that a batch without positives divides by it: float32's epsilon, as in mmdet.
constexpr double kScoreNormEps = 1.1920928955078125e-07;

// What the reduced form multiplies by: factor / (norm + kScoreNormEps). `norm`: one number of A where the kernel runs,
// or null for 1 without an epsilon.
struct ScoreScale {
  double factor;
  const void* norm;
};

// How many parameters the loss takes; −1 if there is none of that name.
int score_param_count(const char* loss);

namespace cpu {
// Rows [begin, end) of one image, target and results dense with the classes innermost. grad_loss: [rows] of A. loss:
// [rows] of A. grad_pred: [rows, classes] dtype. grad_target: shaped as `target`. With a `loss` only that is computed,
// else the gradients, either of which may be null.
void score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred, void* grad_target,
                int64_t begin, int64_t end);
// Elements [begin, end) of dense arrays: one image, one class, as many locations. grad_loss: of A, element i at
// i · grad_stride, so that 0 broadcasts one gradient. loss and grad_target: of A; grad_pred: dtype.
void score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss, void* grad_pred,
                    void* grad_target, int64_t begin, int64_t end);
// Rows as for score_rows. Returns Σ weight · loss, and writes its gradient, scaled, times *grad_loss, if that is not
// null. grad: [rows, classes] dtype, or null.
double score_reduced(const ScoreInput& in, const ScoreScale& scale, const void* grad_loss, void* grad, int64_t begin,
                     int64_t end);
// loss = scale · Σ sums, one number of A.
void score_reduced_sum(const ScoreInput& in, const ScoreScale& scale, const double* sums, int64_t count, void* loss);
// Whether a stored gradient is already the one that *grad_loss asks for.
bool score_gradient_stands(const ScoreInput& in, const void* grad_loss);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
// As on the CPU, all rows or elements at once.
cudaError_t score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred, void* grad_target,
                       cudaStream_t stream);
cudaError_t score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss,
                           void* grad_pred, void* grad_target, cudaStream_t stream);

// Whether the reduced form can: its tiles and their offsets are counted in 32 bits.
bool score_reduced_fits(const ScoreInput& in);
// Doubles that its forward call needs while it runs, uninitialised.
int64_t score_reduced_workspace(const ScoreInput& in);
// Two launches. loss: one number of A. grad: d loss/d pred, [images, classes, locations] dtype in strides of its own;
// or null.
cudaError_t score_reduced_forward(const ScoreInput& in, const ScoreScale& scale, double* workspace, void* loss,
                                  void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream);
// One launch. grad becomes *grad_loss · d loss/d pred. With `grad_stored` it holds d loss/d pred, and the kernel
// returns at once if *grad_loss, which the host does not read, is 1.
cudaError_t score_reduced_backward(const ScoreInput& in, const ScoreScale& scale, const void* grad_loss,
                                   bool grad_stored, void* grad, const int64_t (&grad_stride)[3], cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
