// SPDX-License-Identifier: Apache-2.0
#include "assign.h"

namespace gfl::binding {
namespace {

TaskAlignedVariant variant_of(const std::string& name) {
  if (name == "ultralytics") return TaskAlignedVariant::ultralytics;
  if (name == "yolov6") return TaskAlignedVariant::yolov6;
  TORCH_CHECK_VALUE(name == "mmdet", "gfl: `variant` must be ultralytics, yolov6 or mmdet, got ", name);
  return TaskAlignedVariant::mmdet;
}

void check_fits([[maybe_unused]] const TaskAlignedInput& in) {
#if defined(GFL_WITH_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::task_aligned_fits(in), "gfl::task_aligned on CUDA takes up to ",
                              cuda::kTaskAlignedMaxLevels, " levels, a `topk` and `topk2` of ",
                              cuda::kTaskAlignedMaxTopk, " and 2^31 locations, got ", in.level_count, " levels, ",
                              in.topk, " and ", in.topk2, ", and ", in.locations, " locations");
#endif
}

[[maybe_unused]] at::Tensor workspace_for([[maybe_unused]] const TaskAlignedInput& in, const at::Tensor& like) {
#if defined(GFL_WITH_CUDA)
  return at::empty({static_cast<int64_t>(cuda::task_aligned_workspace_bytes(in))}, like.options().dtype(at::kByte));
#else
  return like;
#endif
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> task_aligned_forward(
    const at::Tensor& scores, const at::Tensor& boxes, at::IntArrayRef level_sizes, at::ArrayRef<double> strides,
    at::ArrayRef<double> center_offset, const OptionalTensor& points, const at::Tensor& gt_boxes,
    const at::Tensor& gt_labels, int64_t topk, int64_t topk2, double alpha, double beta, double min_side, double eps,
    std::string variant, bool ciou, bool logits) {
  TORCH_CHECK_VALUE(topk2 >= 1, "gfl: `topk2` must be >= 1, got ", topk2);
  const TaskAlignedVariant kind = variant_of(variant);
  TaskAlignedInput in{};
  const AssignTensors given(in, scores, boxes, level_sizes, strides, center_offset, points, 2, gt_boxes, gt_labels,
                            topk);
  in.topk2 = topk2;
  in.alpha = alpha;
  in.beta = beta;
  in.min_side = static_cast<float>(min_side);
  in.eps = static_cast<float>(eps);
  in.variant = kind;
  in.logits = logits;
  in.overlap = ciou                                ? TaskAlignedOverlap::ciou
               : kind == TaskAlignedVariant::mmdet ? TaskAlignedOverlap::iou
                                                   : TaskAlignedOverlap::clipped_iou;

  AssignResults results(in, gt_boxes, gt_labels);
  const AssignOutput out = results.output();
  at::Tensor scratch;
  void* workspace = nullptr;
  if (scores.is_cuda()) {
    check_fits(in);
    scratch = workspace_for(in, scores);
    workspace = scratch.mutable_data_ptr();
  }
  run(scores, in.images, 1, GFL_CUDA_LAUNCH(task_aligned, in, out, workspace),
      [&](int64_t begin, int64_t end) { cpu::task_aligned(in, out, begin, end); });
  return results.tuple();
}

}  // namespace

GFL_OPERATOR(task_aligned, task_aligned_forward)

}  // namespace gfl::binding
