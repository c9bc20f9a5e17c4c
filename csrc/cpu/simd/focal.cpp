// SPDX-License-Identifier: Apache-2.0
// Focal loss with γ = 2 on logits, a register of elements at a time.
#include "gfl/focal.h"

#include "focal_terms.h"

namespace gfl::GFL_ISA {
namespace {

auto term_of(const FocalInput& in) {
  return [alpha = static_cast<float>(in.alpha), unbalanced = in.alpha < 0.0](Floats logit, Floats t) {
    return focal_term(logit, t, alpha, unbalanced);
  };
}

}  // namespace

void focal_forward(const FocalInput& in, float* loss, int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_forward(static_cast<const T*>(in.pred), static_cast<const float*>(in.target), term_of(in), loss, begin, end);
  });
}

void focal_backward(const FocalInput& in, const float* grad_loss, int64_t grad_stride, void* grad_pred, float* grad_target,
                  int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_backward(static_cast<const T*>(in.pred), static_cast<const float*>(in.target), term_of(in), grad_loss,
                     grad_stride, static_cast<T*>(grad_pred), grad_target, begin, end);
  });
}

}  // namespace gfl::GFL_ISA
