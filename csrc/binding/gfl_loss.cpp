// SPDX-License-Identifier: Apache-2.0
#include "gfl/gfl_loss.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <array>

#include "gfl/rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

constexpr int64_t kPositivesPerChunk = 16;

// `in` points into the other members and into the tensors of the call.
struct Prepared {
  std::vector<HeadLevel> levels;
  at::Tensor labels, matched, gt_boxes;
  GflLossInput in;
  std::vector<HeadPositive> positives;
  std::vector<HeadTerms> terms;
  std::vector<HeadBlock> blocks;
  double count_norm, weight_sum, cls_norm, box_norm;
};

void copy_strides(const at::Tensor& t, int64_t (&out)[4]) { std::copy_n(t.strides().begin(), 4, out); }

void check_maps(at::TensorList maps, const at::Tensor& like, int64_t channels, const char* argument) {
  for (const at::Tensor& map : maps) {
    check_dim(map, 4, argument);
    check_dtype(map, maps[0].scalar_type(), argument);
    check_device(map, like, argument);
    check_shape(map, {like.size(0), channels, map.size(2), map.size(3)}, argument);
  }
}

double norm_of(const OptionalTensor& norm, at::ScalarType dtype, double otherwise, const char* argument) {
  if (!norm.has_value()) return otherwise;
  check_shape(*norm, {}, argument);
  check_dtype(*norm, dtype, argument);
  return dtype == at::kDouble ? *norm->const_data_ptr<double>() : double(*norm->const_data_ptr<float>());
}

// Checks, and what both devices read.
void prepare(Prepared& p, at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides,
             const at::Tensor& labels, const at::Tensor& matched, const at::Tensor& gt_boxes, int64_t reg_max,
             at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset, bool legacy) {
  const size_t count = cls_scores.size();
  TORCH_CHECK_VALUE(count > 0, "gfl: `cls_scores` must hold at least one level");
  TORCH_CHECK_VALUE(reg_preds.size() == count && strides.size() == count && center_offset.size() == count,
                    "gfl: `reg_preds`, `strides` and `center_offset` must hold one item for each of ", count,
                    " levels");
  TORCH_CHECK_VALUE(loss_weights.size() == 3, "gfl: `loss_weights` must hold three numbers, got ", loss_weights.size());
  TORCH_CHECK_VALUE(reg_max >= 1 && reg_max < kMaxBins, "gfl: `reg_max` must be in [1, ", kMaxBins - 1, "], got ",
                    reg_max);
  const at::Tensor& first = cls_scores[0];
  check_dim(first, 4, "cls_scores");
  TORCH_CHECK_VALUE(first.size(1) > 0, "gfl: `cls_scores` must have at least one channel");
  check_maps(cls_scores, first, first.size(1), "cls_scores");
  check_maps(reg_preds, first, 4 * (reg_max + 1), "reg_preds");
  const at::ScalarType acc = accumulator_of(first);
  TORCH_CHECK_TYPE(accumulator_of(reg_preds[0]) == acc,
                   "gfl: `reg_preds` must be fp64 if `cls_scores` are, and only then");
  int64_t locations = 0;
  for (size_t l = 0; l < count; ++l) {
    const at::Tensor &cls = cls_scores[l], &reg = reg_preds[l];
    check_shape(reg, {cls.size(0), reg.size(1), cls.size(2), cls.size(3)}, "reg_preds");
    HeadLevel level{cls.const_data_ptr(), reg.const_data_ptr(), cls.size(2),      cls.size(3),
                    {},                   {},                   strides[l], center_offset[l]};
    copy_strides(cls, level.cls_stride);
    copy_strides(reg, level.reg_stride);
    p.levels.push_back(level);
    locations += level.height * level.width;
  }
  const int64_t images = first.size(0);
  for (const auto& [t, name] : {std::pair{&labels, "labels"}, std::pair{&matched, "matched"}}) {
    check_shape(*t, {images, locations}, name);
    check_dtype(*t, at::kLong, name);
    check_device(*t, first, name);
  }
  check_dim(gt_boxes, 3, "gt_boxes");
  check_shape(gt_boxes, {images, gt_boxes.size(1), 4}, "gt_boxes");
  check_dtype(gt_boxes, acc, "gt_boxes");
  check_device(gt_boxes, first, "gt_boxes");
  p.labels = labels.contiguous();
  p.matched = matched.contiguous();
  p.gt_boxes = gt_boxes.contiguous();
  p.in = GflLossInput{p.levels.data(),
                      static_cast<int64_t>(count),
                      dtype_of(first, "cls_scores"),
                      dtype_of(reg_preds[0], "reg_preds"),
                      images,
                      first.size(1),
                      reg_max,
                      locations,
                      p.labels.const_data_ptr<int64_t>(),
                      p.matched.const_data_ptr<int64_t>(),
                      p.gt_boxes.const_data_ptr(),
                      gt_boxes.size(1),
                      beta,
                      legacy};
}

// What both directions need on the CPU: positives, their terms, the norms.
void count_on_cpu(Prepared& p, at::ScalarType acc, const OptionalTensor& cls_norm, const OptionalTensor& box_norm) {
  p.positives = cpu::gfl_loss_positives(p.in);
  p.blocks = cpu::gfl_loss_blocks(p.in);
  p.terms.resize(p.positives.size());
  for_chunks(static_cast<int64_t>(p.terms.size()), kPositivesPerChunk, [&](int64_t begin, int64_t end) {
    cpu::gfl_loss_terms(p.in, p.positives.data(), p.terms.data(), begin, end);
  });
  std::vector<int64_t> per_image(p.in.images, 0);
  p.weight_sum = 0;
  for (size_t i = 0; i < p.terms.size(); ++i) {
    ++per_image[p.positives[i].image];
    p.weight_sum += p.terms[i].weight;
  }
  int64_t positives = 0;
  for (const int64_t n : per_image) positives += std::max<int64_t>(n, 1);
  p.cls_norm = norm_of(cls_norm, acc, static_cast<double>(std::max<int64_t>(positives, 1)), "cls_norm");
  // Not std::max, which would hide a NaN.
  p.box_norm = norm_of(box_norm, acc, p.weight_sum < 1 ? 1 : p.weight_sum, "box_norm");
}

double number_of(const at::Tensor& t, at::ScalarType dtype, const char* argument) {
  return norm_of(t, dtype, 0, argument);
}

// Gradients have the layout of their maps, where that has no overlap and no gaps.
std::vector<at::Tensor> like(at::TensorList maps, bool needed) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& map : maps) result.push_back(needed ? at::empty_like(map) : at::empty({0}, map.options()));
  return result;
}

// Gradients of the maps, and where the kernels write them.
struct Gradients {
  std::vector<at::Tensor> cls_scores, reg_preds;
  std::vector<HeadGradients> levels;

  Gradients(at::TensorList cls, at::TensorList reg, Needs2 needs)
      : Gradients(like(cls, needs[0]), like(reg, needs[1]), cls, reg, needs) {}

  // Of tensors that are there already.
  Gradients(std::vector<at::Tensor> of_cls, std::vector<at::Tensor> of_reg, at::TensorList cls, at::TensorList reg,
            Needs2 needs)
      : cls_scores(std::move(of_cls)), reg_preds(std::move(of_reg)), levels(cls.size()) {
    TORCH_CHECK_VALUE(cls_scores.size() == cls.size() && reg_preds.size() == reg.size(),
                      "gfl: there must be a gradient for each of ", cls.size(), " levels");
    for (size_t l = 0; l < levels.size(); ++l) {
      if (needs[0]) levels[l].cls = place(cls_scores[l], cls[l], levels[l].cls_stride);
      if (needs[1]) levels[l].reg = place(reg_preds[l], reg[l], levels[l].reg_stride);
    }
  }

 private:
  static void* place(const at::Tensor& gradient, const at::Tensor& map, int64_t (&stride)[4]) {
    check_shape(gradient, map.sizes(), "gradient");
    check_dtype(gradient, map.scalar_type(), "gradient");
    check_device(gradient, map, "gradient");
    copy_strides(gradient, stride);
    return gradient.mutable_data_ptr();
  }
};

// The walk over the logits: Σ QFL, if `loss`, and the gradients of the class maps, if `gradients`.
double scores_on_cpu(const Prepared& p, bool loss, double scale, const HeadGradients* gradients) {
  std::vector<double> sums(loss ? p.blocks.size() : 0);
  for_chunks(static_cast<int64_t>(p.blocks.size()), 1, [&](int64_t begin, int64_t end) {
    cpu::gfl_loss_scores(p.in, p.positives, p.terms.data(), p.blocks.data(), loss ? sums.data() : nullptr, scale,
                         gradients, begin, end);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void distributions_on_cpu(const Prepared& p, const HeadScales& scales, Gradients& out) {
  for (at::Tensor& grad : out.reg_preds) grad.zero_();
  for_chunks(static_cast<int64_t>(p.positives.size()), kPositivesPerChunk, [&](int64_t begin, int64_t end) {
    cpu::gfl_loss_terms_backward(p.in, p.positives.data(), p.terms.data(), scales, out.levels.data(), begin, end);
  });
}

// The five results; `quality_focal` is Σ QFL.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> losses_on_cpu(
    const Prepared& p, const at::Tensor& like, double quality_focal, at::ArrayRef<double> loss_weights) {
  double box = 0, dfl = 0;
  for (const HeadTerms& t : p.terms) {
    box += t.weight * t.box;
    dfl += t.weight * t.dfl;
  }
  const auto scalar = [&](double value) {
    return at::scalar_tensor(value, like.options().dtype(accumulator_of(like)));
  };
  return {scalar(loss_weights[0] * quality_focal / p.cls_norm), scalar(loss_weights[1] * box / p.box_norm),
          scalar(loss_weights[2] * dfl / p.box_norm), scalar(static_cast<double>(p.positives.size())),
          scalar(p.weight_sum)};
}

#if defined(GFL_WITH_CUDA)
// A single number on the device of the maps, which the host does not read.
const void* number_on(const at::Tensor& like, const at::Tensor& number, const char* argument) {
  check_shape(number, {}, argument);
  check_dtype(number, accumulator_of(like), argument);
  check_device(number, like, argument);
  return number.const_data_ptr();
}

GflLossScalars scalars_of(const at::Tensor& like, const OptionalTensor& cls_norm, const OptionalTensor& box_norm,
                          at::ArrayRef<double> loss_weights) {
  return {{loss_weights[0], loss_weights[1], loss_weights[2]},
          cls_norm.has_value() ? number_on(like, *cls_norm, "cls_norm") : nullptr,
          box_norm.has_value() ? number_on(like, *box_norm, "box_norm") : nullptr};
}

at::Tensor workspace_for(const Prepared& p, const at::Tensor& like) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::gfl_loss_fits(p.in), "gfl::gfl_loss on CUDA takes up to ", cuda::kGflLossMaxLevels,
                              " levels and 2^31 locations, got ", p.in.level_count, " levels and ", p.in.locations,
                              " locations");
  return at::empty({static_cast<int64_t>(cuda::gfl_loss_workspace_bytes(p.in))}, like.options().dtype(at::kByte));
}

// The five results on the device.
struct Numbers {
  at::Tensor cls, box, dfl, num_pos, box_weight;

  explicit Numbers(const at::Tensor& like) {
    for (at::Tensor* t : {&cls, &box, &dfl, &num_pos, &box_weight}) {
      *t = at::empty({}, like.options().dtype(accumulator_of(like)));
    }
  }
  GflLossOutput out() const {
    return {cls.mutable_data_ptr(), box.mutable_data_ptr(), dfl.mutable_data_ptr(), num_pos.mutable_data_ptr(),
            box_weight.mutable_data_ptr()};
  }
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> all() const {
    return {cls, box, dfl, num_pos, box_weight};
  }
};

GflLossGrads grads_of(const std::array<at::Tensor, 3>& grads, const at::Tensor& like) {
  return {number_on(like, grads[0], "grad_cls"), number_on(like, grads[1], "grad_box"),
          number_on(like, grads[2], "grad_dfl")};
}

HeadScales* pointer_to(const at::Tensor& scales) { return static_cast<HeadScales*>(scales.mutable_data_ptr()); }
#endif

// Memory for what the gradients are multiplied with.
at::Tensor empty_scales(const at::Tensor& like) {
  static_assert(sizeof(HeadScales) == 3 * sizeof(double), "a tensor of three doubles holds it");
  return at::empty({3}, like.options().dtype(at::kDouble));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gfl_loss_forward(
    at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& labels,
    const at::Tensor& matched, const at::Tensor& gt_boxes, const OptionalTensor& cls_norm,
    const OptionalTensor& box_norm, int64_t reg_max, at::ArrayRef<double> loss_weights, double beta,
    at::ArrayRef<double> center_offset, bool legacy) {
  Prepared p;
  prepare(p, cls_scores, reg_preds, strides, labels, matched, gt_boxes, reg_max, loss_weights, beta, center_offset,
          legacy);
  const at::ScalarType acc = accumulator_of(cls_scores[0]);
#if defined(GFL_WITH_CUDA)
  if (cls_scores[0].is_cuda()) {
    const GflLossScalars scalars = scalars_of(cls_scores[0], cls_norm, box_norm, loss_weights);
    const at::Tensor workspace = workspace_for(p, cls_scores[0]);
    const Numbers numbers(cls_scores[0]);
    on_stream_of(cls_scores[0], [&](cudaStream_t stream) {
      return cuda::gfl_loss_forward(p.in, scalars, workspace.mutable_data_ptr(), numbers.out(), stream);
    });
    return numbers.all();
  }
#endif
  count_on_cpu(p, acc, cls_norm, box_norm);
  return losses_on_cpu(p, cls_scores[0], scores_on_cpu(p, true, 0, nullptr), loss_weights);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gfl_loss_backward(
    const at::Tensor& grad_cls, const at::Tensor& grad_box, const at::Tensor& grad_dfl, at::TensorList cls_scores,
    at::TensorList reg_preds, at::ArrayRef<double> strides, const at::Tensor& labels, const at::Tensor& matched,
    const at::Tensor& gt_boxes, const OptionalTensor& cls_norm, const OptionalTensor& box_norm, int64_t reg_max,
    at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset, bool legacy, Needs2 needs) {
  Prepared p;
  prepare(p, cls_scores, reg_preds, strides, labels, matched, gt_boxes, reg_max, loss_weights, beta, center_offset,
          legacy);
  const at::ScalarType acc = accumulator_of(cls_scores[0]);
  Gradients gradients(cls_scores, reg_preds, needs);
#if defined(GFL_WITH_CUDA)
  if (cls_scores[0].is_cuda()) {
    const GflLossScalars scalars = scalars_of(cls_scores[0], cls_norm, box_norm, loss_weights);
    const GflLossGrads grads = grads_of({grad_cls, grad_box, grad_dfl}, cls_scores[0]);
    const at::Tensor workspace = workspace_for(p, cls_scores[0]), scales = empty_scales(cls_scores[0]);
    on_stream_of(cls_scores[0], [&](cudaStream_t stream) {
      return cuda::gfl_loss_backward(p.in, scalars, grads, workspace.mutable_data_ptr(), pointer_to(scales),
                                     gradients.levels.data(), stream);
    });
    return {std::move(gradients.cls_scores), std::move(gradients.reg_preds)};
  }
#endif
  count_on_cpu(p, acc, cls_norm, box_norm);
  const HeadScales scales{number_of(grad_cls, acc, "grad_cls") * (loss_weights[0] / p.cls_norm),
                          number_of(grad_box, acc, "grad_box") * (loss_weights[1] / p.box_norm),
                          number_of(grad_dfl, acc, "grad_dfl") * (loss_weights[2] / p.box_norm)};
  if (needs[0]) scores_on_cpu(p, false, scales.cls, gradients.levels.data());
  if (needs[1]) distributions_on_cpu(p, scales, gradients);
  return {std::move(gradients.cls_scores), std::move(gradients.reg_preds)};
}

namespace {

// The losses, and the gradients of their sum, in one walk over the logits; and what those were multiplied with.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
           std::vector<at::Tensor>>
gfl_loss_forward_and_gradient(at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides,
                              const at::Tensor& labels, const at::Tensor& matched, const at::Tensor& gt_boxes,
                              const OptionalTensor& cls_norm, const OptionalTensor& box_norm, int64_t reg_max,
                              at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset,
                              bool legacy, Needs2 needs) {
  Prepared p;
  prepare(p, cls_scores, reg_preds, strides, labels, matched, gt_boxes, reg_max, loss_weights, beta, center_offset,
          legacy);
  Gradients gradients(cls_scores, reg_preds, needs);
  at::Tensor scales = empty_scales(cls_scores[0]);
  const auto results = [&](auto numbers) {
    return std::tuple_cat(std::move(numbers), std::tuple(scales, std::move(gradients.cls_scores),
                                                         std::move(gradients.reg_preds)));
  };
#if defined(GFL_WITH_CUDA)
  if (cls_scores[0].is_cuda()) {
    const GflLossScalars scalars = scalars_of(cls_scores[0], cls_norm, box_norm, loss_weights);
    const at::Tensor workspace = workspace_for(p, cls_scores[0]);
    const Numbers numbers(cls_scores[0]);
    on_stream_of(cls_scores[0], [&](cudaStream_t stream) {
      return cuda::gfl_loss_forward_and_gradient(p.in, scalars, workspace.mutable_data_ptr(), numbers.out(),
                                                 pointer_to(scales), gradients.levels.data(), stream);
    });
    return results(numbers.all());
  }
#endif
  count_on_cpu(p, accumulator_of(cls_scores[0]), cls_norm, box_norm);
  const HeadScales by{loss_weights[0] / p.cls_norm, loss_weights[1] / p.box_norm, loss_weights[2] / p.box_norm};
  *static_cast<HeadScales*>(scales.mutable_data_ptr()) = by;
  const double quality_focal = scores_on_cpu(p, true, by.cls, needs[0] ? gradients.levels.data() : nullptr);
  if (needs[1]) distributions_on_cpu(p, by, gradients);
  return results(losses_on_cpu(p, cls_scores[0], quality_focal, loss_weights));
}

// The gradients that the above has written become those for what arrives; nothing is touched where that is 1.
void gfl_loss_finish(at::TensorList grad_scores, at::TensorList grad_preds, const at::Tensor& grad_cls,
                     const at::Tensor& grad_box, const at::Tensor& grad_dfl, const at::Tensor& scales,
                     at::TensorList cls_scores, at::TensorList reg_preds, at::ArrayRef<double> strides,
                     const at::Tensor& labels, const at::Tensor& matched, const at::Tensor& gt_boxes,
                     const OptionalTensor& cls_norm, const OptionalTensor& box_norm, int64_t reg_max,
                     at::ArrayRef<double> loss_weights, double beta, at::ArrayRef<double> center_offset, bool legacy,
                     Needs2 needs) {
  Prepared p;
  prepare(p, cls_scores, reg_preds, strides, labels, matched, gt_boxes, reg_max, loss_weights, beta, center_offset,
          legacy);
  check_shape(scales, {3}, "scales");
  check_dtype(scales, at::kDouble, "scales");
  check_device(scales, cls_scores[0], "scales");
  Gradients gradients(grad_scores.vec(), grad_preds.vec(), cls_scores, reg_preds, needs);
#if defined(GFL_WITH_CUDA)
  if (cls_scores[0].is_cuda()) {
    const GflLossGrads grads = grads_of({grad_cls, grad_box, grad_dfl}, cls_scores[0]);
    TORCH_CHECK_VALUE(cuda::gfl_loss_fits(p.in), "gfl: these maps do not fit");
    on_stream_of(cls_scores[0], [&](cudaStream_t stream) {
      return cuda::gfl_loss_finish(p.in, pointer_to(scales), grads, gradients.levels.data(), stream);
    });
    return;
  }
#endif
  const at::ScalarType acc = accumulator_of(cls_scores[0]);
  HeadScales by{number_of(grad_cls, acc, "grad_cls"), number_of(grad_box, acc, "grad_box"),
                number_of(grad_dfl, acc, "grad_dfl")};
  if (by.cls == 1 && by.box == 1 && by.dfl == 1) return;
  const double* expected = scales.const_data_ptr<double>();
  by = {by.cls * expected[0], by.box * expected[1], by.dfl * expected[2]};
  count_on_cpu(p, acc, cls_norm, box_norm);
  if (needs[0]) scores_on_cpu(p, false, by.cls, gradients.levels.data());
  if (needs[1]) distributions_on_cpu(p, by, gradients);
}

}  // namespace

GFL_OPERATOR(gfl_loss_fwd_and_grad, gfl_loss_forward_and_gradient)
GFL_OPERATOR(gfl_loss_finish, gfl_loss_finish)
GFL_OPERATOR(gfl_loss_fwd, gfl_loss_forward)
GFL_OPERATOR(gfl_loss_bwd, gfl_loss_backward)

}  // namespace gfl::binding
