// SPDX-License-Identifier: Apache-2.0
#include "gfl/soft_nms.h"

#include <ATen/ops/arange.h>
#include <torch/library.h>

#include <cmath>

#include "common.h"
#include "gfl/nms.h"
#include "ops.h"

namespace gfl::binding {

std::tuple<at::Tensor, at::Tensor> soft_nms_forward(const at::Tensor& boxes, const at::Tensor& scores,
                                                    const OptionalTensor& idxs, double iou_threshold, double sigma,
                                                    double min_score, bool gaussian) {
  check_dim(boxes, 2, "boxes");
  check_shape(boxes, {boxes.size(0), 4}, "boxes");
  check_shape(scores, {boxes.size(0)}, "scores");
  check_device(scores, boxes, "scores");
  TORCH_CHECK_VALUE(sigma > 0, "gfl: `sigma` must be > 0, got ", sigma);
  TORCH_CHECK_VALUE(!std::isnan(min_score), "gfl: `min_score` must not be NaN");
  const SoftNmsInput in{boxes.const_data_ptr(),  dtype_of(boxes, "boxes"),   boxes.stride(0),  boxes.stride(1),
                        scores.const_data_ptr(), dtype_of(scores, "scores"), scores.stride(0), boxes.size(0),
                        iou_threshold,           sigma,                      min_score,        gaussian};
  const auto longs = boxes.options().dtype(at::kLong);
  at::Tensor grouped = at::arange(in.count, longs);
  const at::Tensor bounds = at::empty({in.count + 1}, longs);
  int64_t* bound = bounds.mutable_data_ptr<int64_t>();
  int64_t classes = in.count > 0 ? 1 : 0;
  if (idxs.has_value()) {
    check_dtype(*idxs, at::kLong, "idxs");
    check_shape(*idxs, {boxes.size(0)}, "idxs");
    check_device(*idxs, boxes, "idxs");
    const at::Tensor contiguous = idxs->contiguous(), order = grouped;
    grouped = at::empty({in.count}, longs);
    classes = cpu::group_by_class(contiguous.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(), in.count,
                                  grouped.mutable_data_ptr<int64_t>(), bound);
  } else {
    bound[0] = 0;
    if (in.count > 0) bound[1] = in.count;
  }
  const at::Tensor final_scores = at::empty({in.count}, boxes.options().dtype(accumulator_of(boxes)));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kByte));
  uint8_t* flags = keep.mutable_data_ptr<uint8_t>();
  for_chunks(classes, 1, [&](int64_t begin, int64_t end) {
    cpu::soft_nms(in, grouped.const_data_ptr<int64_t>(), bound, final_scores.mutable_data_ptr(), flags, begin, end);
  });
  int64_t kept = 0;
  for (int64_t i = 0; i < in.count; ++i) kept += flags[i];
  if (kept == 0 && in.count > 0) kept = 1;
  at::Tensor indices = at::empty({kept}, longs);
  at::Tensor kept_scores = at::empty({kept}, boxes.options().dtype(at::kFloat));
  cpu::soft_nms_collect(in, final_scores.const_data_ptr(), flags, indices.mutable_data_ptr<int64_t>(),
                        kept_scores.mutable_data_ptr<float>());
  return {indices, kept_scores};
}

GFL_IMPL_CPU("soft_nms", soft_nms_forward)

}  // namespace gfl::binding
