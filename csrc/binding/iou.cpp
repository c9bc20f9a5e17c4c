// SPDX-License-Identifier: Apache-2.0
#include "gfl/iou.h"

#include "operator.h"

namespace gfl::binding {
namespace {

constexpr int64_t kPairsPerChunk = 2048;

struct Prepared {
  at::Tensor target;  // contiguous, kept alive while `in` points into it
  IouInput in;
};

Prepared prepare(const at::Tensor& pred, const at::Tensor& target, int64_t kind, double eps) {
  check_dim(pred, 2, "pred");
  TORCH_CHECK_VALUE(pred.size(1) == 4, "gfl: `pred` must have shape [N, 4], got ", pred.sizes());
  TORCH_CHECK_VALUE(kind >= 0 && kind <= 4, "gfl: `kind` must be within 0 and 4, got ", kind);
  check_dtype(target, accumulator_of(pred), "target");
  check_device(target, pred, "target");
  check_shape(target, pred.sizes(), "target");
  Prepared p;
  p.target = target.contiguous();
  p.in = IouInput{pred.const_data_ptr(), dtype_of(pred, "pred"), pred.stride(0), pred.stride(1),
                  p.target.const_data_ptr(), pred.size(0), static_cast<int>(kind), eps};
  return p;
}

}  // namespace

at::Tensor iou_forward(const at::Tensor& pred, const at::Tensor& target, int64_t kind, double eps) {
  const Prepared p = prepare(pred, target, kind, eps);
  const at::Tensor loss = at::empty({pred.size(0)}, pred.options().dtype(accumulator_of(pred)));
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::iou_forward(p.in, loss.mutable_data_ptr(), stream); });
    return loss;
  }
#endif
  for_chunks(p.in.rows, kPairsPerChunk,
             [&](int64_t begin, int64_t end) { cpu::iou_forward(p.in, loss.mutable_data_ptr(), begin, end); });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> iou_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, int64_t kind, double eps, Needs2 needs) {
  const Prepared p = prepare(pred, target, kind, eps);
  check_shape(grad_loss, {pred.size(0)}, "grad_loss");
  check_dtype(grad_loss, accumulator_of(pred), "grad_loss");
  check_device(grad_loss, pred, "grad_loss");
  const at::Tensor grad = grad_loss.contiguous();
  const at::Tensor grad_pred = needs[0] ? at::empty(pred.sizes(), pred.options()) : at::empty({0}, pred.options());
  const at::Tensor grad_target = needs[1] ? at::empty(target.sizes(), target.options()) : at::empty({0}, target.options());
  void* out = needs[0] ? grad_pred.mutable_data_ptr() : nullptr;
  void* out_target = needs[1] ? grad_target.mutable_data_ptr() : nullptr;
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::iou_backward(p.in, grad.const_data_ptr(), out, out_target, stream);
    });
    return {grad_pred, grad_target};
  }
#endif
  for_chunks(p.in.rows, kPairsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::iou_backward(p.in, grad.const_data_ptr(), out, out_target, begin, end);
  });
  return {grad_pred, grad_target};
}

GFL_OPERATOR(iou_fwd, iou_forward)
GFL_OPERATOR(iou_bwd, iou_backward)

}  // namespace gfl::binding
