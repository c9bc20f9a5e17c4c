// SPDX-License-Identifier: Apache-2.0
#include "gfl/soft_nms.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/sort.h>

#include <cmath>

#include "gfl/nms.h"

#include "operator.h"

namespace gfl::binding {
namespace {

using Kept = std::tuple<at::Tensor, at::Tensor>;  // indices and final scores

Kept soft_nms_on_cpu(const SoftNmsInput& in, const at::Tensor& boxes, const OptionalTensor& classes) {
  const auto longs = boxes.options().dtype(at::kLong);
  at::Tensor grouped = at::arange(in.count, longs);
  const at::Tensor bounds = at::empty({in.count + 1}, longs);
  int64_t* bound = bounds.mutable_data_ptr<int64_t>();
  int64_t segments = in.count > 0 ? 1 : 0;
  if (classes.has_value()) {
    const at::Tensor order = grouped;
    grouped = at::empty({in.count}, longs);
    segments = cpu::group_by_class(classes->const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(), in.count,
                                   grouped.mutable_data_ptr<int64_t>(), bound);
  } else {
    bound[0] = 0;
    if (in.count > 0) bound[1] = in.count;
  }
  const at::Tensor final_scores = at::empty({in.count}, boxes.options().dtype(accumulator_of(boxes)));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kByte));
  uint8_t* flags = keep.mutable_data_ptr<uint8_t>();
  for_chunks(segments, 1, [&](int64_t begin, int64_t end) {
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

#if defined(GFL_WITH_CUDA)
Kept soft_nms_on_cuda(const SoftNmsInput& in, const at::Tensor& boxes, const at::Tensor& scores,
                      const OptionalTensor& classes) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  at::Tensor grouped, labels;
  if (classes.has_value()) {
    std::tie(labels, grouped) = at::sort(*classes, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  } else {
    grouped = at::arange(in.count, boxes.options().dtype(at::kLong));
  }
  const auto bytes = static_cast<int64_t>(cuda::soft_nms_workspace_bytes(in.count, in.dtype));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const auto accumulator = accumulator_of(boxes);
  const at::Tensor final_scores = at::empty({in.count}, boxes.options().dtype(accumulator));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kByte));
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::soft_nms(in, grouped.const_data_ptr<int64_t>(),
                          labels.defined() ? labels.const_data_ptr<int64_t>() : nullptr, workspace.mutable_data_ptr(),
                          final_scores.mutable_data_ptr(), keep.mutable_data_ptr<uint8_t>(), stream);
  });
  // The number of kept boxes is the result's size: the one thing here that the host waits for.
  const at::Tensor kept = at::nonzero(keep).squeeze(1);
  const bool none = kept.size(0) == 0;  // then the best of all is taken, as it is
  const at::Tensor candidates = none ? scores.to(accumulator) : final_scores.index_select(0, kept);
  const auto [sorted, order] = at::sort(candidates, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  if (none) return {order.slice(0, 0, 1), sorted.slice(0, 0, 1).to(at::kFloat)};
  return {kept.index_select(0, order), sorted.to(at::kFloat)};
}
#endif

}  // namespace

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
  OptionalTensor classes;
  if (idxs.has_value()) {
    check_dtype(*idxs, at::kLong, "idxs");
    check_shape(*idxs, {boxes.size(0)}, "idxs");
    check_device(*idxs, boxes, "idxs");
    classes = idxs->contiguous();
  }
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda() && in.count > 0) return soft_nms_on_cuda(in, boxes, scores, classes);
#endif
  return soft_nms_on_cpu(in, boxes, classes);
}

GFL_OPERATOR(soft_nms, soft_nms_forward)

}  // namespace gfl::binding
