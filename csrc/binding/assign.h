// SPDX-License-Identifier: Apache-2.0
// What the bindings of the assignments that read predictions share.
#pragma once
#include <vector>

#include "gfl/assign.h"
#include "operator.h"

namespace gfl::binding {

inline std::vector<GridLevel> grid_levels(at::IntArrayRef sizes, at::ArrayRef<double> strides,
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

// Checks the tensors of a call, keeps what a launcher reads of them alive, and enters it.
class AssignTensors {
 public:
  AssignTensors(AssignInput& in, const at::Tensor& scores, const at::Tensor& boxes, at::IntArrayRef level_sizes,
                at::ArrayRef<double> strides, at::ArrayRef<double> center_offset, const OptionalTensor& points,
                int64_t columns, const at::Tensor& gt_boxes, const at::Tensor& gt_labels, int64_t topk) {
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
    check_device(boxes, scores, "boxes");
    check_device(gt_boxes, scores, "gt_boxes");
    check_device(gt_labels, scores, "gt_labels");
    TORCH_CHECK_VALUE(topk >= 1, "gfl: `topk` must be >= 1, got ", topk);
    TORCH_CHECK_VALUE(locations < int64_t{1} << 31 && gts < int64_t{1} << 31,
                      "gfl: `scores` and `gt_boxes` must have fewer than 2^31 rows per image");
    levels_ = grid_levels(level_sizes, strides, center_offset);
    if (points.has_value()) {
      check_shape(*points, {locations, columns}, "points");
      check_dtype(*points, at::kFloat, "points");
      check_device(*points, scores, "points");
      points_ = points->contiguous();
    } else {
      int64_t cells = 0;
      for (const GridLevel& level : levels_) cells += level.height * level.width;
      TORCH_CHECK_VALUE(cells == locations, "gfl: `level_sizes` must have as many cells as `scores` has rows, ",
                        locations, ", got ", cells);
    }
    boxes_ = boxes.contiguous();
    gt_boxes_ = gt_boxes.contiguous();
    gt_labels_ = gt_labels.contiguous();
    in.levels = levels_.data();
    in.level_count = static_cast<int64_t>(levels_.size());
    in.points = points_.defined() ? points_.const_data_ptr<float>() : nullptr;
    in.locations = locations;
    in.scores = scores.const_data_ptr();
    in.score_dtype = dtype_of(scores, "scores");
    for (int i = 0; i < 3; ++i) in.score_stride[i] = scores.stride(i);
    in.boxes = boxes_.const_data_ptr<float>();
    in.gt_boxes = gt_boxes_.const_data_ptr<float>();
    in.gt_labels = gt_labels_.const_data_ptr<int64_t>();
    in.images = images;
    in.gts = gts;
    in.classes = scores.size(2);
    in.topk = topk;
  }

 private:
  std::vector<GridLevel> levels_;
  at::Tensor points_, boxes_, gt_boxes_, gt_labels_;
};

// New tensors for the results.
class AssignResults {
 public:
  AssignResults(const AssignInput& in, const at::Tensor& gt_boxes, const at::Tensor& gt_labels)
      : labels_(at::empty({in.images, in.locations}, gt_labels.options())),
        matched_(at::empty({in.images, in.locations}, gt_labels.options())),
        scores_(at::empty({in.images, in.locations}, gt_boxes.options())) {}

  AssignOutput output() {
    return {labels_.mutable_data_ptr<int64_t>(), matched_.mutable_data_ptr<int64_t>(),
            scores_.mutable_data_ptr<float>()};
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor> tuple() const { return {labels_, matched_, scores_}; }

 private:
  at::Tensor labels_, matched_, scores_;
};

}  // namespace gfl::binding
