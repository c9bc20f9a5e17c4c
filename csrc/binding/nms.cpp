// SPDX-License-Identifier: Apache-2.0
#include "gfl/nms.h"

#include <ATen/ops/masked_select.h>
#include <ATen/ops/sort.h>

#include <algorithm>
#include <cmath>

#include "operator.h"

namespace gfl::binding {
namespace {

constexpr int64_t kBoxesPerChunk = 1024;  // of classes of an even size: fewer do not pay for waking a thread

at::Tensor nms_on_cpu(const NmsInput& in, const at::Tensor& scores, const OptionalTensor& classes) {
  const auto longs = at::TensorOptions().dtype(at::kLong);
  const at::Tensor order = at::empty({in.count}, longs);
  int64_t* by_score = order.mutable_data_ptr<int64_t>();
  cpu::order_by_score(scores.const_data_ptr(), dtype_of(scores, "scores"), scores.stride(0), in.count, by_score);

  at::Tensor grouped = order;
  const at::Tensor bounds = at::empty({in.count + 1}, longs);
  int64_t* bound = bounds.mutable_data_ptr<int64_t>();
  int64_t segments = 1;
  if (classes.has_value()) {
    grouped = at::empty({in.count}, longs);
    segments = cpu::group_by_class(classes->const_data_ptr<int64_t>(), by_score, in.count,
                                   grouped.mutable_data_ptr<int64_t>(), bound);
  } else {
    bound[0] = 0;
    bound[1] = in.count;
  }

  const at::Tensor keep = at::empty({in.count}, longs.dtype(at::kByte));
  uint8_t* flag = keep.mutable_data_ptr<uint8_t>();
  for_chunks(segments, std::max<int64_t>(1, segments * kBoxesPerChunk / in.count), [&](int64_t begin, int64_t end) {
    cpu::nms(in, grouped.const_data_ptr<int64_t>(), bound, flag, begin, end);
  });

  int64_t kept = 0;
  for (int64_t i = 0; i < in.count; ++i) kept += flag[i];
  at::Tensor result = at::empty({kept}, longs);
  int64_t* out = result.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < in.count; ++i) {
    if (flag[by_score[i]] != 0) *out++ = by_score[i];
  }
  return result;
}

#if defined(GFL_WITH_CUDA)
// From so many boxes on, another sort is less than the panels take.
constexpr int64_t kManyBoxes = 2048;

at::Tensor nms_on_cuda(const NmsInput& in, const at::Tensor& boxes, const at::Tensor& scores,
                       const OptionalTensor& classes) {
  const c10::cuda::CUDAGuard guard(boxes.device());
  const at::Tensor order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/0, /*descending=*/true));
  const auto bytes = static_cast<int64_t>(cuda::nms_workspace_bytes(in.count, in.dtype));
  const at::Tensor workspace = at::empty({bytes}, boxes.options().dtype(at::kByte));
  const at::Tensor keep = at::empty({in.count}, boxes.options().dtype(at::kBool));
  uint8_t* const flags = static_cast<uint8_t*>(keep.mutable_data_ptr());
  if (classes.has_value() && in.count > kManyBoxes) {
    const auto [labels, grouped] =
        at::sort(classes->index_select(0, order), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    const at::Tensor too_large = at::empty({1}, boxes.options().dtype(at::kInt));
    on_stream_of(boxes, [&, labels = labels, grouped = grouped](cudaStream_t stream) {
      return cuda::nms_by_class(in, order.const_data_ptr<int64_t>(), grouped.const_data_ptr<int64_t>(),
                                labels.const_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                                too_large.mutable_data_ptr<int32_t>(), flags, stream);
    });
    // Waits for the device, as the end does.
    if (too_large.item<int32_t>() == 0) return at::masked_select(order, keep);
  }
  on_stream_of(boxes, [&](cudaStream_t stream) {
    return cuda::nms(in, classes.has_value() ? classes->const_data_ptr<int64_t>() : nullptr,
                     order.const_data_ptr<int64_t>(), workspace.mutable_data_ptr(),
                     flags, stream);
  });
  // The number of kept boxes is the result's size: the host waits for it.
  return at::masked_select(order, keep);
}
#endif

}  // namespace

at::Tensor nms_forward(const at::Tensor& boxes, const at::Tensor& scores, const OptionalTensor& idxs,
                       double iou_threshold, bool legacy) {
  check_dim(boxes, 2, "boxes");
  check_shape(boxes, {boxes.size(0), 4}, "boxes");
  check_shape(scores, {boxes.size(0)}, "scores");
  check_device(scores, boxes, "scores");
  const NmsInput in{boxes.const_data_ptr(), dtype_of(boxes, "boxes"), boxes.stride(0), boxes.stride(1),
                    boxes.size(0),          iou_threshold,            legacy};
  dtype_of(scores, "scores");
  TORCH_CHECK_VALUE(!std::isnan(iou_threshold), "gfl: `iou_threshold` must not be NaN");
  OptionalTensor classes;
  if (idxs.has_value()) {
    check_dtype(*idxs, at::kLong, "idxs");
    check_shape(*idxs, {boxes.size(0)}, "idxs");
    check_device(*idxs, boxes, "idxs");
    classes = idxs->contiguous();
  }
  if (in.count == 0) return at::empty({0}, boxes.options().dtype(at::kLong));
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) return nms_on_cuda(in, boxes, scores, classes);
#endif
  return nms_on_cpu(in, scores, classes);
}

GFL_OPERATOR(nms, nms_forward)

}  // namespace gfl::binding
