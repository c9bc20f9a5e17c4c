// SPDX-License-Identifier: Apache-2.0
#include "gfl/head.h"

#include <vector>

#include "operator.h"

namespace gfl::binding {
namespace {

constexpr int64_t kMostCells = (int64_t{1} << 31) - 1;

std::vector<AtssLevel> levels_of(at::IntArrayRef sizes, at::ArrayRef<double> strides, double anchor_scale,
                                 at::ArrayRef<double> center_offset, bool legacy) {
  TORCH_CHECK_VALUE(sizes.size() == 2 * strides.size(),
                    "gfl: `level_sizes` must hold a height and a width for each of ", strides.size(), " strides, got ",
                    sizes.size(), " numbers");
  TORCH_CHECK_VALUE(center_offset.size() == strides.size(), "gfl: `center_offset` must hold a number for each of ",
                    strides.size(), " strides, got ", center_offset.size());
  std::vector<AtssLevel> levels;
  int64_t cells = 0;
  for (size_t l = 0; l < strides.size(); ++l) {
    const int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
    TORCH_CHECK_VALUE(height >= 0 && width >= 0 && strides[l] > 0, "gfl: `level_sizes` must be >= 0 and `strides` > 0");
    // None of these products and sums is more than twice the bound's square, which an int64_t holds.
    const bool fits = height <= kMostCells && width <= kMostCells && (cells += height * width) <= kMostCells;
    TORCH_CHECK_VALUE(fits, "gfl: `level_sizes` must have less than 2^31 cells in all");
    levels.push_back(atss_level(sizes[2 * l], sizes[2 * l + 1], strides[l], center_offset[l], anchor_scale, legacy));
  }
  return levels;
}

void check_fits([[maybe_unused]] const AtssInput& in) {
#if defined(GFL_WITH_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::atss_fits(in), "gfl::atss on CUDA takes up to ", cuda::kAtssMaxLevels,
                              " levels, 6143 candidates per box (`topk` times levels) and 2^31 locations, got ",
                              in.level_count, " levels, a `topk` of ", in.topk, " and ", in.locations, " locations");
#endif
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> atss_forward(at::IntArrayRef level_sizes, at::ArrayRef<double> strides,
                                                            const at::Tensor& gt_boxes, const at::Tensor& gt_labels,
                                                            const OptionalTensor& valid_sizes, int64_t topk,
                                                            double anchor_scale, at::ArrayRef<double> center_offset,
                                                            bool legacy) {
  const std::vector<AtssLevel> levels = levels_of(level_sizes, strides, anchor_scale, center_offset, legacy);
  check_dim(gt_boxes, 3, "gt_boxes");
  const int64_t images = gt_boxes.size(0), gts = gt_boxes.size(1);
  check_shape(gt_boxes, {images, gts, 4}, "gt_boxes");
  check_dtype(gt_boxes, at::kFloat, "gt_boxes");
  check_shape(gt_labels, {images, gts}, "gt_labels");
  check_dtype(gt_labels, at::kLong, "gt_labels");
  check_device(gt_labels, gt_boxes, "gt_labels");
  TORCH_CHECK_VALUE(topk >= 1, "gfl: `topk` must be >= 1, got ", topk);
  at::Tensor valid;
  if (valid_sizes.has_value()) {
    check_shape(*valid_sizes, {images, 2}, "valid_sizes");
    check_dtype(*valid_sizes, at::kFloat, "valid_sizes");
    check_device(*valid_sizes, gt_boxes, "valid_sizes");
    valid = valid_sizes->contiguous();
  }
  const at::Tensor boxes = gt_boxes.contiguous(), box_labels = gt_labels.contiguous();
  int64_t locations = 0;
  for (const AtssLevel& level : levels) locations += level.height * level.width;
  const AtssInput in{levels.data(),
                     static_cast<int64_t>(levels.size()),
                     locations,
                     boxes.const_data_ptr<float>(),
                     box_labels.const_data_ptr<int64_t>(),
                     valid.defined() ? valid.const_data_ptr<float>() : nullptr,
                     images,
                     gts,
                     topk,
                     legacy};
  at::Tensor labels = at::empty({images, locations}, gt_labels.options());
  at::Tensor matched = at::empty({images, locations}, gt_labels.options());
  at::Tensor iou = at::empty({images, locations}, gt_boxes.options());
  if (gt_boxes.is_cuda()) check_fits(in);
  auto *of_labels = labels.mutable_data_ptr<int64_t>(), *of_matched = matched.mutable_data_ptr<int64_t>();
  auto* of_iou = iou.mutable_data_ptr<float>();
  run(gt_boxes, images, 1, GFL_CUDA_LAUNCH(atss, in, of_labels, of_matched, of_iou),
      [&](int64_t begin, int64_t end) { cpu::atss(in, of_labels, of_matched, of_iou, begin, end); });
  return {labels, matched, iou};
}

}  // namespace

GFL_OPERATOR(atss, atss_forward)

}  // namespace gfl::binding
