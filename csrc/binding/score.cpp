// SPDX-License-Identifier: Apache-2.0
// The losses of class scores: for each loss of terms/score.h the operators gfl::<stem>_fwd and _bwd, one number per row
// or per element; and for all of them gfl::score_loss_fwd, _bwd and _finish, reduced to one number, the gradient
// computed in forward.
#include "gfl/score.h"

#include <ATen/ops/empty_like.h>

#include <string>
#include <tuple>
#include <vector>

#include "operator.h"
#include "terms/score.h"

namespace gfl::binding {
namespace {

constexpr int64_t kElementsPerChunk = 16384;

using Params = at::ArrayRef<double>;
using Pair = std::tuple<at::Tensor, at::Tensor>;
using Strides = int64_t[3];

struct Prepared {
  at::Tensor pred, label, target, weight, norm;  // kept alive while `in` and `scale` point into them
  ScoreInput in{};
  ScoreScale scale{};
};

// [N, C] is one image, [B, C, P] several.
void copy_strides(const at::Tensor& t, Strides& out) {
  out[0] = t.dim() == 3 ? t.stride(0) : 0;
  out[1] = t.stride(1);
  out[2] = t.dim() == 3 ? t.stride(2) : t.stride(0);
}

// Rows of classes: [B, C, P] as [B·P, C].
at::Tensor as_rows(const at::Tensor& t) { return t.dim() == 3 ? t.transpose(1, 2).reshape({-1, t.size(1)}) : t; }

Prepared prepare(const char* loss, const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target,
                 const OptionalTensor& weight, Params params, bool activated) {
  TORCH_CHECK_VALUE(pred.dim() == 2 || pred.dim() == 3, "gfl: `pred` must have shape [N, C] or [B, C, P], got ",
                    pred.sizes());
  const int wanted = score_param_count(loss);
  TORCH_CHECK_VALUE(wanted >= 0, "gfl: `loss` must be the stem of a loss of scores, got ", loss);
  TORCH_CHECK_VALUE(static_cast<int64_t>(params.size()) == wanted, "gfl: `params` of ", loss, " must hold ", wanted,
                    " numbers, got ", params.size());
  const std::vector<int64_t> rows =
      pred.dim() == 3 ? std::vector<int64_t>{pred.size(0), pred.size(2)} : std::vector<int64_t>{pred.size(0)};
  const at::ScalarType acc = accumulator_of(pred);
  check_dtype(target, acc, "target");
  check_device(target, pred, "target");
  Prepared p;
  p.pred = pred;
  p.target = target;
  if (label.has_value()) {
    check_dtype(*label, at::kLong, "label");
    check_device(*label, pred, "label");
    check_shape(*label, rows, "label");
    check_shape(target, rows, "target");
    p.label = label->contiguous();
    p.target = target.contiguous();
  } else {
    check_shape(target, pred.sizes(), "target");
  }
  if (weight.has_value()) {
    check_dtype(*weight, acc, "weight");
    check_device(*weight, pred, "weight");
    check_shape(*weight, rows, "weight");
    p.weight = weight->contiguous();
  }
  // The CPU's kernels and those of rows take rows of one image, with the classes of a target contiguous.
  if (!pred.is_cuda() || pred.dim() == 2) {
    p.pred = as_rows(pred);
    if (!label.has_value()) p.target = as_rows(target);
    if (!pred.is_cuda()) p.target = p.target.contiguous();
  }
  ScoreInput& in = p.in;
  in.loss = loss;
  in.pred = p.pred.const_data_ptr();
  in.dtype = dtype_of(pred, "pred");
  in.images = p.pred.dim() == 3 ? p.pred.size(0) : 1;
  in.classes = p.pred.size(1);
  in.locations = p.pred.dim() == 3 ? p.pred.size(2) : p.pred.size(0);
  copy_strides(p.pred, in.stride);
  in.label = label.has_value() ? p.label.const_data_ptr<int64_t>() : nullptr;
  in.target = p.target.const_data_ptr();
  if (!label.has_value()) copy_strides(p.target, in.target_stride);
  in.weight = weight.has_value() ? p.weight.const_data_ptr() : nullptr;
  std::copy(params.begin(), params.end(), in.params);
  in.activated = activated;
  return p;
}

// --- one number per row or per element ------------------------------------------------------------------------------

// The loss of rows [N, C]; or, element by element, of one class per row in dense memory.
template <class Loss>
Prepared prepare_single(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target, Params params,
                        bool activated) {
  if constexpr (Loss::summed) {
    check_dim(pred, 2, "pred");
    return prepare(Loss::name, pred, label, label.has_value() ? target : target.contiguous(), {}, params, activated);
  } else {
    TORCH_CHECK_VALUE(!label.has_value(), "gfl: `label` is of losses that are summed over the classes alone");
    check_shape(target, pred.sizes(), "target");
    return prepare(Loss::name, pred.contiguous().view({-1, 1}), label, target.contiguous().view({-1, 1}), {}, params,
                   activated);
  }
}

template <class Loss>
at::Tensor forward(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target, Params params,
                   bool activated) {
  const Prepared p = prepare_single<Loss>(pred, label, target, params, activated);
  const auto options = pred.options().dtype(accumulator_of(pred));
  const at::Tensor loss = Loss::summed ? at::empty({pred.size(0)}, options) : at::empty(pred.sizes(), options);
  void* out = loss.mutable_data_ptr();
  if constexpr (Loss::summed) {
    run(pred, p.in.locations, rows_per_chunk(p.in.classes),
        GFL_CUDA_LAUNCH(score_rows, p.in, nullptr, out, nullptr, nullptr),
        [&](int64_t begin, int64_t end) { cpu::score_rows(p.in, nullptr, out, nullptr, nullptr, begin, end); });
  } else {
    run(pred, p.in.locations, kElementsPerChunk,
        GFL_CUDA_LAUNCH(score_elements, p.in, nullptr, 0, out, nullptr, nullptr),
        [&](int64_t begin, int64_t end) { cpu::score_elements(p.in, nullptr, 0, out, nullptr, nullptr, begin, end); });
  }
  return loss;
}

// Whether all elements are one in memory, as in the gradient of a sum or a mean.
bool is_broadcast(const at::Tensor& t) {
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) != 0 && t.size(d) != 1) return false;
  }
  return true;
}

template <class Loss>
Pair backward(const at::Tensor& grad_loss, const at::Tensor& pred, const OptionalTensor& label,
              const at::Tensor& target, Params params, bool activated, Needs2 needs) {
  const Prepared p = prepare_single<Loss>(pred, label, target, params, activated);
  check_shape(grad_loss, Loss::summed ? pred.sizes().slice(0, 1) : pred.sizes(), "grad_loss");
  check_dtype(grad_loss, accumulator_of(pred), "grad_loss");
  check_device(grad_loss, pred, "grad_loss");
  const bool broadcast = !Loss::summed && is_broadcast(grad_loss);
  const at::Tensor grad = broadcast ? grad_loss : grad_loss.contiguous();
  const at::Tensor grad_pred = needs[0] ? at::empty(pred.sizes(), pred.options()) : at::empty({0}, pred.options());
  const at::Tensor grad_target =
      needs[1] ? at::empty(target.sizes(), target.options()) : at::empty({0}, target.options());
  const void* given = grad.const_data_ptr();
  void* out = needs[0] ? grad_pred.mutable_data_ptr() : nullptr;
  void* out_target = needs[1] ? grad_target.mutable_data_ptr() : nullptr;
  if constexpr (Loss::summed) {
    run(pred, p.in.locations, rows_per_chunk(p.in.classes),
        GFL_CUDA_LAUNCH(score_rows, p.in, given, nullptr, out, out_target),
        [&](int64_t begin, int64_t end) { cpu::score_rows(p.in, given, nullptr, out, out_target, begin, end); });
  } else {
    const int64_t stride = broadcast ? 0 : 1;
    run(pred, p.in.locations, kElementsPerChunk,
        GFL_CUDA_LAUNCH(score_elements, p.in, given, stride, nullptr, out, out_target),
        [&](int64_t begin, int64_t end) {
          cpu::score_elements(p.in, given, stride, nullptr, out, out_target, begin, end);
        });
  }
  return {grad_pred, grad_target};
}

void register_losses(torch::Library& m) {
  ScoreLosses::for_each([&](auto kind) {
    using Loss = decltype(kind);
    m.impl((std::string(Loss::name) + "_fwd").c_str(), TORCH_FN(forward<Loss>));
    m.impl((std::string(Loss::name) + "_bwd").c_str(), TORCH_FN(backward<Loss>));
  });
}

TORCH_LIBRARY_IMPL(gfl, CPU, m) { register_losses(m); }
#if defined(GFL_WITH_CUDA)
TORCH_LIBRARY_IMPL(gfl, CUDA, m) { register_losses(m); }
#endif

const EntryPoint entry_points([](pybind11::module_& module) {
  ScoreLosses::for_each([&](auto kind) {
    using Loss = decltype(kind);
    expose(module, (std::string(Loss::name) + "_forward").c_str(), &forward<Loss>);
    expose(module, (std::string(Loss::name) + "_backward").c_str(), &backward<Loss>);
  });
});

// --- reduced to one number ------------------------------------------------------------------------------------------

// One number in the accumulator's dtype on the device of `pred`.
void check_number(const at::Tensor& number, const at::Tensor& pred, const char* argument) {
  check_shape(number, {}, argument);
  check_dtype(number, accumulator_of(pred), argument);
  check_device(number, pred, argument);
}

Prepared prepare_reduced(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& norm, double factor, c10::string_view loss,
                         Params params, bool activated) {
  const char* name = nullptr;  // one that outlives the call, and ends in a zero
  ScoreLosses::find(std::string(loss).c_str(), [&](auto kind, int) {
    using Loss = decltype(kind);
    name = Loss::name;
    TORCH_CHECK_VALUE(Loss::summed || !label.has_value(),
                      "gfl: `label` is of losses that are summed over the classes alone");
  });
  Prepared p = prepare(name != nullptr ? name : "", pred, label, target, weight, params, activated);
  if (norm.has_value()) {
    check_number(*norm, pred, "norm");
    p.norm = *norm;
  }
  p.scale = {factor, norm.has_value() ? p.norm.const_data_ptr() : nullptr};
#if defined(GFL_WITH_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(!pred.is_cuda() || cuda::score_reduced_fits(p.in),
                              "gfl::score_loss on CUDA takes up to 2^31 locations, got ", p.in.images, "×",
                              p.in.locations);
#endif
  return p;
}

// Σ weight · loss of each chunk of rows; `grad`, of pred's shape, gets the gradient times *grad_loss, if there is one.
std::vector<double> walk_on_cpu(const Prepared& p, const void* grad_loss, const at::Tensor* grad) {
  const int64_t chunk = rows_per_chunk(p.in.classes);
  std::vector<double> sums((p.in.locations + chunk - 1) / chunk);
  const bool in_place = grad != nullptr && grad->dim() == 2 && grad->is_contiguous();
  at::Tensor rows;
  if (grad != nullptr) rows = in_place ? *grad : at::empty({p.in.locations, p.in.classes}, grad->options());
  void* out = grad != nullptr ? rows.mutable_data_ptr() : nullptr;
  for_chunks(p.in.locations, chunk, [&](int64_t begin, int64_t end) {
    sums[begin / chunk] = cpu::score_reduced(p.in, p.scale, grad_loss, out, begin, end);
  });
  if (grad != nullptr && !in_place) {
    const bool images = grad->dim() == 3;
    grad->copy_(images ? rows.view({grad->size(0), grad->size(2), grad->size(1)}).transpose(1, 2) : rows);
  }
  return sums;
}

// grad = *grad_loss · d loss/d pred. `grad_stored`: it already holds that of a grad_loss of 1.
void differentiate(const at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& pred, const Prepared& p,
                   bool grad_stored) {
  check_number(grad_loss, pred, "grad_loss");
  check_shape(grad, pred.sizes(), "grad");
  check_dtype(grad, pred.scalar_type(), "grad");
  check_device(grad, pred, "grad");
  const void* given = grad_loss.const_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    Strides stride;
    copy_strides(grad, stride);
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::score_reduced_backward(p.in, p.scale, given, grad_stored, grad.mutable_data_ptr(), stride, stream);
    });
    return;
  }
#endif
  if (!grad_stored || !cpu::score_gradient_stands(p.in, given)) walk_on_cpu(p, given, &grad);
}

}  // namespace

Pair score_loss_forward(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& norm, double factor,
                        c10::string_view loss_name, Params params, bool activated, bool store) {
  const Prepared p = prepare_reduced(pred, label, target, weight, norm, factor, loss_name, params, activated);
  const at::Tensor grad = store ? at::empty_like(pred) : at::empty({0}, pred.options());
  const at::Tensor loss = at::empty({}, pred.options().dtype(accumulator_of(pred)));
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    const at::Tensor workspace = at::empty({cuda::score_reduced_workspace(p.in)}, pred.options().dtype(at::kDouble));
    Strides stride{};
    if (store) copy_strides(grad, stride);
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::score_reduced_forward(p.in, p.scale, workspace.mutable_data_ptr<double>(), loss.mutable_data_ptr(),
                                         store ? grad.mutable_data_ptr() : nullptr, stride, stream);
    });
    return {loss, grad};
  }
#endif
  const std::vector<double> sums = walk_on_cpu(p, nullptr, store ? &grad : nullptr);
  cpu::score_reduced_sum(p.in, p.scale, sums.data(), static_cast<int64_t>(sums.size()), loss.mutable_data_ptr());
  return {loss, grad};
}

at::Tensor score_loss_backward(const at::Tensor& grad_loss, const at::Tensor& pred, const OptionalTensor& label,
                               const at::Tensor& target, const OptionalTensor& weight, const OptionalTensor& norm,
                               double factor, c10::string_view loss_name, Params params, bool activated) {
  const at::Tensor grad = at::empty_like(pred);
  differentiate(grad, grad_loss, pred,
                prepare_reduced(pred, label, target, weight, norm, factor, loss_name, params, activated), false);
  return grad;
}

void score_loss_finish(at::Tensor grad, const at::Tensor& grad_loss, const at::Tensor& pred,
                       const OptionalTensor& label, const at::Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& norm, double factor, c10::string_view loss_name, Params params,
                       bool activated) {
  differentiate(grad, grad_loss, pred,
                prepare_reduced(pred, label, target, weight, norm, factor, loss_name, params, activated), true);
}

GFL_OPERATOR(score_loss_fwd, score_loss_forward)
GFL_OPERATOR(score_loss_bwd, score_loss_backward)
GFL_OPERATOR(score_loss_finish, score_loss_finish)

}  // namespace gfl::binding
