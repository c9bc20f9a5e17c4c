// SPDX-License-Identifier: Apache-2.0
#include "gfl/qfl.h"

#include "operator.h"

namespace gfl::binding {
namespace {

struct Prepared {
  at::Tensor label, target;  // contiguous, kept alive while `in` points into them
  QflInput in;
};

Prepared prepare(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target, double beta,
                 bool activated) {
  check_dim(pred, 2, "pred");
  check_dtype(target, accumulator_of(pred), "target");
  check_device(target, pred, "target");
  Prepared p;
  if (label.has_value()) {
    check_dtype(*label, at::kLong, "label");
    check_device(*label, pred, "label");
    check_shape(*label, {pred.size(0)}, "label");
    check_shape(target, {pred.size(0)}, "target");
    p.label = label->contiguous();
  } else {
    check_shape(target, pred.sizes(), "target");
  }
  p.target = target.contiguous();
  p.in = QflInput{pred.const_data_ptr(), dtype_of(pred, "pred"), pred.stride(0), pred.stride(1),
                  label.has_value() ? p.label.const_data_ptr<int64_t>() : nullptr, p.target.const_data_ptr(),
                  pred.size(0), pred.size(1), beta, activated};
  return p;
}

}  // namespace

at::Tensor qfl_forward(const at::Tensor& pred, const OptionalTensor& label, const at::Tensor& target, double beta,
                       bool activated) {
  const Prepared p = prepare(pred, label, target, beta, activated);
  at::Tensor loss = at::empty({pred.size(0)}, pred.options().dtype(accumulator_of(pred)));
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::qfl_forward(p.in, loss.mutable_data_ptr(), stream); });
    return loss;
  }
#endif
  for_chunks(p.in.rows, rows_per_chunk(p.in.classes),
             [&](int64_t begin, int64_t end) { cpu::qfl_forward(p.in, loss.mutable_data_ptr(), begin, end); });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> qfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const OptionalTensor& label, const at::Tensor& target, double beta,
                                                bool activated, Needs2 needs) {
  const Prepared p = prepare(pred, label, target, beta, activated);
  check_shape(grad_loss, {pred.size(0)}, "grad_loss");
  check_dtype(grad_loss, accumulator_of(pred), "grad_loss");
  const at::Tensor grad = grad_loss.contiguous();
  const at::Tensor grad_pred = needs[0] ? at::empty(pred.sizes(), pred.options()) : at::empty({0}, pred.options());
  const at::Tensor grad_target = needs[1] ? at::empty(target.sizes(), target.options()) : at::empty({0}, target.options());
  void* out = needs[0] ? grad_pred.mutable_data_ptr() : nullptr;
  void* out_target = needs[1] ? grad_target.mutable_data_ptr() : nullptr;
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::qfl_backward(p.in, grad.const_data_ptr(), out, out_target, stream);
    });
    return {grad_pred, grad_target};
  }
#endif
  for_chunks(p.in.rows, rows_per_chunk(p.in.classes), [&](int64_t begin, int64_t end) {
    cpu::qfl_backward(p.in, grad.const_data_ptr(), out, out_target, begin, end);
  });
  return {grad_pred, grad_target};
}

GFL_OPERATOR(qfl_fwd, qfl_forward)
GFL_OPERATOR(qfl_bwd, qfl_backward)

}  // namespace gfl::binding
