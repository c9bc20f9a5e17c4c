// SPDX-License-Identifier: Apache-2.0
// Quality focal loss on the GPU: one warp a row, lanes stride over the classes.
//
//   pred    [rows, classes]  dtype  read     label [rows] int64 read     target [rows] or [rows, classes] A read
//   loss    [rows]           A      write    grad_pred [rows, classes] dtype write
// Bytes per element: forward sizeof(dtype), backward 2·sizeof(dtype) (the terms are recomputed from the logits).
// Accumulator: float (double for double). Repeatable bit for bit: a lane sums its classes in order, the warp in a fixed tree.
#include "gfl/qfl.h"

#include "focal.h"
#include "launch.h"
#include "scalar.h"
#include "warp.h"

namespace gfl::cuda {
namespace {

constexpr int kRowsPerBlock = 8;
constexpr int64_t kMaxBlocks = 1 << 16;

dim3 grid_for(int64_t rows) {
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

template <class T> __global__ void qfl_forward_kernel(QflInput in, acc_t<T>* loss) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  const A* target = static_cast<const A*>(in.target);
  for (int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y; row < in.rows;
       row += int64_t(gridDim.x) * kRowsPerBlock) {
    const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
    const int64_t label = in.label != nullptr ? in.label[row] : -1;
    const A score = in.label != nullptr ? target[row] : A(0);
    A sum = 0;
    for (int64_t c = threadIdx.x; c < in.classes; c += kWarp) {
      const A t = in.label == nullptr ? target[row * in.classes + c] : (c == label ? score : A(0));
      sum += qfl_term<A>(load(pred + c * in.stride_class), t, beta, in.activated).value;
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) loss[row] = sum;
  }
}

template <class T>
__global__ void qfl_backward_kernel(QflInput in, const acc_t<T>* grad_loss, T* grad_pred, acc_t<T>* grad_target) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  const A* target = static_cast<const A*>(in.target);
  for (int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y; row < in.rows;
       row += int64_t(gridDim.x) * kRowsPerBlock) {
    const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
    const int64_t label = in.label != nullptr ? in.label[row] : -1;
    const bool has_label = label >= 0 && label < in.classes;
    const A score = in.label != nullptr ? target[row] : A(0);
    const A scale = grad_loss[row];
    if (grad_target != nullptr && in.label != nullptr && !has_label && threadIdx.x == 0) grad_target[row] = 0;
    for (int64_t c = threadIdx.x; c < in.classes; c += kWarp) {
      const A t = in.label == nullptr ? target[row * in.classes + c] : (c == label ? score : A(0));
      const Term<A> term = qfl_term<A>(load(pred + c * in.stride_class), t, beta, in.activated);
      if (grad_pred != nullptr) store(grad_pred + row * in.classes + c, scale * term.grad_pred);
      if (grad_target == nullptr) continue;
      if (in.label == nullptr) grad_target[row * in.classes + c] = scale * term.grad_target;
      else if (c == label) grad_target[row] = scale * term.grad_target;
    }
  }
}

}  // namespace

cudaError_t qfl_forward(const QflInput& in, void* loss, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    GFL_LAUNCH(qfl_forward_kernel<T>, grid_for(in.rows), dim3(kWarp, kRowsPerBlock), 0, stream, in,
               static_cast<acc_t<T>*>(loss));
  });
  return cudaGetLastError();
}

cudaError_t qfl_backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    GFL_LAUNCH(qfl_backward_kernel<T>, grid_for(in.rows), dim3(kWarp, kRowsPerBlock), 0, stream, in,
               static_cast<const A*>(grad_loss), static_cast<T*>(grad_pred), static_cast<A*>(grad_target));
  });
  return cudaGetLastError();
}

}  // namespace gfl::cuda
