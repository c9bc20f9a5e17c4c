// SPDX-License-Identifier: Apache-2.0
// The kernels that the element-wise losses share on the GPU: one thread an element, blocks stride over the rest.
//
//   pred [count] dtype read     target [count] A read     loss [count] A write     grad_loss [count] or [1] A read
//   grad_pred [count] dtype write     grad_target [count] A write
// Bytes per element: forward sizeof(dtype) + 2·sizeof(A); backward 2·sizeof(dtype) + 2·sizeof(A), less where the gradient
// is one number, more where that of the target is wanted. Accumulator: float (double for double). No element depends on
// another, so the bits repeat.
#pragma once
#include <cstdint>

#include "terms/focal.h"
#include "launch.h"
#include "terms/scalar.h"

namespace gfl::cuda {

constexpr int kElementThreads = 256;
constexpr int64_t kElementMaxBlocks = 1 << 16;

inline dim3 element_grid(int64_t count) {
  const int64_t blocks = (count + kElementThreads - 1) / kElementThreads;
  return dim3(static_cast<unsigned>(blocks < kElementMaxBlocks ? blocks : kElementMaxBlocks));
}

// `F` is a functor: term(pred, target) gives the value and its derivatives.
template <class T, class F>
__global__ void element_forward_kernel(const T* pred, const acc_t<T>* target, int64_t count, F term, acc_t<T>* loss) {
  using A = acc_t<T>;
  for (int64_t i = int64_t(blockIdx.x) * kElementThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kElementThreads) {
    loss[i] = term(static_cast<A>(load(pred + i)), target[i]).value;
  }
}

template <class T, class F>
__global__ void element_backward_kernel(const T* pred, const acc_t<T>* target, int64_t count, F term,
                                        const acc_t<T>* grad_loss, int64_t grad_stride, T* grad_pred,
                                        acc_t<T>* grad_target) {
  using A = acc_t<T>;
  for (int64_t i = int64_t(blockIdx.x) * kElementThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kElementThreads) {
    const Term<A> result = term(static_cast<A>(load(pred + i)), target[i]);
    const A scale = grad_loss[i * grad_stride];
    if (grad_pred != nullptr) store(grad_pred + i, scale * result.grad_pred);
    if (grad_target != nullptr) grad_target[i] = scale * result.grad_target;
  }
}

template <class T, class F>
void element_forward(const void* pred, const void* target, int64_t count, const F& term, void* loss,
                     cudaStream_t stream) {
  GFL_LAUNCH((element_forward_kernel<T, F>), element_grid(count), dim3(kElementThreads), 0, stream,
             static_cast<const T*>(pred), static_cast<const acc_t<T>*>(target), count, term,
             static_cast<acc_t<T>*>(loss));
}

template <class T, class F>
void element_backward(const void* pred, const void* target, int64_t count, const F& term, const void* grad_loss,
                      int64_t grad_stride, void* grad_pred, void* grad_target, cudaStream_t stream) {
  GFL_LAUNCH((element_backward_kernel<T, F>), element_grid(count), dim3(kElementThreads), 0, stream,
             static_cast<const T*>(pred), static_cast<const acc_t<T>*>(target), count, term,
             static_cast<const acc_t<T>*>(grad_loss), grad_stride, static_cast<T*>(grad_pred),
             static_cast<acc_t<T>*>(grad_target));
}

}  // namespace gfl::cuda
