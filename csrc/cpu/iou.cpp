// SPDX-License-Identifier: Apache-2.0
// IoU losses on the CPU: one walk over the pairs [begin, end) of the caller's chunk.
//
//   pred [rows, 4] dtype read     target [rows, 4] A read     loss [rows] A write
//   grad_pred [rows, 4] dtype write     grad_target [rows, 4] A write
#include "gfl/iou.h"

#include "terms/iou.h"
#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

template <class T> IouTerm<acc_t<T>> term_of(const IouInput& in, int64_t row) {
  using A = acc_t<T>;
  const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
  const A* target = static_cast<const A*>(in.target) + row * 4;
  A p[4], t[4];
  for (int i = 0; i < 4; ++i) {
    p[i] = load(pred + i * in.stride_side);
    t[i] = target[i];
  }
  return iou_term<A>(p, t, static_cast<IouKind>(in.kind), static_cast<A>(in.eps));
}

}  // namespace

void iou_forward(const IouInput& in, void* loss, int64_t begin, int64_t end) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) static_cast<acc_t<T>*>(loss)[row] = term_of<T>(in, row).value;
  });
}

void iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end) {
  dispatch(in.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    for (int64_t row = begin; row < end; ++row) {
      const IouTerm<A> term = term_of<T>(in, row);
      const A scale = static_cast<const A*>(grad_loss)[row];
      for (int i = 0; i < 4; ++i) {
        if (grad_pred != nullptr) store(static_cast<T*>(grad_pred) + row * 4 + i, scale * term.grad_pred[i]);
        if (grad_target != nullptr) static_cast<A*>(grad_target)[row * 4 + i] = scale * term.grad_target[i];
      }
    }
  });
}

}  // namespace gfl::cpu
