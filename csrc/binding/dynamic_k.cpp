// SPDX-License-Identifier: Apache-2.0
#include "assign.h"

namespace gfl::binding {
namespace {

DynamicKCost cost_of(const std::string& name) {
  if (name == "mmdet") return DynamicKCost::mmdet;
  if (name == "mmyolo") return DynamicKCost::mmyolo;
  if (name == "nanodet") return DynamicKCost::nanodet;
  TORCH_CHECK_VALUE(name == "simota", "gfl: `cost` must be mmdet, mmyolo, nanodet or simota, got ", name);
  return DynamicKCost::simota;
}

void check_fits([[maybe_unused]] const DynamicKInput& in) {
#if defined(GFL_WITH_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::dynamic_k_fits(in), "gfl::dynamic_k on CUDA takes up to ", cuda::kDynamicKMaxLevels,
                              " levels, a `topk` of ", cuda::kDynamicKMaxTopk, " and 2^31 locations, got ",
                              in.level_count, " levels, ", in.topk, " and ", in.locations, " locations");
#endif
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dynamic_k_forward(
    const at::Tensor& scores, const at::Tensor& boxes, at::IntArrayRef level_sizes, at::ArrayRef<double> strides,
    at::ArrayRef<double> center_offset, const OptionalTensor& points, const at::Tensor& gt_boxes,
    const at::Tensor& gt_labels, int64_t topk, double iou_weight, double cls_weight, double center_radius,
    std::string cost) {
  DynamicKInput in{};
  in.cost = cost_of(cost);
  in.iou_weight = static_cast<float>(iou_weight);
  in.cls_weight = static_cast<float>(cls_weight);
  in.center_radius = static_cast<float>(center_radius);
  TORCH_CHECK_VALUE(iou_weight >= 0 && cls_weight >= 0, "gfl: `iou_weight` and `cls_weight` must be >= 0, got ",
                    iou_weight, " and ", cls_weight);
  const AssignTensors given(in, scores, boxes, level_sizes, strides, center_offset, points, 4, gt_boxes, gt_labels,
                            topk);
  AssignResults results(in, gt_boxes, gt_labels);
  const AssignOutput out = results.output();
  if (scores.is_cuda()) check_fits(in);
  run(scores, in.images, 1, GFL_CUDA_LAUNCH(dynamic_k, in, out),
      [&](int64_t begin, int64_t end) { cpu::dynamic_k(in, out, begin, end); });
  return results.tuple();
}

}  // namespace

GFL_OPERATOR(dynamic_k, dynamic_k_forward)

}  // namespace gfl::binding
