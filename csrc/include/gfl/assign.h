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
  const float* points;  // [locations, 2] (x, y), or null
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

}  // namespace gfl
