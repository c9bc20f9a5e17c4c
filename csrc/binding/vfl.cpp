// SPDX-License-Identifier: Apache-2.0
#include "gfl/vfl.h"

#include "elementwise.h"

#include "operator.h"

namespace gfl::binding {
namespace {

VflInput input(const ElementTensors& e, double alpha, double gamma, bool iou_weighted, bool activated) {
  return {e.pred.const_data_ptr(), dtype_of(e.pred, "pred"), e.target.const_data_ptr(), e.pred.numel(), alpha, gamma,
          iou_weighted, activated};
}

}  // namespace

at::Tensor vfl_forward(const at::Tensor& pred, const at::Tensor& target, double alpha, double gamma, bool iou_weighted, bool activated) {
  const ElementTensors e = element_tensors(pred, target);
  const VflInput in = input(e, alpha, gamma, iou_weighted, activated);
  const at::Tensor loss = at::empty(pred.sizes(), pred.options().dtype(accumulator_of(pred)));
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::vfl_forward(in, loss.mutable_data_ptr(), stream); });
    return loss;
  }
#endif
  for_chunks(in.count, kElementsPerChunk,
             [&](int64_t begin, int64_t end) { cpu::vfl_forward(in, loss.mutable_data_ptr(), begin, end); });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> vfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, double alpha, double gamma,
                                                bool iou_weighted, bool activated, Needs2 needs) {
  const ElementTensors e = element_tensors(pred, target);
  const VflInput in = input(e, alpha, gamma, iou_weighted, activated);
  const ElementGradients g(grad_loss, pred, target, needs);
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::vfl_backward(in, g.loss(), g.stride, g.pred(), g.target(), stream);
    });
    return {g.grad_pred, g.grad_target};
  }
#endif
  for_chunks(in.count, kElementsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::vfl_backward(in, g.loss(), g.stride, g.pred(), g.target(), begin, end);
  });
  return {g.grad_pred, g.grad_target};
}

GFL_OPERATOR(vfl_fwd, vfl_forward)
GFL_OPERATOR(vfl_bwd, vfl_backward)

}  // namespace gfl::binding
