// SPDX-License-Identifier: Apache-2.0
// Assignment by predictions: which box each location learns, decided by the scores and boxes that were predicted there.
// No launcher has memory for pairs of a box and a location: O(locations + boxes · k).
#pragma once
#include <cstddef>

#include "gfl/types.h"

namespace gfl {

// One level of a pyramid: locations at ((x + offset)·stride, (y + offset)·stride), row by row.
struct GridLevel {
  int64_t height, width;
  float stride;
  float offset;  // in cells
};

// What every assignment reads.
struct AssignInput {
  const GridLevel* levels;  // null: `points`
  int64_t level_count;
  const float* points;  // [locations, 2] (x, y) or, for dynamic k, [locations, 4] (x, y, stride_x, stride_y); or null
  int64_t locations;
  const void* scores;  // [images, locations, classes] score_dtype
  DType score_dtype;
  int64_t score_stride[3];
  const float* boxes;        // [images, locations, 4] xyxy
  const float* gt_boxes;     // [images, gts, 4] xyxy
  const int64_t* gt_labels;  // [images, gts]; outside [0, classes): no box
  int64_t images, gts, classes;
  int64_t topk;
};

struct AssignOutput {
  int64_t *labels, *matched;  // [images, locations]: −1 where nothing is assigned
  float* scores;              // [images, locations]: what the location is to learn, else 0
};

// ---- task-aligned assignment (arXiv 2108.07755) ----
//
//   metric = score[class of the box]^alpha · overlap^beta
// A box selects its `topk` best candidates, ties by the lower index. A location that several select goes to one by
// overlap; of what a box has then it may keep the `topk2` best. A positive's score is its metric · the largest overlap
// / (the largest metric + eps) of its box.

enum class TaskAlignedVariant : int32_t {
  ultralytics =
      0,       // candidates lie inside; a conflict goes to the largest overlap of all boxes that contain the location
  yolov6 = 1,  // candidates lie inside; a conflict goes to the largest overlap of all boxes
  mmdet = 2,   // every location is ranked, those outside drop out; a conflict goes among those that select it; the
               // score is the metric itself
};

enum class TaskAlignedOverlap : int32_t {
  ciou = 0,         // max(CIoU, 0)
  clipped_iou = 1,  // I / (union + 1e-9), sides at least 0
  iou = 2,          // I / max(union, 1e-6)
};

struct TaskAlignedInput : AssignInput {
  int64_t topk2;
  double alpha, beta;  // >= 0, > 0
  float min_side;      // shorter sides count as this long where candidates are found; 0: boxes as they are
  float eps;
  TaskAlignedVariant variant;
  TaskAlignedOverlap overlap;
  bool logits;  // `scores` are; else probabilities
};

namespace cpu {
// Images [begin, end).
void task_aligned(const TaskAlignedInput& in, const AssignOutput& out, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kTaskAlignedMaxLevels = 16;
constexpr int64_t kTaskAlignedMaxTopk = 1024;
// Whether the kernels support the input: so many levels and candidates, fewer than 2^31 locations, boxes and blocks.
bool task_aligned_fits(const TaskAlignedInput& in);
// Scratch memory for the duration of a call, in any state, aligned to 8.
size_t task_aligned_workspace_bytes(const TaskAlignedInput& in);
// Six graph nodes, seven if topk2 differs from topk. cudaErrorInvalidValue if `task_aligned_fits` is false.
cudaError_t task_aligned(const TaskAlignedInput& in, const AssignOutput& out, void* workspace, cudaStream_t stream);
}  // namespace cuda
#endif

// ---- assignment with a dynamic k: soft labels of RTMDet and NanoDet-Plus, SimOTA of YOLOX (arXiv 2103.14259) ----
//
//   cost = class cost · cls_weight − log(IoU + 1e-7) · iou_weight + penalty
// over pairs of a box and a location that lies inside any box of the image. A box selects the k locations of the least
// cost, ties by the lower index; k is the sum of the `topk` largest overlaps of predictions with it, cut to an integer,
// at least 1. A location that several select goes to the box of the least cost of all boxes, ties by the lower slot.
// The score of a positive is its IoU.

enum class DynamicKCost : int32_t {
  mmdet = 0,    // soft labels over all classes; the penalty is 10^(distance from the box's centre in strides − radius)
  mmyolo = 1,   // the box's class only; every location may be selected, those outside all boxes at a cost of 10^8
  nanodet = 2,  // probabilities, over all classes; no penalty
  simota = 3,   // probabilities, hard labels over all classes; within `center_radius` strides of a box's centre counts
                // as inside; the penalty is 10^5 for what is not both inside and near the centre
};

struct DynamicKInput : AssignInput {
  float iou_weight, cls_weight;  // >= 0
  float center_radius;           // in strides
  DynamicKCost cost;
};

namespace cpu {
// Images [begin, end).
void dynamic_k(const DynamicKInput& in, const AssignOutput& out, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kDynamicKMaxLevels = 16;
constexpr int64_t kDynamicKMaxTopk = 512;
// Whether the kernels support the input: so many levels and candidates, fewer than 2^31 locations and boxes.
bool dynamic_k_fits(const DynamicKInput& in);
// Up to six graph nodes. cudaErrorInvalidValue if `dynamic_k_fits` is false.
cudaError_t dynamic_k(const DynamicKInput& in, const AssignOutput& out, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
