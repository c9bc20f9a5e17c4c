// SPDX-License-Identifier: Apache-2.0
// From boxes with a score for every class to the candidates that gfl/nms.h
// suppresses class by class: every pair of a box and a class whose score is above the threshold, in the order of box ·
// classes + class.
#pragma once
#include "gfl/types.h"

namespace gfl {

struct MulticlassInput {
  const void* boxes;  // [rows, 4] dtype, or [rows, 4·classes] if `per_class`: class c has the columns [4c, 4c + 4)
  DType dtype;
  int64_t stride_box, stride_coordinate;
  bool per_class;
  const void* scores;  // [rows, classes] score_dtype
  DType score_dtype;
  int64_t stride_row, stride_class;
  int64_t rows, classes;
  double score_threshold;  // rounded to fp32, to fp64 for fp64 scores; a NaN score is never above it
};

namespace cpu {

int64_t multiclass_count(const MulticlassInput& in);

// boxes: [count, 4] dtype. scores: [count] score_dtype. labels: [count].
void multiclass_gather(const MulticlassInput& in, void* boxes, void* scores, int64_t* labels);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {

size_t multiclass_workspace_bytes(const MulticlassInput& in);

// total: [1], the number of candidates. What it leaves in the workspace (aligned to 8) is for `multiclass_gather`.
// cudaErrorInvalidValue for 2^43 pairs or more.
cudaError_t multiclass_count(const MulticlassInput& in, void* workspace, int64_t* total, cudaStream_t stream);

// boxes: [total, 4] dtype. scores: [total] score_dtype. labels: [total].
cudaError_t multiclass_gather(const MulticlassInput& in, const void* workspace, void* boxes, void* scores,
                              int64_t* labels, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace gfl
