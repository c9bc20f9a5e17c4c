// SPDX-License-Identifier: Apache-2.0
// The walk that the element-wise losses share on the CPU. `term(pred, target)` gives the value and its derivatives.
#pragma once
#include <cstdint>

#include "terms/focal.h"
#include "terms/scalar.h"

namespace gfl::cpu {

template <class T, class F>
void element_forward(const void* pred, const void* target, const F& term, void* loss, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(pred);
  const A* t = static_cast<const A*>(target);
  A* out = static_cast<A*>(loss);
  for (int64_t i = begin; i < end; ++i) out[i] = term(static_cast<A>(load(x + i)), t[i]).value;
}

template <class T, class F>
void element_backward(const void* pred, const void* target, const F& term, const void* grad_loss, int64_t grad_stride,
                      void* grad_pred, void* grad_target, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* x = static_cast<const T*>(pred);
  const A* t = static_cast<const A*>(target);
  const A* grad = static_cast<const A*>(grad_loss);
  T* out = static_cast<T*>(grad_pred);
  A* out_target = static_cast<A*>(grad_target);
  for (int64_t i = begin; i < end; ++i) {
    const Term<A> result = term(static_cast<A>(load(x + i)), t[i]);
    const A scale = grad[i * grad_stride];
    if (out != nullptr) store(out + i, scale * result.grad_pred);
    if (out_target != nullptr) out_target[i] = scale * result.grad_target;
  }
}

}  // namespace gfl::cpu
