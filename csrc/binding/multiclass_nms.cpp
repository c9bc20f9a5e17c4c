// SPDX-License-Identifier: Apache-2.0
#include "gfl/multiclass_nms.h"

#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <cmath>

#include "common.h"
#include "ops.h"

namespace gfl::binding {

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiclass_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                                      double score_threshold, double iou_threshold,
                                                                      int64_t max_detections) {
  check_dim(boxes, 2, "boxes");
  check_dim(scores, 2, "scores");
  check_shape(scores, {boxes.size(0), scores.size(1)}, "scores");
  check_device(scores, boxes, "scores");
  const bool per_class = boxes.size(1) != 4;
  check_shape(boxes, {scores.size(0), per_class ? 4 * scores.size(1) : 4}, "boxes");
  TORCH_CHECK_VALUE(!std::isnan(score_threshold), "gfl: `score_threshold` must not be NaN");
  const MulticlassInput in{boxes.const_data_ptr(), dtype_of(boxes, "boxes"),   boxes.stride(0),   boxes.stride(1),
                           per_class,              scores.const_data_ptr(),    dtype_of(scores, "scores"),
                           scores.stride(0),       scores.stride(1),           scores.size(0),    scores.size(1),
                           score_threshold};
  const int64_t count = cpu::multiclass_count(in);
  const at::Tensor found = at::empty({count, 4}, boxes.options());
  const at::Tensor found_scores = at::empty({count}, scores.options());
  const at::Tensor labels = at::empty({count}, boxes.options().dtype(at::kLong));
  cpu::multiclass_gather(in, found.mutable_data_ptr(), found_scores.mutable_data_ptr(),
                         labels.mutable_data_ptr<int64_t>());
  at::Tensor keep = nms_forward(found, found_scores, labels, iou_threshold, false);
  if (max_detections > 0) keep = keep.slice(0, 0, max_detections);
  return {at::index_select(found, 0, keep), at::index_select(found_scores, 0, keep), at::index_select(labels, 0, keep)};
}

GFL_IMPL_CPU("multiclass_nms", multiclass_nms_forward)

}  // namespace gfl::binding
