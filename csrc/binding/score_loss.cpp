// SPDX-License-Identifier: Apache-2.0
#include "gfl/score_loss.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "operator.h"

namespace gfl::binding {
namespace {

using Strides = int64_t[3];

struct Prepared {
  at::Tensor pred, label, target, weight;  // kept alive while `in` points into them
  ScoreLossInput in;
};

// [N, C] is one image, [B, C, P] several.
void copy_strides(const at::Tensor& t, Strides& out) {
  out[0] = t.dim() == 3 ? t.stride(0) : 0;
  out[1] = t.stride(1);
  out[2] = t.dim() == 3 ? t.stride(2) : t.stride(0);
}

Prepared prepare(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target,
                 const OptionalTensor& weight, int64_t kind, double alpha, double exponent, bool activated) {
  TORCH_CHECK_VALUE(pred.dim() == 2 || pred.dim() == 3, "gfl: `pred` must have shape [N, C] or [B, C, P], got ",
                    pred.sizes());
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 3, "gfl: `kind` must be in [0, 3], got ", kind);
  const bool images = pred.dim() == 3;
  const std::vector<int64_t> rows =
      images ? std::vector<int64_t>{pred.size(0), pred.size(2)} : std::vector<int64_t>{pred.size(0)};
  const at::ScalarType acc = accumulator_of(pred);
  check_dtype(target, acc, "target");
  check_device(target, pred, "target");
  Prepared p;
  p.pred = pred;
  p.target = target;
  if (label.has_value()) {
    TORCH_CHECK_VALUE(kind == 0, "gfl: `label` is of the quality focal loss alone");
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
  if (!pred.is_cuda()) {
    // The CPU's kernels take rows of one image, with the classes of a target innermost.
    if (images) p.pred = pred.transpose(1, 2).reshape({-1, pred.size(1)});
    if (!label.has_value()) {
      p.target = images ? target.transpose(1, 2).reshape({-1, pred.size(1)}) : target;
      p.target = p.target.contiguous();
      if (kind != 0) p.pred = p.pred.contiguous();
    }
  }
  ScoreLossInput& in = p.in;
  in = {};
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
  in.kind = static_cast<ScoreLoss>(kind);
  in.alpha = alpha;
  in.exponent = exponent;
  in.activated = activated;
  return p;
}

// One number in the accumulator's dtype on the device of `pred`.
void check_number(const at::Tensor& number, const at::Tensor& pred, const char* argument) {
  check_shape(number, {}, argument);
  check_dtype(number, accumulator_of(pred), argument);
  check_device(number, pred, argument);
}

// On the CPU, where reading a number costs nothing.
double number_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

// The factor of the sum, with the norm's epsilon added in the accumulator's dtype, as a tensor would be.
double scale_on_cpu(double factor, const OptionalTensor& norm, const at::Tensor& pred) {
  if (!norm.has_value()) return factor;
  check_number(*norm, pred, "norm");
  const double eps = kScoreNormEps, given = number_of(*norm);
  return factor / (accumulator_of(pred) == at::kDouble ? given + eps
                                                       : double(static_cast<float>(given) + static_cast<float>(eps)));
}

// Σ weight · loss; `grad`, of pred's shape, gets `scale` times its derivative.
double walk_on_cpu(const Prepared& p, double scale, at::Tensor* grad) {
  const ScoreLossInput& in = p.in;
  const int64_t step = rows_per_chunk(in.classes);
  std::vector<double> sums((in.locations + step - 1) / step);
  at::Tensor dense;
  void* out = nullptr;
  if (grad != nullptr) {
    const bool direct = grad->dim() == 2 && grad->is_contiguous();
    dense = direct ? *grad : at::empty({in.locations, in.classes}, grad->options());
    out = dense.mutable_data_ptr();
  }
  for_chunks(in.locations, step, [&](int64_t begin, int64_t end) {
    sums[begin / step] = cpu::score_loss(in, scale, out, begin, end);
  });
  if (grad != nullptr && !dense.is_same(*grad)) {
    grad->copy_(grad->dim() == 2 ? dense : dense.view({grad->size(0), grad->size(2), grad->size(1)}).transpose(1, 2));
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

#if defined(GFL_WITH_CUDA)
ScoreLossScale scale_on_cuda(const Prepared& p, double factor, const OptionalTensor& norm) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::score_loss_fits(p.in), "gfl::score_loss on CUDA takes up to 2^31 locations, got ",
                              p.in.images, "×", p.in.locations);
  if (norm.has_value()) check_number(*norm, p.pred, "norm");
  return {factor, norm.has_value() ? norm->const_data_ptr() : nullptr};
}
#endif

// grad = grad_loss · d loss/d pred, where it does not already hold that: `grad_stored` says that it does if grad_loss is 1.
void differentiate(at::Tensor& grad, const at::Tensor& grad_loss, const at::Tensor& pred, const OptionalTensor& label,
                   const at::Tensor& target, const OptionalTensor& weight, const OptionalTensor& norm, double factor,
                   int64_t kind, double alpha, double exponent, bool activated, bool grad_stored) {
  const Prepared p = prepare(pred, label, target, weight, kind, alpha, exponent, activated);
  check_number(grad_loss, pred, "grad_loss");
  check_shape(grad, pred.sizes(), "grad");
  check_dtype(grad, pred.scalar_type(), "grad");
  check_device(grad, pred, "grad");
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    const ScoreLossScale by = scale_on_cuda(p, factor, norm);
    Strides stride;
    copy_strides(grad, stride);
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::score_loss_backward(p.in, by, grad_loss.const_data_ptr(), grad_stored, grad.mutable_data_ptr(), stride,
                                       stream);
    });
    return;
  }
#endif
  const double arriving = number_of(grad_loss);
  if (grad_stored && arriving == 1.0) return;
  walk_on_cpu(p, arriving * scale_on_cpu(factor, norm, pred), &grad);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> score_loss_forward(const at::Tensor& pred, const OptionalTensor& label,
                                                      const at::Tensor& target, const OptionalTensor& weight,
                                                      const OptionalTensor& norm, double factor, int64_t kind,
                                                      double alpha, double exponent, bool activated, bool store) {
  const Prepared p = prepare(pred, label, target, weight, kind, alpha, exponent, activated);
  at::Tensor grad = store ? at::empty_like(pred) : at::empty({0}, pred.options());
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    const ScoreLossScale by = scale_on_cuda(p, factor, norm);
    const at::Tensor loss = at::empty({}, pred.options().dtype(accumulator_of(pred)));
    const at::Tensor workspace = at::empty({cuda::score_loss_workspace(p.in)}, pred.options().dtype(at::kDouble));
    Strides stride{};
    if (store) copy_strides(grad, stride);
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::score_loss_forward(p.in, by, workspace.mutable_data_ptr<double>(), loss.mutable_data_ptr(),
                                      store ? grad.mutable_data_ptr() : nullptr, stride, stream);
    });
    return {loss, grad};
  }
#endif
  const double scale = scale_on_cpu(factor, norm, pred);
  const double sum = walk_on_cpu(p, scale, store ? &grad : nullptr);
  return {at::scalar_tensor(scale * sum, pred.options().dtype(accumulator_of(pred))), grad};
}

void score_loss_finish(at::Tensor grad, const at::Tensor& grad_loss, const at::Tensor& pred,
                       const OptionalTensor& label, const at::Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& norm, double factor, int64_t kind, double alpha, double exponent,
                       bool activated) {
  differentiate(grad, grad_loss, pred, label, target, weight, norm, factor, kind, alpha, exponent, activated, true);
}

at::Tensor score_loss_backward(const at::Tensor& grad_loss, const at::Tensor& pred, const OptionalTensor& label,
                               const at::Tensor& target, const OptionalTensor& weight, const OptionalTensor& norm,
                               double factor, int64_t kind, double alpha, double exponent, bool activated) {
  at::Tensor grad = at::empty_like(pred);
  differentiate(grad, grad_loss, pred, label, target, weight, norm, factor, kind, alpha, exponent, activated, false);
  return grad;
}

GFL_OPERATOR(score_loss_fwd, score_loss_forward)
GFL_OPERATOR(score_loss_bwd, score_loss_backward)
GFL_OPERATOR(score_loss_finish, score_loss_finish)

}  // namespace gfl::binding
