// SPDX-License-Identifier: Apache-2.0
// Quality focal loss on the CPU: one walk over the logits, rows [begin, end) of the caller's chunk.
//
//   pred    [rows, classes]  dtype  read     label [rows] int64 read     target [rows] or [rows, classes] A read
//   loss    [rows]           A      write    grad_pred [rows, classes] dtype write
// The case that detectors train with, β = 2 on logits side by side, is vector code in simd/qfl.cpp; here is what serves any.
// A row's sum runs over the classes in a fixed order in the accumulator type, so it does not depend on the chunk it is in.
#include "gfl/qfl.h"

#include "terms/focal.h"
#include "isa.h"
#include "terms/scalar.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void qfl_forward(const QflInput& in, float* loss, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void qfl_backward(const QflInput& in, const float* grad_loss, void* grad_pred, float* grad_target,
                                      int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void qfl_forward_and_gradient(const QflInput& in, const float* scales, float* loss, void* grad_pred,
                                                  int64_t begin, int64_t end))
}  // namespace gfl

namespace gfl::cpu {
namespace {

bool vectorised(const QflInput& in) {
  return in.beta == 2.0 && !in.activated && in.stride_class == 1 && in.dtype != DType::f64 &&
         in.classes < std::numeric_limits<int32_t>::max() / 2;
}

template <class A> A target_at(const QflInput& in, int64_t row, int64_t c) {
  const A* target = static_cast<const A*>(in.target);
  if (in.label == nullptr) return target[row * in.classes + c];
  return in.label[row] == c ? target[row] : A(0);
}

template <class T> void forward(const QflInput& in, void* loss, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  for (int64_t row = begin; row < end; ++row) {
    const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
    A sum = 0;
    for (int64_t c = 0; c < in.classes; ++c) {
      sum += qfl_term<A>(load(pred + c * in.stride_class), target_at<A>(in, row, c), beta, in.activated).value;
    }
    static_cast<A*>(loss)[row] = sum;
  }
}

template <class T>
void backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  T* out = static_cast<T*>(grad_pred);
  A* out_target = static_cast<A*>(grad_target);
  for (int64_t row = begin; row < end; ++row) {
    const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
    const A scale = static_cast<const A*>(grad_loss)[row];
    if (out_target != nullptr && in.label != nullptr) out_target[row] = 0;
    for (int64_t c = 0; c < in.classes; ++c) {
      const Term<A> term =
          qfl_term<A>(load(pred + c * in.stride_class), target_at<A>(in, row, c), beta, in.activated);
      if (out != nullptr) store(out + row * in.classes + c, scale * term.grad_pred);
      if (out_target == nullptr) continue;
      if (in.label == nullptr) out_target[row * in.classes + c] = scale * term.grad_target;
      else if (in.label[row] == c) out_target[row] = scale * term.grad_target;
    }
  }
}

}  // namespace

void qfl_forward(const QflInput& in, void* loss, int64_t begin, int64_t end) {
  if (vectorised(in)) { GFL_BY_ISA(qfl_forward, in, static_cast<float*>(loss), begin, end); }
  dispatch(in.dtype, [&](auto t) { forward<decltype(t)>(in, loss, begin, end); });
}

void qfl_backward(const QflInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end) {
  if (vectorised(in)) {
    GFL_BY_ISA(qfl_backward, in, static_cast<const float*>(grad_loss), grad_pred, static_cast<float*>(grad_target), begin,
               end);
  }
  dispatch(in.dtype, [&](auto t) { backward<decltype(t)>(in, grad_loss, grad_pred, grad_target, begin, end); });
}

void qfl_forward_and_gradient(const QflInput& in, const void* scales, void* loss, void* grad_pred, int64_t begin,
                              int64_t end) {
  if (vectorised(in)) {
    GFL_BY_ISA(qfl_forward_and_gradient, in, static_cast<const float*>(scales), static_cast<float*>(loss), grad_pred,
               begin, end);
  }
  qfl_forward(in, loss, begin, end);
  qfl_backward(in, scales, grad_pred, nullptr, begin, end);
}

}  // namespace gfl::cpu
