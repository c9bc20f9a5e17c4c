// SPDX-License-Identifier: Apache-2.0
// Varifocal loss on the CPU: one walk over the elements [begin, end) of the caller's chunk.
//
//   pred [count] dtype read     target [count] A read     loss [count] A write
//   grad_pred [count] dtype write     grad_target [count] A write
#include "gfl/vfl.h"

#include "elementwise.h"
#include "isa.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void vfl_forward(const VflInput& in, float* loss, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void vfl_backward(const VflInput& in, const float* grad_loss, int64_t grad_stride,
                                       void* grad_pred, float* grad_target, int64_t begin, int64_t end))
}  // namespace gfl

namespace gfl::cpu {
namespace {

// What detectors train with is vector code in simd/vfl.cpp; here is what serves any.
bool vectorised(const VflInput& in) { return in.gamma == 2.0 && !in.activated && in.dtype != DType::f64; }

template <class A> auto term_of(const VflInput& in) {
  return [alpha = static_cast<A>(in.alpha), gamma = static_cast<A>(in.gamma), &in](A pred, A target) {
    return vfl_term<A>(pred, target, alpha, gamma, in.iou_weighted, in.activated);
  };
}

}  // namespace

void vfl_forward(const VflInput& in, void* loss, int64_t begin, int64_t end) {
  if (vectorised(in)) { GFL_BY_ISA(vfl_forward, in, static_cast<float*>(loss), begin, end); }
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_forward<T>(in.pred, in.target, term_of<acc_t<T>>(in), loss, begin, end);
  });
}

void vfl_backward(const VflInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
                      void* grad_target, int64_t begin, int64_t end) {
  if (vectorised(in)) {
    GFL_BY_ISA(vfl_backward, in, static_cast<const float*>(grad_loss), grad_stride, grad_pred,
               static_cast<float*>(grad_target), begin, end);
  }
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_backward<T>(in.pred, in.target, term_of<acc_t<T>>(in), grad_loss, grad_stride, grad_pred, grad_target,
                        begin, end);
  });
}

}  // namespace gfl::cpu
