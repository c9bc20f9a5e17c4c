// SPDX-License-Identifier: Apache-2.0
// IoU losses on the GPU: one thread per pair of boxes, one kernel per kind.
//
//   pred [rows, 4]      dtype read, any strides     target      [rows, 4] A read      loss [rows] A write
//   grad_pred [rows, 4] dtype write                 grad_target [rows, 4] A write     grad_loss [rows] A read
// Bytes per pair: forward 4·sizeof(dtype) + 5·sizeof(A); backward 8·sizeof(dtype) + 5·sizeof(A), and 4·sizeof(A) more
// where the target's gradient is wanted. A box is one access of 16 bytes (8 for 16-bit types, two for double).
// Accumulator: float (double for double). No pair depends on another, so the bits repeat.
#include "gfl/boxes.h"

#include "fours.h"
#include "terms/iou.h"

namespace gfl::cuda {
namespace {

// Which of the tensors can be moved one row per access.
struct Dense { bool pred, target, grad_pred, grad_target; };

template <class T, class Kind>
__device__ __forceinline__ IouTerm<acc_t<T>> term_of(const IouInput& in, const Dense& dense, int64_t row) {
  using A = acc_t<T>;
  A pred[4], target[4];
  load_four(static_cast<const T*>(in.pred) + row * in.stride_row, in.stride_side, dense.pred, pred);
  load_four(static_cast<const A*>(in.target) + row * 4, 1, dense.target, target);
  return iou_term(pred, target, Kind{}, static_cast<A>(in.eps), static_cast<A>(in.parameter));
}

// minBlocksPerSM of 1: without it ptxas spills around the arctangent of CIoU in fp64 on sm_90.
template <class T, class Kind>
__global__ void __launch_bounds__(kFoursThreads, 1) iou_forward_kernel(IouInput in, Dense dense, acc_t<T>* loss) {
  for (int64_t row = int64_t(blockIdx.x) * kFoursThreads + threadIdx.x; row < in.rows;
       row += int64_t(gridDim.x) * kFoursThreads) {
    loss[row] = term_of<T, Kind>(in, dense, row).value;
  }
}

template <class T, class Kind>
__global__ void __launch_bounds__(kFoursThreads)
    iou_backward_kernel(IouInput in, Dense dense, const acc_t<T>* grad_loss, T* grad_pred, acc_t<T>* grad_target) {
  using A = acc_t<T>;
  for (int64_t row = int64_t(blockIdx.x) * kFoursThreads + threadIdx.x; row < in.rows;
       row += int64_t(gridDim.x) * kFoursThreads) {
    const A scale = grad_loss[row];
    IouTerm<A> term = term_of<T, Kind>(in, dense, row);
    for (int i = 0; i < 4; ++i) {
      term.grad_pred[i] *= scale;
      term.grad_target[i] *= scale;
    }
    if (grad_pred != nullptr) store_four(grad_pred + row * 4, dense.grad_pred, term.grad_pred);
    if (grad_target != nullptr) store_four(grad_target + row * 4, dense.grad_target, term.grad_target);
  }
}

template <class T> Dense dense_of(const IouInput& in, const void* grad_pred, const void* grad_target) {
  using A = acc_t<T>;
  return {in.stride_side == 1 && dense_fours<T>(in.pred, 0, in.stride_row), dense_fours<A>(in.target, 0, 4),
          dense_fours<T>(grad_pred, 0, 4), dense_fours<A>(grad_target, 0, 4)};
}

// Calls body(type, kind) with the element type and the kind's functor.
template <class Body> cudaError_t for_kind(const IouInput& in, const Body& body) {
  if (in.rows == 0) return cudaSuccess;
  const bool known =
      dispatch_iou_kind(in.kind, [&](auto kind) { dispatch(in.dtype, [&](auto type) { body(type, kind); }); });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t iou_forward(const IouInput& in, void* loss, cudaStream_t stream) {
  return for_kind(in, [&](auto type, auto kind) {
    using T = decltype(type);
    GFL_LAUNCH((iou_forward_kernel<T, decltype(kind)>), fours_grid(in.rows), dim3(kFoursThreads), 0, stream, in,
               dense_of<T>(in, nullptr, nullptr), static_cast<acc_t<T>*>(loss));
  });
}

cudaError_t iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target,
                         cudaStream_t stream) {
  return for_kind(in, [&](auto type, auto kind) {
    using T = decltype(type);
    using A = acc_t<T>;
    GFL_LAUNCH((iou_backward_kernel<T, decltype(kind)>), fours_grid(in.rows), dim3(kFoursThreads), 0, stream, in,
               dense_of<T>(in, grad_pred, grad_target), static_cast<const A*>(grad_loss), static_cast<T*>(grad_pred),
               static_cast<A*>(grad_target));
  });
}

}  // namespace gfl::cuda
