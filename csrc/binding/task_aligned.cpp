// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "gfl/assign.h"
#include "operator.h"

namespace gfl::binding {
namespace {

std::vector<GridLevel> grid_levels(at::IntArrayRef sizes, at::ArrayRef<double> strides,
                                   at::ArrayRef<double> center_offset) {
  TORCH_CHECK_VALUE(sizes.size() == 2 * strides.size() && center_offset.size() == strides.size(),
                    "gfl: `level_sizes` must hold two numbers and `center_offset` one for each of ", strides.size(),
                    " strides, got ", sizes.size(), " and ", center_offset.size());
  std::vector<GridLevel> levels;
  for (size_t l = 0; l < strides.size(); ++l) {
    TORCH_CHECK_VALUE(sizes[2 * l] >= 0 && sizes[2 * l + 1] >= 0 && strides[l] > 0,
                      "gfl: `level_sizes` must be >= 0 and `strides` > 0");
    levels.push_back(
        {sizes[2 * l], sizes[2 * l + 1], static_cast<float>(strides[l]), static_cast<float>(center_offset[l])});
  }
  return levels;
}

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
    std::string variant, bool ciou) {
  check_dim(scores, 3, "scores");
  const int64_t images = scores.size(0), locations = scores.size(1);
  check_shape(boxes, {images, locations, 4}, "boxes");
  check_dim(gt_boxes, 3, "gt_boxes");
  const int64_t gts = gt_boxes.size(1);
  check_shape(gt_boxes, {images, gts, 4}, "gt_boxes");
  check_shape(gt_labels, {images, gts}, "gt_labels");
  check_dtype(boxes, at::kFloat, "boxes");
  check_dtype(gt_boxes, at::kFloat, "gt_boxes");
  check_dtype(gt_labels, at::kLong, "gt_labels");
  for (const at::Tensor* t : {&boxes, &gt_boxes, &gt_labels}) check_device(*t, scores, "boxes");
  TORCH_CHECK_VALUE(topk >= 1 && topk2 >= 1, "gfl: `topk` and `topk2` must be >= 1, got ", topk, " and ", topk2);
  TORCH_CHECK_VALUE(locations < int64_t{1} << 31 && gts < int64_t{1} << 31,
                    "gfl: `scores` and `gt_boxes` must have fewer than 2^31 rows per image");
  const std::vector<GridLevel> levels = grid_levels(level_sizes, strides, center_offset);
  int64_t cells = 0;
  for (const GridLevel& level : levels) cells += level.height * level.width;
  at::Tensor where;
  if (points.has_value()) {
    check_shape(*points, {locations, 2}, "points");
    check_dtype(*points, at::kFloat, "points");
    check_device(*points, scores, "points");
    where = points->contiguous();
  } else {
    TORCH_CHECK_VALUE(cells == locations, "gfl: `level_sizes` must have as many cells as `scores` has rows, ",
                      locations, ", got ", cells);
  }
  const at::Tensor pred = boxes.contiguous(), truth = gt_boxes.contiguous(), classes = gt_labels.contiguous();
  const TaskAlignedVariant kind = variant_of(variant);
  TaskAlignedInput in{};
  in.levels = levels.data();
  in.level_count = static_cast<int64_t>(levels.size());
  in.points = where.defined() ? where.const_data_ptr<float>() : nullptr;
  in.locations = locations;
  in.scores = scores.const_data_ptr();
  in.score_dtype = dtype_of(scores, "scores");
  for (int i = 0; i < 3; ++i) in.score_stride[i] = scores.stride(i);
  in.boxes = pred.const_data_ptr<float>();
  in.gt_boxes = truth.const_data_ptr<float>();
  in.gt_labels = classes.const_data_ptr<int64_t>();
  in.images = images;
  in.gts = gts;
  in.classes = scores.size(2);
  in.topk = topk;
  in.topk2 = topk2;
  in.alpha = alpha;
  in.beta = beta;
  in.min_side = static_cast<float>(min_side);
  in.eps = static_cast<float>(eps);
  in.variant = kind;
  in.overlap = ciou                                ? TaskAlignedOverlap::ciou
               : kind == TaskAlignedVariant::mmdet ? TaskAlignedOverlap::iou
                                                   : TaskAlignedOverlap::clipped_iou;

  at::Tensor labels = at::empty({images, locations}, gt_labels.options());
  at::Tensor matched = at::empty({images, locations}, gt_labels.options());
  at::Tensor alignment = at::empty({images, locations}, gt_boxes.options());
  const TaskAlignedOutput out{labels.mutable_data_ptr<int64_t>(), matched.mutable_data_ptr<int64_t>(),
                              alignment.mutable_data_ptr<float>()};
  at::Tensor scratch;
  void* workspace = nullptr;
  if (scores.is_cuda()) {
    check_fits(in);
    scratch = workspace_for(in, scores);
    workspace = scratch.mutable_data_ptr();
  }
  run(scores, images, 1, GFL_CUDA_LAUNCH(task_aligned, in, out, workspace),
      [&](int64_t begin, int64_t end) { cpu::task_aligned(in, out, begin, end); });
  return {labels, matched, alignment};
}

}  // namespace

GFL_OPERATOR(task_aligned, task_aligned_forward)

}  // namespace gfl::binding
