// SPDX-License-Identifier: Apache-2.0
// What a detector's head needs in training besides its convolutions: the assignment of ground-truth boxes to locations,
// the losses over all levels and images, and group normalization with ReLU.
#pragma once
#include "gfl/parallel.h"
#include "gfl/types.h"

namespace gfl {

// ---- adaptive training sample selection: which box each location learns (arXiv 1912.02424, algorithm 1) ----

// One level of the pyramid: a grid of square priors, centred at (x + offset)·stride + shift pixels.
struct AtssLevel {
  int64_t height, width;
  float stride;
  float offset;  // in cells
  float shift;   // in pixels: 0, or (stride − 1)/2 for the legacy geometry
  float half;    // from the centre to a side of the prior: size/2, or (size − 1)/2 for the legacy geometry
};

// A level of priors whose side is `anchor_scale` strides. `legacy` is GFocal v1's geometry.
AtssLevel atss_level(int64_t height, int64_t width, double stride, double offset, double anchor_scale, bool legacy);

struct AtssInput {
  const AtssLevel* levels;
  int64_t level_count;
  int64_t locations;         // of all levels
  const float* gt_boxes;     // [images, gts, 4] xyxy
  const int64_t* gt_labels;  // [images, gts]; negative: no box
  const float* valid_sizes;  // [images, 2] (h, w) in pixels, or null: every cell is valid
  int64_t images, gts;
  int64_t topk;
  bool legacy;  // widths count both ends: +1
};

namespace cpu {
// Images [begin, end). labels, matched: [images, locations] int64; iou: [images, locations] float.
void atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kAtssMaxLevels = 16;
// Whether the kernels support the input: kAtssMaxLevels levels, 6143 candidates per box, 2^31 locations per image.
bool atss_fits(const AtssInput& in);
// The whole batch in three graph nodes. cudaErrorInvalidValue if `atss_fits` is false.
cudaError_t atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, cudaStream_t stream);
}  // namespace cuda
#endif

// ---- the loss of a GFL head over all levels and images (arXiv 2006.04388, eq. 8) ----
//
//   cls = w₀/cls_norm · Σ QFL over all locations but those labelled −2
//   box = w₁/box_norm · Σ w·(1 − GIoU) over the positives        dfl = w₂/box_norm · Σ w·¼ Σ DFL over the positives
// Boxes are in units of the stride; the target of QFL is the IoU of the decoded box; w is the largest class
// probability.
//
// That of a YOLO head (v8 to 26) is walked alike. With BCE for QFL, CIoU for GIoU, and for w and the class's target the
// score that an assigner gave, both norms are max(Σ w, 1) unless they are given. Without bins (reg_max 0) the maps hold
// the distances, and the third loss is their L1 error in widths and heights of the image.
// That of an RTMDet head has QFL and GIoU with an assigner's score in the same places, of distances in pixels, and
// no third loss.
enum class HeadLossKind : int32_t { gfl = 0, yolo = 1, rtmdet = 2 };

// One level's maps, read in place in any layout. Strides are in elements, of image, channel, row and column.
struct HeadLevel {
  const void* cls;  // [images, classes, height, width] cls_dtype: logits
  const void* reg;  // [images, 4(R+1), height, width] reg_dtype: logits, sides l, t, r, b, bins innermost
  int64_t height, width;
  int64_t cls_stride[4], reg_stride[4];
  double stride;  // pixels per cell
  double offset;  // of a cell's centre, in cells
};

// `A` below is double if the maps are f64 (then both kinds are), else float.
struct HeadLossInput {
  const HeadLevel* levels;
  int64_t level_count;
  DType cls_dtype, reg_dtype;
  int64_t images, classes, reg_max;
  int64_t locations;       // of all levels
  const int64_t* labels;   // [images, locations]: a class, −2 for "not counted", else background
  const int64_t* matched;  // [images, locations]: slot of the ground-truth box
  const void* gt_boxes;    // [images, gts, 4] of A: xyxy in pixels
  int64_t gts;
  double beta;
  bool legacy;  // centres (stride − 1)/2 pixels further, +1 on widths and heights
  HeadLossKind kind;
  // of YOLO and RTMDet heads
  const void* scores;                // [images, locations] of A: what the class of a positive learns
  double image_height, image_width;  // in pixels, where there are no bins
};

// Norms, losses and the gradients that arrive are single numbers of A where the maps are.
struct HeadLossScalars {
  double loss_weights[3];
  const void* cls_norm;  // null: Σ max(positives of an image, 1), with `scores` max(Σ w, 1)
  const void* box_norm;  // null: max(Σ w, 1)
};
struct HeadLossOutput { void *cls, *box, *dfl, *num_pos, *box_weight; };
struct HeadLossGrads { const void *cls, *box, *dfl; };  // null: 1
// The sums that the losses are divided by: Σ max(positives of an image, 1) and Σ w.
struct HeadNorms { void *cls, *box; };

// The factors of the gradients: gradient of each loss · its weight / its norm.
struct HeadScales { double cls, box, dfl; };

// Where a level's gradients go: maps of its shapes and dtypes, in any layout. Null for one that is not wanted.
struct HeadGradients {
  void* cls;
  void* reg;
  int64_t cls_stride[4], reg_stride[4];
};

// The launchers of both devices write every element of the gradients that are wanted.
namespace cpu {
void gfl_loss_forward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossOutput& out,
                      const ParallelFor& parallel);
// Losses and the gradients of their sum from one pass over the logits. `scales` gets the factors of the gradients.
void gfl_loss_forward_and_gradient(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossOutput& out,
                                   HeadScales* scales, const HeadGradients* gradients, const ParallelFor& parallel);
// Rescales the gradients that the above has written by `grads`. Returns at once if these are all 1, else computes anew.
void gfl_loss_finish(const HeadLossInput& in, const HeadScales* scales, const HeadLossGrads& grads,
                     const HeadGradients* gradients, const ParallelFor& parallel);
void gfl_loss_backward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossGrads& grads,
                       const HeadGradients* gradients, const ParallelFor& parallel);
// The norms alone, from the labels and the class logits of the positives; `reg`, `reg_max` and `gt_boxes` are not read.
void head_loss_norms(const HeadLossInput& in, const HeadNorms& norms, const ParallelFor& parallel);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kHeadLossMaxLevels = 16;
// Whether the kernels support the input: kHeadLossMaxLevels levels, and fewer than 2^31 tiles and locations.
bool gfl_loss_fits(const HeadLossInput& in);
// Scratch memory for the duration of a call, in any state.
size_t gfl_loss_workspace_bytes(const HeadLossInput& in);
// Two launches. This and the others return cudaErrorInvalidValue if `gfl_loss_fits` is false.
cudaError_t gfl_loss_forward(const HeadLossInput& in, const HeadLossScalars& scalars, void* workspace,
                             const HeadLossOutput& out, cudaStream_t stream);
// Four launches, three with both norms given. `scales` is on the device.
cudaError_t gfl_loss_forward_and_gradient(const HeadLossInput& in, const HeadLossScalars& scalars, void* workspace,
                                          const HeadLossOutput& out, HeadScales* scales, const HeadGradients* gradients,
                                          cudaStream_t stream);
// One launch. The device decides whether `grads` are all 1.
cudaError_t gfl_loss_finish(const HeadLossInput& in, const HeadScales* scales, const HeadLossGrads& grads,
                            const HeadGradients* gradients, cudaStream_t stream);
// Three launches, two with both norms given. `scales`: scratch memory on the device.
cudaError_t gfl_loss_backward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossGrads& grads,
                              void* workspace, HeadScales* scales, const HeadGradients* gradients, cudaStream_t stream);
// As `gfl_loss_fits`, for any number of boxes.
bool head_loss_norms_fits(const HeadLossInput& in);
// Two launches. cudaErrorInvalidValue if `head_loss_norms_fits` is false.
cudaError_t head_loss_norms(const HeadLossInput& in, void* workspace, const HeadNorms& norms, cudaStream_t stream);
}  // namespace cuda
#endif

// ---- group normalization and ReLU over all levels of a pyramid (arXiv 1803.08494, eq. 1) ----
//
//   y = max(0, γ[c]·(x − μ)·r + β[c]),   r = 1/√(σ² + eps),   μ and σ² of a group of channels of one level and image
// Backward, with g = grad_y where y > 0 and else 0, x̂ = (x − μ)·r, means over the group:
//   grad_x = r·(γ[c]·g − mean(γ·g) − x̂·mean(γ·g·x̂)),   grad_γ[c] = Σ g·x̂,   grad_β[c] = Σ g

// A level's map [images, channels, locations] in memory; strides in elements. In all maps of a level either locations
// are contiguous (stride_location 1: `planar`) or channels are (stride_channel 1).
struct NormMap {
  void* data;  // the launchers write to results only
  int64_t stride_image, stride_channel, stride_location;
};

struct NormLevel {
  NormMap x;
  int64_t locations;
  bool planar;
};

// `A` below is double if the maps are f64, else float.
struct GroupNormInput {
  const NormLevel* levels;
  int64_t level_count;
  DType dtype;  // of every map
  int64_t images, channels, groups;
  const void* weight;     // [channels] γ
  const void* bias;       // [channels] β
  DType parameter_dtype;  // f64 only if the maps are
  double eps;
  bool relu;

  constexpr int64_t group_channels() const { return channels / groups; }  // constexpr: device code may call it
};

// `statistics` is [levels, images, groups, 2] of A: μ and r. Backward, a null result is not computed.
namespace cpu {
void group_norm_relu_forward(const GroupNormInput& in, const NormMap* y, void* statistics, const ParallelFor& parallel);
void group_norm_relu_backward(const GroupNormInput& in, const void* statistics, const NormMap* grad_y,
                              const NormMap* grad_x, void* grad_weight, void* grad_bias, const ParallelFor& parallel);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kGroupNormReluMaxLevels = 16;
constexpr int64_t kGroupNormReluMaxGroupChannels = 1024;
// Whether the kernels support the input: so many levels and channels per group, and fewer than 2^31 blocks.
bool group_norm_relu_fits(const GroupNormInput& in);
// Scratch memory for the duration of a call, in any state.
size_t group_norm_relu_workspace_bytes(const GroupNormInput& in, bool backward);
// Two launches each. cudaErrorInvalidValue if `group_norm_relu_fits` is false.
cudaError_t group_norm_relu_forward(const GroupNormInput& in, void* workspace, const NormMap* y, void* statistics,
                                    cudaStream_t stream);
cudaError_t group_norm_relu_backward(const GroupNormInput& in, const void* statistics, void* workspace,
                                     const NormMap* grad_y, const NormMap* grad_x, void* grad_weight, void* grad_bias,
                                     cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
