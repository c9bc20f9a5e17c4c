// SPDX-License-Identifier: Apache-2.0
// Tensors of the element-wise losses: `pred` of any shape, `target` of the same shape in the accumulator's dtype.
#pragma once
#include "operator.h"

namespace gfl::binding {

constexpr int64_t kElementsPerChunk = 16384;

struct ElementTensors {
  at::Tensor pred, target;  // contiguous, kept alive while pointers into them are used
};

inline ElementTensors element_tensors(const at::Tensor& pred, const at::Tensor& target) {
  dtype_of(pred, "pred");
  check_dtype(target, accumulator_of(pred), "target");
  check_device(target, pred, "target");
  check_shape(target, pred.sizes(), "target");
  return {pred.contiguous(), target.contiguous()};
}

// The gradient that comes in and the two that go out.
struct ElementGradients {
  at::Tensor grad_loss, grad_pred, grad_target;
  int64_t stride;  // of grad_loss: 0 where it is one number spread out, as a sum's or a mean's is
  Needs2 needs;

  ElementGradients(const at::Tensor& grad, const at::Tensor& pred, const at::Tensor& target, Needs2 wanted)
      : needs(wanted) {
    check_shape(grad, pred.sizes(), "grad_loss");
    check_dtype(grad, accumulator_of(pred), "grad_loss");
    check_device(grad, pred, "grad_loss");
    bool spread = true;
    for (int64_t d = 0; d < grad.dim(); ++d) spread = spread && (grad.stride(d) == 0 || grad.size(d) == 1);
    stride = spread ? 0 : 1;
    grad_loss = spread ? grad : grad.contiguous();
    grad_pred = needs[0] ? at::empty(pred.sizes(), pred.options()) : at::empty({0}, pred.options());
    grad_target = needs[1] ? at::empty(target.sizes(), target.options()) : at::empty({0}, target.options());
  }

  const void* loss() const { return grad_loss.const_data_ptr(); }
  void* pred() const { return needs[0] ? grad_pred.mutable_data_ptr() : nullptr; }
  void* target() const { return needs[1] ? grad_target.mutable_data_ptr() : nullptr; }
};

}  // namespace gfl::binding
