// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "gfl/head.h"
#include "gfl/rows.h"
#include "steps.h"

// What every operator of the loss takes.
#define GFL_LOSS_PARAMETERS                                                                                    \
  at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor &labels, \
      const at::Tensor &matched, const at::Tensor &gt_boxes, const OptionalTensor &cls_norm,                   \
      const OptionalTensor &box_norm, int64_t reg_max, at::ArrayRef<double> loss_weights, double beta,         \
      at::ArrayRef<double> center_offset, bool legacy
#define GFL_LOSS_ARGUMENTS                                                                                    \
  cls_scores, reg_preds, strides, labels, matched, gt_boxes, cls_norm, box_norm, reg_max, loss_weights, beta, \
      center_offset, legacy

namespace gfl::binding {
namespace {

using Losses = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

void copy_strides(const at::Tensor& t, int64_t (&out)[4]) { std::copy_n(t.strides().begin(), 4, out); }

void check_maps(at::TensorList maps, const at::Tensor& like, int64_t channels, const char* argument) {
  for (const at::Tensor& map : maps) {
    check_dim(map, 4, argument);
    check_dtype(map, maps[0].scalar_type(), argument);
    check_device(map, like, argument);
    check_shape(map, {like.size(0), channels, map.size(2), map.size(3)}, argument);
  }
}

// A single number where the maps are, which the host does not read on CUDA.
const void* number_on(const at::Tensor& like, const at::Tensor& number, const char* argument) {
  check_shape(number, {}, argument);
  check_dtype(number, accumulator_of(like), argument);
  check_device(number, like, argument);
  return number.const_data_ptr();
}

const at::Tensor& check_first(at::TensorList cls_scores) {
  TORCH_CHECK_VALUE(!cls_scores.empty(), "gfl: `cls_scores` must hold at least one level");
  check_dim(cls_scores[0], 4, "cls_scores");
  TORCH_CHECK_VALUE(cls_scores[0].size(1) > 0, "gfl: `cls_scores` must have at least one channel");
  return cls_scores[0];
}

// What the losses and their norms read alike: the class logits, and which location has which class. `in` points into
// the other members and into the tensors of the call.
struct ClassMaps {
  const at::Tensor& first;
  std::vector<HeadLevel> levels;
  at::Tensor labels_, matched_;
  GflLossInput in{};

  ClassMaps(at::TensorList cls_scores, const at::Tensor& labels, const at::Tensor& matched)
      : first(check_first(cls_scores)) {
    check_maps(cls_scores, first, first.size(1), "cls_scores");
    for (const at::Tensor& cls : cls_scores) {
      HeadLevel level{};
      level.cls = cls.const_data_ptr();
      level.height = cls.size(2);
      level.width = cls.size(3);
      copy_strides(cls, level.cls_stride);
      levels.push_back(level);
      in.locations += level.height * level.width;
    }
    in.images = first.size(0);
    for (const auto& [t, name] : {std::pair{&labels, "labels"}, std::pair{&matched, "matched"}}) {
      check_shape(*t, {in.images, in.locations}, name);
      check_dtype(*t, at::kLong, name);
      check_device(*t, first, name);
    }
    labels_ = labels.contiguous();
    matched_ = matched.contiguous();
    in.levels = levels.data();
    in.level_count = static_cast<int64_t>(levels.size());
    in.cls_dtype = dtype_of(first, "cls_scores");
    in.classes = first.size(1);
    in.labels = labels_.const_data_ptr<int64_t>();
    in.matched = matched_.const_data_ptr<int64_t>();
  }
  ClassMaps(const ClassMaps&) = delete;
  ClassMaps& operator=(const ClassMaps&) = delete;

#if defined(GFL_WITH_CUDA)
  void check_fits(bool fits, const char* op) const {
    TORCH_CHECK_NOT_IMPLEMENTED(!first.is_cuda() || fits, "gfl::", op, " on CUDA takes up to ", cuda::kGflLossMaxLevels,
                                " levels and 2^31 locations, got ", in.level_count, " levels and ", in.locations,
                                " locations");
  }
#endif
};

// Checked arguments of the losses.
struct Arguments : ClassMaps {
  at::Tensor gt_boxes_;
  GflLossScalars scalars;

  explicit Arguments(GFL_LOSS_PARAMETERS) : ClassMaps(cls_scores, labels, matched) {
    const size_t count = cls_scores.size();
    TORCH_CHECK_VALUE(reg_preds.size() == count && strides.size() == count && center_offset.size() == count,
                      "gfl: `reg_preds`, `strides` and `center_offset` must hold one item for each of ", count,
                      " levels");
    TORCH_CHECK_VALUE(loss_weights.size() == 3, "gfl: `loss_weights` must hold three numbers, got ",
                      loss_weights.size());
    TORCH_CHECK_VALUE(reg_max >= 1 && reg_max < kMaxBins, "gfl: `reg_max` must be in [1, ", kMaxBins - 1, "], got ",
                      reg_max);
    check_maps(reg_preds, first, 4 * (reg_max + 1), "reg_preds");
    const at::ScalarType acc = accumulator_of(first);
    TORCH_CHECK_TYPE(accumulator_of(reg_preds[0]) == acc,
                     "gfl: `reg_preds` must be fp64 if `cls_scores` are, and only then");
    for (size_t l = 0; l < count; ++l) {
      HeadLevel& level = levels[l];
      const at::Tensor& reg = reg_preds[l];
      check_shape(reg, {in.images, reg.size(1), level.height, level.width}, "reg_preds");
      level.reg = reg.const_data_ptr();
      level.stride = strides[l];
      level.offset = center_offset[l];
      copy_strides(reg, level.reg_stride);
    }
    check_dim(gt_boxes, 3, "gt_boxes");
    check_shape(gt_boxes, {in.images, gt_boxes.size(1), 4}, "gt_boxes");
    check_dtype(gt_boxes, acc, "gt_boxes");
    check_device(gt_boxes, first, "gt_boxes");
    gt_boxes_ = gt_boxes.contiguous();
    in.reg_dtype = dtype_of(reg_preds[0], "reg_preds");
    in.reg_max = reg_max;
    in.gt_boxes = gt_boxes_.const_data_ptr();
    in.gts = gt_boxes.size(1);
    in.beta = beta;
    in.legacy = legacy;
    scalars = {{loss_weights[0], loss_weights[1], loss_weights[2]},
               cls_norm.has_value() ? number_on(first, *cls_norm, "cls_norm") : nullptr,
               box_norm.has_value() ? number_on(first, *box_norm, "box_norm") : nullptr};
#if defined(GFL_WITH_CUDA)
    check_fits(cuda::gfl_loss_fits(in), "gfl_loss");
#endif
  }

  GflLossGrads grads(const at::Tensor& cls, const at::Tensor& box, const at::Tensor& dfl) const {
    return {number_on(first, cls, "grad_cls"), number_on(first, box, "grad_box"), number_on(first, dfl, "grad_dfl")};
  }
};

#if defined(GFL_WITH_CUDA)
at::Tensor workspace_for(const ClassMaps& a) {
  return at::empty({static_cast<int64_t>(cuda::gfl_loss_workspace_bytes(a.in))}, a.first.options().dtype(at::kByte));
}
#endif

// The five results, where the maps are.
struct Results {
  at::Tensor cls, box, dfl, num_pos, box_weight;

  explicit Results(const at::Tensor& like) {
    for (at::Tensor* t : {&cls, &box, &dfl, &num_pos, &box_weight}) {
      *t = at::empty({}, like.options().dtype(accumulator_of(like)));
    }
  }
  GflLossOutput out() const {
    return {cls.mutable_data_ptr(), box.mutable_data_ptr(), dfl.mutable_data_ptr(), num_pos.mutable_data_ptr(),
            box_weight.mutable_data_ptr()};
  }
  Losses all() const { return {cls, box, dfl, num_pos, box_weight}; }
};

at::Tensor empty_scales(const at::Tensor& like) {
  static_assert(sizeof(HeadScales) == 3 * sizeof(double), "a tensor of three doubles holds it");
  return at::empty({3}, like.options().dtype(at::kDouble));
}
HeadScales* pointer_to(const at::Tensor& scales) { return static_cast<HeadScales*>(scales.mutable_data_ptr()); }

// Gradients have the layout of their maps if that has neither overlap nor gaps.
std::vector<at::Tensor> empty_gradients(at::TensorList maps, bool needed) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& map : maps) result.push_back(needed ? at::empty_like(map) : at::empty({0}, map.options()));
  return result;
}

void* place(const at::Tensor& gradient, const at::Tensor& map, int64_t (&stride)[4]) {
  check_shape(gradient, map.sizes(), "gradient");
  check_dtype(gradient, map.scalar_type(), "gradient");
  check_device(gradient, map, "gradient");
  copy_strides(gradient, stride);
  return gradient.mutable_data_ptr();
}

// Where the kernels write the gradients of each level.
std::vector<HeadGradients> places(at::TensorList of_cls, at::TensorList of_reg, at::TensorList cls, at::TensorList reg,
                                  Needs2 needs) {
  TORCH_CHECK_VALUE(of_cls.size() == cls.size() && of_reg.size() == reg.size(),
                    "gfl: there must be a gradient for each of ", cls.size(), " levels");
  std::vector<HeadGradients> levels(cls.size());
  for (size_t l = 0; l < levels.size(); ++l) {
    if (needs[0]) levels[l].cls = place(of_cls[l], cls[l], levels[l].cls_stride);
    if (needs[1]) levels[l].reg = place(of_reg[l], reg[l], levels[l].reg_stride);
  }
  return levels;
}

Losses gfl_loss_forward(GFL_LOSS_PARAMETERS) {
  const Arguments a(GFL_LOSS_ARGUMENTS);
  const Results results(a.first);
  const GflLossOutput out = results.out();
  run(a.first, GFL_CUDA_LAUNCH(gfl_loss_forward, a.in, a.scalars, workspace_for(a).mutable_data_ptr(), out),
      [&](const ParallelFor& parallel) { cpu::gfl_loss_forward(a.in, a.scalars, out, parallel); });
  return results.all();
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gfl_loss_backward(const at::Tensor& grad_cls,
                                                                               const at::Tensor& grad_box,
                                                                               const at::Tensor& grad_dfl,
                                                                               GFL_LOSS_PARAMETERS, Needs2 needs) {
  const Arguments a(GFL_LOSS_ARGUMENTS);
  const GflLossGrads grads = a.grads(grad_cls, grad_box, grad_dfl);
  std::vector<at::Tensor> of_cls = empty_gradients(cls_scores, needs[0]), of_reg = empty_gradients(reg_preds, needs[1]);
  const std::vector<HeadGradients> out = places(of_cls, of_reg, cls_scores, reg_preds, needs);
  run(a.first,
      GFL_CUDA_LAUNCH(gfl_loss_backward, a.in, a.scalars, grads, workspace_for(a).mutable_data_ptr(),
                      pointer_to(empty_scales(a.first)), out.data()),
      [&](const ParallelFor& parallel) { cpu::gfl_loss_backward(a.in, a.scalars, grads, out.data(), parallel); });
  return {std::move(of_cls), std::move(of_reg)};
}

// The losses and the gradients of their sum from one pass over the logits; and the factors of the gradients.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
           std::vector<at::Tensor>>
gfl_loss_forward_and_gradient(GFL_LOSS_PARAMETERS, Needs2 needs) {
  const Arguments a(GFL_LOSS_ARGUMENTS);
  const Results results(a.first);
  const GflLossOutput out = results.out();
  at::Tensor scales = empty_scales(a.first);
  HeadScales* const factors = pointer_to(scales);
  std::vector<at::Tensor> of_cls = empty_gradients(cls_scores, needs[0]), of_reg = empty_gradients(reg_preds, needs[1]);
  const std::vector<HeadGradients> gradients = places(of_cls, of_reg, cls_scores, reg_preds, needs);
  run(a.first,
      GFL_CUDA_LAUNCH(gfl_loss_forward_and_gradient, a.in, a.scalars, workspace_for(a).mutable_data_ptr(), out, factors,
                      gradients.data()),
      [&](const ParallelFor& parallel) {
        cpu::gfl_loss_forward_and_gradient(a.in, a.scalars, out, factors, gradients.data(), parallel);
      });
  return std::tuple_cat(results.all(), std::tuple(scales, std::move(of_cls), std::move(of_reg)));
}

// Rescales in place the gradients that the above has written, unless the gradients that arrive are 1.
void gfl_loss_finish(at::TensorList grad_scores, at::TensorList grad_preds, const at::Tensor& grad_cls,
                     const at::Tensor& grad_box, const at::Tensor& grad_dfl, const at::Tensor& scales,
                     GFL_LOSS_PARAMETERS, Needs2 needs) {
  const Arguments a(GFL_LOSS_ARGUMENTS);
  const GflLossGrads grads = a.grads(grad_cls, grad_box, grad_dfl);
  check_shape(scales, {3}, "scales");
  check_dtype(scales, at::kDouble, "scales");
  check_device(scales, a.first, "scales");
  const std::vector<HeadGradients> gradients = places(grad_scores, grad_preds, cls_scores, reg_preds, needs);
  const HeadScales* const factors = pointer_to(scales);
  run(a.first, GFL_CUDA_LAUNCH(gfl_loss_finish, a.in, factors, grads, gradients.data()),
      [&](const ParallelFor& parallel) { cpu::gfl_loss_finish(a.in, factors, grads, gradients.data(), parallel); });
}

// Both norms, for one all-reduce.
at::Tensor head_loss_norms_forward(at::TensorList cls_scores, const at::Tensor& labels, const at::Tensor& matched) {
  ClassMaps a(cls_scores, labels, matched);
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

GFL_OPERATOR(head_loss_norms, head_loss_norms_forward)
GFL_OPERATOR(gfl_loss_fwd_and_grad, gfl_loss_forward_and_gradient)
GFL_OPERATOR(gfl_loss_finish, gfl_loss_finish)
GFL_OPERATOR(gfl_loss_fwd, gfl_loss_forward)
GFL_OPERATOR(gfl_loss_bwd, gfl_loss_backward)

}  // namespace
}  // namespace gfl::binding
