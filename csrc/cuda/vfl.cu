// SPDX-License-Identifier: Apache-2.0
// Varifocal loss on the GPU: w · BCE(x, t), w = t or 1 if t > 0 else α|σ(x) − t|^γ, arXiv 2008.13367 eq. 2; tensors, layout and bytes are in elementwise.h.
#include "gfl/vfl.h"

#include "elementwise.h"

namespace gfl::cuda {
namespace {

template <class A> struct VflTerm {
  A alpha, gamma;
  bool iou_weighted, activated;
  GFL_HOST_DEVICE Term<A> operator()(A pred, A target) const {
    return vfl_term<A>(pred, target, alpha, gamma, iou_weighted, activated);
  }
};

template <class A> VflTerm<A> term_of(const VflInput& in) {
  return {static_cast<A>(in.alpha), static_cast<A>(in.gamma), in.iou_weighted, in.activated};
}

}  // namespace

cudaError_t vfl_forward(const VflInput& in, void* loss, cudaStream_t stream) {
  if (in.count == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    element_forward<T>(in.pred, in.target, in.count, term_of<acc_t<T>>(in), loss, stream);
  });
  return cudaGetLastError();
}

cudaError_t vfl_backward(const VflInput& in, const void* grad_loss, int64_t grad_stride, void* grad_pred,
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
