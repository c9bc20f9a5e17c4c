// SPDX-License-Identifier: Apache-2.0
#include "gfl/rows.h"
#include "head_loss.h"

// What every operator of the loss takes.
#define YOLO_LOSS_PARAMETERS                                                                                      \
  at::TensorList cls_scores, at::TensorList reg_preds, at::IntArrayRef level_sizes, at::ArrayRef<double> strides, \
      const at::Tensor &labels, const at::Tensor &matched, const at::Tensor &scores, const at::Tensor &gt_boxes,  \
      int64_t bins, at::ArrayRef<double> gains
#define YOLO_LOSS_ARGUMENTS cls_scores, reg_preds, level_sizes, strides, labels, matched, scores, gt_boxes, bins, gains

namespace gfl::binding {
namespace {

struct CellCentres { std::vector<double> offsets; };

struct YoloArguments : CellCentres, LossArguments {
  at::Tensor scores_;

  explicit YoloArguments(YOLO_LOSS_PARAMETERS)
      : CellCentres{std::vector<double>(strides.size(), 0.5)},
        LossArguments(cls_scores, reg_preds, level_sizes, strides, offsets, labels, matched, gt_boxes, bins - 1) {
    TORCH_CHECK_VALUE(bins >= 1 && bins <= kMaxBins, "gfl: `bins` must be in [1, ", kMaxBins, "], got ", bins);
    weigh(gains, "gains");
    check_shape(scores, labels.sizes(), "scores");
    check_dtype(scores, accumulator_of(first), "scores");
    check_device(scores, first, "scores");
    scores_ = scores.contiguous();
    in.kind = HeadLossKind::yolo;
    in.scores = scores_.const_data_ptr();
    in.image_height = static_cast<double>(levels[0].height) * levels[0].stride;
    in.image_width = static_cast<double>(levels[0].width) * levels[0].stride;
#if defined(GFL_WITH_CUDA)
    check_fits(cuda::gfl_loss_fits(in), "yolo_loss");
#endif
  }
};

Losses yolo_loss_forward(YOLO_LOSS_PARAMETERS) { return losses_of(YoloArguments(YOLO_LOSS_ARGUMENTS)); }

Gradients yolo_loss_backward(const at::Tensor& grad_cls, const at::Tensor& grad_box, const at::Tensor& grad_dfl,
                             YOLO_LOSS_PARAMETERS, Needs2 needs) {
  const YoloArguments a(YOLO_LOSS_ARGUMENTS);
  return gradients_of(a, a.grads(grad_cls, grad_box, grad_dfl), needs);
}

LossesAndGradients yolo_loss_forward_and_gradient(YOLO_LOSS_PARAMETERS, Needs2 needs) {
  return losses_and_gradients_of(YoloArguments(YOLO_LOSS_ARGUMENTS), needs);
}

void yolo_loss_finish(at::TensorList grad_scores, at::TensorList grad_preds, const at::Tensor& grad_cls,
                      const at::Tensor& grad_box, const at::Tensor& grad_dfl, const at::Tensor& scales,
                      YOLO_LOSS_PARAMETERS, Needs2 needs) {
  const YoloArguments a(YOLO_LOSS_ARGUMENTS);
  finish_gradients(a, grad_scores, grad_preds, a.grads(grad_cls, grad_box, grad_dfl), scales, needs);
}

GFL_OPERATOR(yolo_loss_fwd_and_grad, yolo_loss_forward_and_gradient)
GFL_OPERATOR(yolo_loss_finish, yolo_loss_finish)
GFL_OPERATOR(yolo_loss_fwd, yolo_loss_forward)
GFL_OPERATOR(yolo_loss_bwd, yolo_loss_backward)

}  // namespace
}  // namespace gfl::binding
