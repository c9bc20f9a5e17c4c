// SPDX-License-Identifier: Apache-2.0
#include <limits>

#include "gfl/rows.h"
#include "head_loss.h"

namespace gfl::binding {
namespace {

struct LevelSizes { std::vector<int64_t> sizes; };

struct GflArguments : LevelSizes, LossArguments {
  GflArguments(at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides,
               const at::Tensor& labels, const at::Tensor& matched, const at::Tensor& gt_boxes,
               const OptionalTensor& cls_norm, const OptionalTensor& box_norm, int64_t reg_max,
               at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset, bool legacy)
      : LevelSizes{sizes_of(cls_scores)},
        LossArguments(cls_scores, reg_preds, sizes, strides, center_offset, labels, matched, gt_boxes, reg_max) {
    TORCH_CHECK_VALUE(reg_max >= 1 && reg_max < kMaxBins, "gfl: `reg_max` must be in [1, ", kMaxBins - 1, "], got ",
                      reg_max);
    weigh(loss_weights, "loss_weights");
    in.beta = beta;
    in.legacy = legacy;
    if (cls_norm.has_value()) scalars.cls_norm = number_on(first, *cls_norm, "cls_norm");
    if (box_norm.has_value()) scalars.box_norm = number_on(first, *box_norm, "box_norm");
#if defined(GFL_WITH_CUDA)
    check_fits(cuda::gfl_loss_fits(in), "gfl_loss");
#endif
  }
};

// Both norms, for one all-reduce.
at::Tensor head_loss_norms_forward(at::TensorList cls_scores, const at::Tensor& labels, const at::Tensor& matched) {
  const std::vector<int64_t> sizes = sizes_of(cls_scores);
  ClassMaps a(cls_scores, sizes, labels, matched);
  a.in.gts = std::numeric_limits<int64_t>::max();  // the boxes, which bound the slots, are not given
#if defined(GFL_WITH_CUDA)
  a.check_fits(cuda::head_loss_norms_fits(a.in), "head_loss_norms");
#endif
  at::Tensor norms = at::empty({2}, a.first.options().dtype(accumulator_of(a.first)));
  const HeadNorms out{norms.mutable_data_ptr(), static_cast<char*>(norms.mutable_data_ptr()) + norms.element_size()};
  run(a.first, GFL_CUDA_LAUNCH(head_loss_norms, a.in, workspace_for(a).mutable_data_ptr(), out),
      [&](const ParallelFor& parallel) { cpu::head_loss_norms(a.in, out, parallel); });
  return norms;
}

GFL_HEAD_LOSS(gfl_loss, GflArguments, at::TensorList, at::TensorList, at::ArrayRef<double>, const at::Tensor&,
              const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&, int64_t,
              at::ArrayRef<double>, double, at::ArrayRef<double>, bool)

GFL_OPERATOR(head_loss_norms, head_loss_norms_forward)
GFL_OPERATOR(gfl_loss_fwd, gfl_loss_forward)
GFL_OPERATOR(gfl_loss_bwd, gfl_loss_backward)
GFL_OPERATOR(gfl_loss_fwd_and_grad, gfl_loss_forward_and_gradient)
GFL_OPERATOR(gfl_loss_finish, gfl_loss_finish)

}  // namespace
}  // namespace gfl::binding
