// SPDX-License-Identifier: Apache-2.0
#include "gfl/rows.h"
#include "head_loss.h"

namespace gfl::binding {
namespace {

struct YoloArguments : LossArguments {
  at::Tensor scores_;

  YoloArguments(at::TensorList cls_scores, at::TensorList reg_preds, at::IntArrayRef level_sizes,
                at::ArrayRef<double> strides, at::ArrayRef<double> center_offset, const at::Tensor& labels,
                const at::Tensor& matched, const at::Tensor& scores, const at::Tensor& gt_boxes, int64_t bins,
                at::ArrayRef<double> gains, double beta, const std::string& head)
      : LossArguments(cls_scores, reg_preds, level_sizes, strides, center_offset, labels, matched, gt_boxes, bins - 1) {
    TORCH_CHECK_VALUE(head == "yolo" || head == "rtmdet", "gfl: `head` must be yolo or rtmdet, got ", head);
    const bool yolo = head == "yolo";
    TORCH_CHECK_VALUE(bins >= 1 && bins <= (yolo ? kMaxBins : 1), "gfl: `bins` must be in [1, ", yolo ? kMaxBins : 1,
                      "], got ", bins);
    weigh(gains, "gains");
    check_shape(scores, labels.sizes(), "scores");
    check_dtype(scores, accumulator_of(first), "scores");
    check_device(scores, first, "scores");
    scores_ = scores.contiguous();
    in.kind = yolo ? HeadLossKind::yolo : HeadLossKind::rtmdet;
    in.beta = beta;
    in.scores = scores_.const_data_ptr();
    in.image_height = static_cast<double>(levels[0].height) * levels[0].stride;
    in.image_width = static_cast<double>(levels[0].width) * levels[0].stride;
#if defined(GFL_WITH_CUDA)
    check_fits(cuda::gfl_loss_fits(in), "yolo_loss");
#endif
  }
};

GFL_HEAD_LOSS(yolo_loss, YoloArguments, at::TensorList, at::TensorList, at::IntArrayRef, at::ArrayRef<double>,
              at::ArrayRef<double>, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t,
              at::ArrayRef<double>, double, std::string)

GFL_OPERATOR(yolo_loss_fwd, yolo_loss_forward)
GFL_OPERATOR(yolo_loss_bwd, yolo_loss_backward)
GFL_OPERATOR(yolo_loss_fwd_and_grad, yolo_loss_forward_and_gradient)
GFL_OPERATOR(yolo_loss_finish, yolo_loss_finish)

}  // namespace
}  // namespace gfl::binding
