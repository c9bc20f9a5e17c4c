// SPDX-License-Identifier: Apache-2.0
#include "gfl/focal.h"

#include "elementwise.h"

#include "operator.h"

namespace gfl::binding {
namespace {

FocalInput input(const ElementTensors& e, double alpha, double gamma, bool activated) {
  return {e.pred.const_data_ptr(), dtype_of(e.pred, "pred"), e.target.const_data_ptr(), e.pred.numel(), alpha, gamma,
          activated};
}

}  // namespace

at::Tensor focal_forward(const at::Tensor& pred, const at::Tensor& target, double alpha, double gamma, bool activated) {
  const ElementTensors e = element_tensors(pred, target);
  const FocalInput in = input(e, alpha, gamma, activated);
  const at::Tensor loss = at::empty(pred.sizes(), pred.options().dtype(accumulator_of(pred)));
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::focal_forward(in, loss.mutable_data_ptr(), stream); });
    return loss;
  }
#endif
  for_chunks(in.count, kElementsPerChunk,
             [&](int64_t begin, int64_t end) { cpu::focal_forward(in, loss.mutable_data_ptr(), begin, end); });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> focal_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                  const at::Tensor& target, double alpha, double gamma,
                                                  bool activated, Needs2 needs) {
  const ElementTensors e = element_tensors(pred, target);
  const FocalInput in = input(e, alpha, gamma, activated);
  const ElementGradients g(grad_loss, pred, target, needs);
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::focal_backward(in, g.loss(), g.stride, g.pred(), g.target(), stream);
    });
    return {g.grad_pred, g.grad_target};
  }
#endif
  for_chunks(in.count, kElementsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::focal_backward(in, g.loss(), g.stride, g.pred(), g.target(), begin, end);
  });
  return {g.grad_pred, g.grad_target};
}

GFL_OPERATOR(focal_fwd, focal_forward)
GFL_OPERATOR(focal_bwd, focal_backward)

}  // namespace gfl::binding
