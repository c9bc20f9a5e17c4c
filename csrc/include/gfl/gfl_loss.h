// SPDX-License-Identifier: Apache-2.0
// The whole loss of a GFL head over all levels and images                                    (arXiv 2006.04388, eq. 8)
//
//   Σ QFL over all locations but those labelled −2      Σ w·(1 − GIoU) and Σ w·¼ Σ DFL over the positives
// Boxes are in units of the stride; QFL aims at the IoU of the decoded box; w is the largest class probability.
#pragma once
#include <vector>

#include "gfl/types.h"

namespace gfl {

// One level's maps, read in place in any layout. Strides are in elements, of image, channel, row and column.
struct HeadLevel {
  const void* cls;  // [images, classes, height, width] cls_dtype: logits
  const void* reg;  // [images, 4(R+1), height, width] reg_dtype: logits, sides l, t, r, b, bins innermost
  int64_t height, width;
  int64_t cls_stride[4], reg_stride[4];
  double stride;    // pixels a cell
  double offset;    // of a cell's centre, in cells
};

// `A` below is double where the maps are f64 (then both are), else float.
struct GflLossInput {
  const HeadLevel* levels;
  int64_t level_count;
  DType cls_dtype, reg_dtype;
  int64_t images, classes, reg_max;
  int64_t locations;        // cells of all levels
  const int64_t* labels;    // [images, locations]: a class, −2 for "not counted", else background
  const int64_t* matched;   // [images, locations]: slot of the ground-truth box
  const void* gt_boxes;     // [images, gts, 4] of A: xyxy in pixels
  int64_t gts;
  double beta;
  bool legacy;              // centres (stride − 1)/2 pixels further, +1 on widths and heights
};

// A location with a class and a box.
struct HeadPositive {
  int64_t image, level, row, column;
  int64_t location;  // image · locations + its place in `labels`
  int64_t label, slot;
};

// What a positive adds, before any weight: the IoU it aims at, 1 − GIoU, a quarter of its four DFLs, w.
struct HeadTerms { double score, box, dfl, weight; };

// A piece of the walk over the logits: columns of one level of one image, by row-major index.
struct HeadBlock { int64_t image, level, begin, end; };

// What the gradients are multiplied with: gradient of the loss · its weight / its norm.
struct HeadScales { double cls, box, dfl; };

// Where gradients go: maps of the levels' shapes and dtypes, in any layout. Null where none is wanted.
struct HeadGradients {
  void* cls;
  void* reg;
  int64_t cls_stride[4], reg_stride[4];
};

namespace cpu {

// In order of image, then location.
std::vector<HeadPositive> gfl_loss_positives(const GflLossInput& in);
// Pieces whose bounds depend on nothing but the shapes; a sum in their order is the same at any number of threads.
std::vector<HeadBlock> gfl_loss_blocks(const GflLossInput& in);

// Terms of the positives [begin, end).
void gfl_loss_terms(const GflLossInput& in, const HeadPositive* positives, HeadTerms* terms, int64_t begin,
                    int64_t end);

// Of the blocks [begin, end): Σ QFL of each to sums[block], and the gradients of the class maps, of which every element
// is written; either may be null. `positives` and `terms` are all of them, in order; `gradients` has an entry a level.
void gfl_loss_scores(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                     const HeadBlock* blocks, double* sums, double scale, const HeadGradients* gradients, int64_t begin,
                     int64_t end);

// Gradients of the distribution maps at the positives [begin, end). Elsewhere they are 0, which the caller sees to.
void gfl_loss_terms_backward(const GflLossInput& in, const HeadPositive* positives, const HeadTerms* terms,
                             const HeadScales& scales, const HeadGradients* gradients, int64_t begin, int64_t end);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
// Single numbers of A on the device, but for the weights of the losses.
struct GflLossScalars {
  double loss_weights[3];
  const void* cls_norm;  // null: Σ max(positives of an image, 1)
  const void* box_norm;  // null: max(Σ w, 1)
};
struct GflLossOutput { void *cls, *box, *dfl, *num_pos, *box_weight; };
struct GflLossGrads { const void *cls, *box, *dfl; };  // null: 1

namespace cuda {
constexpr int kGflLossMaxLevels = 16;
// Whether the kernels can: up to kGflLossMaxLevels levels, and sizes whose tiles and locations 32 bits count.
bool gfl_loss_fits(const GflLossInput& in);
// Memory that both directions need for the time of the call; what is in it does not matter.
size_t gfl_loss_workspace_bytes(const GflLossInput& in);
// Two launches. cudaErrorInvalidValue where `gfl_loss_fits` says no.
cudaError_t gfl_loss_forward(const GflLossInput& in, const GflLossScalars& scalars, void* workspace,
                             const GflLossOutput& out, cudaStream_t stream);
// Losses and the gradients of their sum in four launches, three with both norms given. `scales`: on the device; what the
// gradients were multiplied with, for `gfl_loss_finish`. Every element of the gradients that are wanted is written.
cudaError_t gfl_loss_forward_and_gradient(const GflLossInput& in, const GflLossScalars& scalars, void* workspace,
                                          const GflLossOutput& out, HeadScales* scales,
                                          const HeadGradients* gradients, cudaStream_t stream);
// One launch. The gradients that the above has written become those for `grads`; where they are all 1, which the device
// finds out, nothing is touched.
cudaError_t gfl_loss_finish(const GflLossInput& in, const HeadScales* scales, const GflLossGrads& grads,
                            const HeadGradients* gradients, cudaStream_t stream);
// The gradients alone: three launches, two with both norms given. `scales`: memory on the device for the time of the call.
cudaError_t gfl_loss_backward(const GflLossInput& in, const GflLossScalars& scalars, const GflLossGrads& grads,
                              void* workspace, HeadScales* scales, const HeadGradients* gradients,
                              cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
