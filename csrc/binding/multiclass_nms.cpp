// SPDX-License-Identifier: Apache-2.0
#include "gfl/multiclass_nms.h"

#include <ATen/ops/index_select.h>

#include <cmath>

#include "operator.h"

namespace gfl::binding {

at::Tensor nms_forward(const at::Tensor& boxes, const at::Tensor& scores, const OptionalTensor& idxs, double iou_threshold,
                       bool legacy);

namespace {

// Every pair of a box and a class whose score is above the threshold, in order.
struct Candidates { at::Tensor boxes, scores, labels; };

Candidates room_for(int64_t count, const at::Tensor& boxes, const at::Tensor& scores) {
  return {at::empty({count, 4}, boxes.options()), at::empty({count}, scores.options()),
          at::empty({count}, boxes.options().dtype(at::kLong))};
}

Candidates candidates_on_cpu(const MulticlassInput& in, const at::Tensor& boxes, const at::Tensor& scores) {
  const Candidates found = room_for(cpu::multiclass_count(in), boxes, scores);
  cpu::multiclass_gather(in, found.boxes.mutable_data_ptr(), found.scores.mutable_data_ptr(),
                         found.labels.mutable_data_ptr<int64_t>());
  return found;
}

#if defined(GFL_WITH_CUDA)
Candidates candidates_on_cuda(const MulticlassInput& in, const at::Tensor& boxes, const at::Tensor& scores) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const auto bytes = static_cast<int64_t>(cuda::multiclass_workspace_bytes(in));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const at::Tensor total = at::empty({1}, boxes.options().dtype(at::kLong));
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::multiclass_count(in, workspace.mutable_data_ptr(), total.mutable_data_ptr<int64_t>(), stream);
  });
  // The host waits for the number of candidates here, and for that of the kept ones in `nms_forward`.
  const Candidates found = room_for(total.item<int64_t>(), boxes, scores);
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::multiclass_gather(in, workspace.const_data_ptr(), found.boxes.mutable_data_ptr(),
                                   found.scores.mutable_data_ptr(), found.labels.mutable_data_ptr<int64_t>(), stream);
  });
  return found;
}
#endif

Candidates candidates_of(const MulticlassInput& in, const at::Tensor& boxes, const at::Tensor& scores) {
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) return candidates_on_cuda(in, boxes, scores);
#endif
  return candidates_on_cpu(in, boxes, scores);
}

}  // namespace

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
  const auto [found, found_scores, labels] = candidates_of(in, boxes, scores);
  at::Tensor keep = nms_forward(found, found_scores, labels, iou_threshold, false);
  if (max_detections > 0) keep = keep.slice(0, 0, max_detections);
  return {at::index_select(found, 0, keep), at::index_select(found_scores, 0, keep), at::index_select(labels, 0, keep)};
}

GFL_OPERATOR(multiclass_nms, multiclass_nms_forward)

}  // namespace gfl::binding
