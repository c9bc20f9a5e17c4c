// SPDX-License-Identifier: Apache-2.0
// IoU losses on the CPU: one loop per kind over the pairs [begin, end) of the caller's chunk.
//
//   pred [rows, 4] dtype read     target [rows, 4] A read     loss [rows] A write
//   grad_pred [rows, 4] dtype write     grad_target [rows, 4] A write
#include "gfl/boxes.h"

#include "terms/iou.h"
#include "terms/scalar.h"

namespace gfl {

bool is_iou_kind(const char* name) {
  return dispatch_iou_kind(name, [](auto) {});
}

namespace cpu {
namespace {

// Calls body(type, term) with the element type and with term(row), the loss and its derivatives.
template <class Body> void with_terms(const IouInput& in, const Body& body) {
  dispatch_iou_kind(in.kind, [&](auto kind) {
    dispatch(in.dtype, [&](auto type) {
      using T = decltype(type);
      using A = acc_t<T>;
      body(type, [&in, kind](int64_t row) {
        const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
        const A* target = static_cast<const A*>(in.target) + row * 4;
        A p[4], t[4];
        for (int i = 0; i < 4; ++i) {
          p[i] = load(pred + i * in.stride_side);
          t[i] = target[i];
        }
        return iou_term(p, t, kind, static_cast<A>(in.eps), static_cast<A>(in.parameter));
      });
    });
  });
}

}  // namespace

void iou_forward(const IouInput& in, void* loss, int64_t begin, int64_t end) {
  with_terms(in, [&](auto type, const auto& term) {
    auto* out = static_cast<acc_t<decltype(type)>*>(loss);
    for (int64_t row = begin; row < end; ++row) out[row] = term(row).value;
  });
}

void iou_backward(const IouInput& in, const void* grad_loss, void* grad_pred, void* grad_target, int64_t begin,
                  int64_t end) {
  with_terms(in, [&](auto type, const auto& term) {
    using T = decltype(type);
    using A = acc_t<T>;
    for (int64_t row = begin; row < end; ++row) {
      const IouTerm<A> pair = term(row);
      const A scale = static_cast<const A*>(grad_loss)[row];
      for (int i = 0; i < 4; ++i) {
        if (grad_pred != nullptr) store(static_cast<T*>(grad_pred) + row * 4 + i, scale * pair.grad_pred[i]);
        if (grad_target != nullptr) static_cast<A*>(grad_target)[row * 4 + i] = scale * pair.grad_target[i];
      }
    }
  });
}

}  // namespace cpu
}  // namespace gfl
