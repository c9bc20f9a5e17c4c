// SPDX-License-Identifier: Apache-2.0
// Focal loss on the GPU: α_t (1 − p_t)^γ · BCE(x, t), arXiv 1708.02002 eq. 5; tensors, layout and bytes are in elementwise.h.
#include "gfl/focal.h"

#include "elementwise.h"

namespace gfl::cuda {
namespace {

template <class A> struct FocalTerm {
  A alpha, gamma;
  bool activated;
  GFL_HOST_DEVICE Term<A> operator()(A pred, A target) const {
    return focal_term<A>(pred, target, alpha, gamma, activated);
  }
};

template <class A> FocalTerm<A> term_of(const FocalInput& in) {
  return {static_cast<A>(in.alpha), static_cast<A>(in.gamma), in.activated};
}

}  // namespace

cudaError_t focal_forward(const FocalInput& in, void* loss, cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_forward<T>(in.pred, in.target, in.count, term_of<acc_t<T>>(in), loss, stream);
  });
  return cudaGetLastError();
}

cudaError_t focal_backward(const FocalInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
                              void* grad_target, cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_backward<T>(in.pred, in.target, in.count, term_of<acc_t<T>>(in), grad_loss, grad_stride, grad_pred,
                        grad_target, stream);
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
