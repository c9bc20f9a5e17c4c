// SPDX-License-Identifier: Apache-2.0
// Varifocal loss with γ = 2 on logits, a register of elements at a time.
#include "gfl/vfl.h"

#include "focal_terms.h"

namespace gfl::GFL_ISA {
namespace {

auto term_of(const VflInput& in) {
  return [alpha = static_cast<float>(in.alpha), iou_weighted = in.iou_weighted ? 1.0f : 0.0f](Floats logit, Floats t) {
    return vfl_term(logit, t, alpha, iou_weighted);
  };
}

}  // namespace

void vfl_forward(const VflInput& in, float* loss, int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_forward(static_cast<const T*>(in.pred), static_cast<const float*>(in.target), term_of(in), loss, begin, end);
  });
}

void vfl_backward(const VflInput& in, const float* grad_loss, int64_t grad_stride, void* grad_pred, float* grad_target,
                  int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_backward(static_cast<const T*>(in.pred), static_cast<const float*>(in.target), term_of(in), grad_loss,
                     grad_stride, static_cast<T*>(grad_pred), grad_target, begin, end);
  });
}

}  // namespace gfl::GFL_ISA
