// SPDX-License-Identifier: Apache-2.0
// Soft-NMS (arXiv 1704.04503): the best box left is taken, and the scores of the others of its class are multiplied by
//   linear:   1 − IoU where IoU ≥ threshold, else 1        gaussian:  exp(−IoU² / sigma)
// until none is left whose score is at least `min_score`. A NaN IoU leaves a score as it is.
#pragma once
#include "gfl/types.h"

namespace gfl {

// `A` below is double where `dtype` is f64, else float: the type of IoUs and scores. exp is in double for either, and
// its result rounded to A, so that all backends take the same boxes.
struct SoftNmsInput {
  const void* boxes;  // [count, 4] dtype, xyxy
  DType dtype;
  int64_t stride_box, stride_coordinate;
  const void* scores;  // [count] score_dtype, any stride; read as A
  DType score_dtype;
  int64_t stride_score;
  int64_t count;
  double iou_threshold, sigma, min_score;
  bool gaussian;
};

namespace cpu {

// Classes [begin, end) of `grouped`, each in the order of the boxes' indices; as cpu::group_by_class of gfl/nms.h makes
// it of 0, 1, 2, …. keep: [count] by index, 1 or 0. final_scores: [count] of A by index, written where kept.
void soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* bounds, void* final_scores, uint8_t* keep,
              int64_t begin, int64_t end);

// The kept boxes by falling final score, equal ones by lower index. If there is none, the box of the greatest score is
// taken, so that of a nonempty input one is always kept. indices, scores: room for max(kept, 1). Returns how many there
// are.
int64_t soft_nms_collect(const SoftNmsInput& in, const void* final_scores, const uint8_t* keep, int64_t* indices,
                         float* scores);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {

size_t soft_nms_workspace_bytes(int64_t count, DType dtype);

// grouped: [count] indices of the boxes, class by class, rising within a class. labels: [count] the classes in that
// order, or null for one class. keep and final_scores as above. workspace: soft_nms_workspace_bytes, aligned to 16. Never
// waits for the device.
cudaError_t soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* labels, void* workspace,
                     void* final_scores, uint8_t* keep, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace gfl
