// SPDX-License-Identifier: Apache-2.0
// What the losses of GFL heads and of those with scores given share: checks of maps and assignments, where gradients
// go, and the launches.
#pragma once
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <utility>

#include "gfl/head.h"
#include "steps.h"

namespace gfl::binding {

using Losses = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The maps of all levels: one [B, C, H, W] for each, or a single [B, C, A] that holds the levels' cells one after
// another. `level_sizes` holds each level's height and width.
struct LevelMaps {
  at::TensorList maps;
  at::IntArrayRef level_sizes;

  size_t count() const { return level_sizes.size() / 2; }
  bool joined() const { return maps[0].dim() == 3; }
  int64_t height(size_t level) const { return level_sizes[2 * level]; }
  int64_t width(size_t level) const { return level_sizes[2 * level + 1]; }
  int64_t start(size_t level) const {
    int64_t cells = 0;
    for (size_t l = 0; l < level; ++l) cells += height(l) * width(l);
    return cells;
  }

  void check(const at::Tensor& like, int64_t channels, const char* argument) const {
    TORCH_CHECK_VALUE(maps.size() == (joined() ? 1 : count()), "gfl: `", argument, "` must hold a map for each of ",
                      count(), " levels, or one of three dimensions, got ", maps.size(), " maps");
    for (size_t l = 0; l < maps.size(); ++l) {
      check_dtype(maps[l], maps[0].scalar_type(), argument);
      check_device(maps[l], like, argument);
      if (joined()) check_shape(maps[l], {like.size(0), channels, start(count())}, argument);
      else check_shape(maps[l], {like.size(0), channels, height(l), width(l)}, argument);
    }
  }

  // Of the level's first cell in a tensor of the maps' shapes: its offset in elements, and the strides to the others.
  int64_t place(const at::Tensor& t, size_t level, int64_t (&stride)[4]) const {
    if (!joined()) {
      std::copy_n(t.strides().begin(), 4, stride);
      return 0;
    }
    const int64_t cell = t.stride(2), strides[4] = {t.stride(0), t.stride(1), width(level) * cell, cell};
    std::copy_n(strides, 4, stride);
    return start(level) * cell;
  }
  const void* data(size_t level, int64_t (&stride)[4]) const {
    const at::Tensor& t = maps[joined() ? 0 : level];
    const int64_t offset = place(t, level, stride);
    return static_cast<const char*>(t.const_data_ptr()) + offset * static_cast<int64_t>(t.element_size());
  }
  void* gradient(at::TensorList gradients, size_t level, int64_t (&stride)[4]) const {
    const at::Tensor &t = gradients[joined() ? 0 : level], &map = maps[joined() ? 0 : level];
    check_shape(t, map.sizes(), "gradient");
    check_dtype(t, map.scalar_type(), "gradient");
    check_device(t, map, "gradient");
    const int64_t offset = place(t, level, stride);
    return static_cast<char*>(t.mutable_data_ptr()) + offset * static_cast<int64_t>(t.element_size());
  }
};

inline std::vector<int64_t> sizes_of(at::TensorList maps) {
  std::vector<int64_t> sizes;
  for (const at::Tensor& map : maps) {
    check_dim(map, 4, "cls_scores");
    sizes.push_back(map.size(2));
    sizes.push_back(map.size(3));
  }
  return sizes;
}

// A single number where the maps are, which the host does not read on CUDA.
inline const void* number_on(const at::Tensor& like, const at::Tensor& number, const char* argument) {
  check_shape(number, {}, argument);
  check_dtype(number, accumulator_of(like), argument);
  check_device(number, like, argument);
  return number.const_data_ptr();
}

inline const at::Tensor& check_first(at::TensorList cls_scores) {
  TORCH_CHECK_VALUE(!cls_scores.empty(), "gfl: `cls_scores` must hold at least one level");
  TORCH_CHECK_VALUE(cls_scores[0].dim() == 3 || cls_scores[0].dim() == 4,
                    "gfl: `cls_scores` must have 3 or 4 dimensions, got ", cls_scores[0].sizes());
  TORCH_CHECK_VALUE(cls_scores[0].size(1) > 0, "gfl: `cls_scores` must have at least one channel");
  return cls_scores[0];
}

// What the losses and their norms read alike: the class logits, and which location has which class. `in` points into
// the other members and into the tensors of the call.
struct ClassMaps {
  const LevelMaps cls;
  const at::Tensor& first;
  std::vector<HeadLevel> levels;
  at::Tensor labels_, matched_;
  HeadLossInput in{};

  ClassMaps(at::TensorList cls_scores, at::IntArrayRef level_sizes, const at::Tensor& labels, const at::Tensor& matched)
      : cls{cls_scores, level_sizes}, first(check_first(cls_scores)) {
    TORCH_CHECK_VALUE(level_sizes.size() % 2 == 0 && !level_sizes.empty() &&
                          std::all_of(level_sizes.begin(), level_sizes.end(), [](int64_t n) { return n >= 0; }),
                      "gfl: `level_sizes` must hold a height and a width, both >= 0, for each level, got ",
                      level_sizes);
    cls.check(first, first.size(1), "cls_scores");
    for (size_t l = 0; l < cls.count(); ++l) {
      HeadLevel level{};
      level.height = cls.height(l);
      level.width = cls.width(l);
      level.cls = cls.data(l, level.cls_stride);
      levels.push_back(level);
    }
    in.locations = cls.start(cls.count());
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
    TORCH_CHECK_NOT_IMPLEMENTED(!first.is_cuda() || fits, "gfl::", op, " on CUDA takes up to ",
                                cuda::kHeadLossMaxLevels, " levels and 2^31 locations, got ", in.level_count,
                                " levels and ", in.locations, " locations");
  }
#endif
};

// Checked arguments of a loss.
struct LossArguments : ClassMaps {
  const LevelMaps reg;
  at::Tensor gt_boxes_;
  HeadLossScalars scalars{};

  // `reg_max` is the last bin.
  LossArguments(at::TensorList cls_scores, at::TensorList reg_preds, at::IntArrayRef level_sizes,
                at::ArrayRef<double> strides, at::ArrayRef<double> center_offset, const at::Tensor& labels,
                const at::Tensor& matched, const at::Tensor& gt_boxes, int64_t reg_max)
      : ClassMaps(cls_scores, level_sizes, labels, matched), reg{reg_preds, level_sizes} {
    const size_t count = cls.count();
    TORCH_CHECK_VALUE(strides.size() == count && center_offset.size() == count && !reg_preds.empty() &&
                          reg_preds[0].dim() == first.dim(),
                      "gfl: `reg_preds`, `strides` and `center_offset` must hold one item for each of ", count,
                      " levels");
    reg.check(first, 4 * (reg_max + 1), "reg_preds");
    const at::ScalarType acc = accumulator_of(first);
    TORCH_CHECK_TYPE(accumulator_of(reg_preds[0]) == acc,
                     "gfl: `reg_preds` must be fp64 if `cls_scores` are, and only then");
    for (size_t l = 0; l < count; ++l) {
      HeadLevel& level = levels[l];
      level.reg = reg.data(l, level.reg_stride);
      level.stride = strides[l];
      level.offset = center_offset[l];
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
  }

  void weigh(at::ArrayRef<double> weights, const char* argument) {
    TORCH_CHECK_VALUE(weights.size() == 3, "gfl: `", argument, "` must hold three numbers, got ", weights.size());
    std::copy_n(weights.begin(), 3, scalars.loss_weights);
  }

  HeadLossGrads grads(const at::Tensor& cls, const at::Tensor& box, const at::Tensor& dfl) const {
    return {number_on(first, cls, "grad_cls"), number_on(first, box, "grad_box"), number_on(first, dfl, "grad_dfl")};
  }

  // Where the kernels write the gradients of each level.
  std::vector<HeadGradients> places(at::TensorList of_cls, at::TensorList of_reg, Needs2 needs) const {
    TORCH_CHECK_VALUE(of_cls.size() == cls.maps.size() && of_reg.size() == reg.maps.size(),
                      "gfl: there must be a gradient for each of ", cls.maps.size(), " maps");
    std::vector<HeadGradients> found(cls.count());
    for (size_t l = 0; l < found.size(); ++l) {
      if (needs[0]) found[l].cls = cls.gradient(of_cls, l, found[l].cls_stride);
      if (needs[1]) found[l].reg = reg.gradient(of_reg, l, found[l].reg_stride);
    }
    return found;
  }
};

#if defined(GFL_WITH_CUDA)
inline at::Tensor workspace_for(const ClassMaps& a) {
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
  HeadLossOutput out() const {
    return {cls.mutable_data_ptr(), box.mutable_data_ptr(), dfl.mutable_data_ptr(), num_pos.mutable_data_ptr(),
            box_weight.mutable_data_ptr()};
  }
  Losses all() const { return {cls, box, dfl, num_pos, box_weight}; }
};

inline at::Tensor empty_scales(const at::Tensor& like) {
  static_assert(sizeof(HeadScales) == 3 * sizeof(double), "a tensor of three doubles holds it");
  return at::empty({3}, like.options().dtype(at::kDouble));
}
inline HeadScales* pointer_to(const at::Tensor& scales) { return static_cast<HeadScales*>(scales.mutable_data_ptr()); }

// Gradients have the layout of their maps if that has neither overlap nor gaps.
inline std::vector<at::Tensor> empty_gradients(at::TensorList maps, bool needed) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& map : maps) result.push_back(needed ? at::empty_like(map) : at::empty({0}, map.options()));
  return result;
}

// ---- the four operators of a loss ----

using Gradients = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
using LossesAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                      std::vector<at::Tensor>, std::vector<at::Tensor>>;

// Each takes what `Arguments`, which are LossArguments, are made of.
template <class Arguments, class... Taken> struct LossOperators {
  static Losses forward(Taken... taken) {
    const Arguments a(taken...);
    const Results results(a.first);
    const HeadLossOutput out = results.out();
    run(a.first, GFL_CUDA_LAUNCH(gfl_loss_forward, a.in, a.scalars, workspace_for(a).mutable_data_ptr(), out),
        [&](const ParallelFor& parallel) { cpu::gfl_loss_forward(a.in, a.scalars, out, parallel); });
    return results.all();
  }

  static Gradients backward(const at::Tensor& grad_cls, const at::Tensor& grad_box, const at::Tensor& grad_dfl,
                            Taken... taken, Needs2 needs) {
    const Arguments a(taken...);
    const HeadLossGrads grads = a.grads(grad_cls, grad_box, grad_dfl);
    std::vector<at::Tensor> of_cls = empty_gradients(a.cls.maps, needs[0]),
                            of_reg = empty_gradients(a.reg.maps, needs[1]);
    const std::vector<HeadGradients> out = a.places(of_cls, of_reg, needs);
    run(a.first,
        GFL_CUDA_LAUNCH(gfl_loss_backward, a.in, a.scalars, grads, workspace_for(a).mutable_data_ptr(),
                        pointer_to(empty_scales(a.first)), out.data()),
        [&](const ParallelFor& parallel) { cpu::gfl_loss_backward(a.in, a.scalars, grads, out.data(), parallel); });
    return {std::move(of_cls), std::move(of_reg)};
  }

  // The losses and the gradients of their sum from one pass over the logits; and the factors of the gradients.
  static LossesAndGradients forward_and_gradient(Taken... taken, Needs2 needs) {
    const Arguments a(taken...);
    const Results results(a.first);
    const HeadLossOutput out = results.out();
    at::Tensor scales = empty_scales(a.first);
    HeadScales* const factors = pointer_to(scales);
    std::vector<at::Tensor> of_cls = empty_gradients(a.cls.maps, needs[0]),
                            of_reg = empty_gradients(a.reg.maps, needs[1]);
    const std::vector<HeadGradients> gradients = a.places(of_cls, of_reg, needs);
    run(a.first,
        GFL_CUDA_LAUNCH(gfl_loss_forward_and_gradient, a.in, a.scalars, workspace_for(a).mutable_data_ptr(), out,
                        factors, gradients.data()),
        [&](const ParallelFor& parallel) {
          cpu::gfl_loss_forward_and_gradient(a.in, a.scalars, out, factors, gradients.data(), parallel);
        });
    return std::tuple_cat(results.all(), std::tuple(scales, std::move(of_cls), std::move(of_reg)));
  }

  // Rescales in place the gradients that the above has written, unless the gradients that arrive are 1.
  static void finish(at::TensorList grad_scores, at::TensorList grad_preds, const at::Tensor& grad_cls,
                     const at::Tensor& grad_box, const at::Tensor& grad_dfl, const at::Tensor& scales, Taken... taken,
                     Needs2 needs) {
    const Arguments a(taken...);
    const HeadLossGrads grads = a.grads(grad_cls, grad_box, grad_dfl);
    check_shape(scales, {3}, "scales");
    check_dtype(scales, at::kDouble, "scales");
    check_device(scales, a.first, "scales");
    const std::vector<HeadGradients> gradients = a.places(grad_scores, grad_preds, needs);
    const HeadScales* const factors = pointer_to(scales);
    run(a.first, GFL_CUDA_LAUNCH(gfl_loss_finish, a.in, factors, grads, gradients.data()),
        [&](const ParallelFor& parallel) { cpu::gfl_loss_finish(a.in, factors, grads, gradients.data(), parallel); });
  }
};

}  // namespace gfl::binding

// The functions of a loss, <stem>_forward and so on.
#define GFL_HEAD_LOSS(stem, ...)                                                        \
  using stem##_operators = ::gfl::binding::LossOperators<__VA_ARGS__>;                  \
  constexpr auto& stem##_forward = stem##_operators::forward;                           \
  constexpr auto& stem##_backward = stem##_operators::backward;                         \
  constexpr auto& stem##_forward_and_gradient = stem##_operators::forward_and_gradient; \
  constexpr auto& stem##_finish = stem##_operators::finish;
