// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 on logits that lie side by side, a register of classes at a time. Rows without a label go
// the short way of background.h, and in rows with one the registers that do not hold it.
#include "gfl/qfl.h"

#include "background.h"

namespace gfl::GFL_ISA {
namespace {

inline bool is_background(const QflInput& in, int64_t row) {
  return in.label != nullptr && (in.label[row] < 0 || in.label[row] >= in.classes);
}

template <class T> inline const T* logits_of(const QflInput& in, int64_t row) {
  return static_cast<const T*>(in.pred) + row * in.stride_row;
}

// Calls visit(piece, first class, count, term) along a row; the loss of a class that is not there is 0. `piece` says
// which of the row's kLanes partial sums the classes belong to.
template <class T, class Visit>
inline void for_classes(const QflInput& in, int64_t row, const Visit& visit) {
  const T* pred = logits_of<T>(in, row);
  const int64_t label = in.label == nullptr ? -1 : in.label[row];
  const float* target = static_cast<const float*>(in.target);
  for (int64_t c = 0, piece = 0; c < in.classes; c += kWidth, piece = (piece + 1) % kParts) {
    const int64_t count = in.classes - c;
    const Floats x = load_floats(pred + c, count, kNoLogit);
    if (in.label == nullptr) {
      visit(piece, c, count, qfl_term(x, load_floats(target + row * in.classes + c, count, 0.0f)));
    } else if (label >= c && label < c + kWidth) {
      float lanes[kWidth] = {};
      lanes[label - c] = target[row];
      visit(piece, c, count, qfl_term(x, load_floats(lanes)));
    } else {
      visit(piece, c, count, background_term(x));
    }
  }
}

template <class T> void forward(const QflInput& in, float* loss, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (is_background(in, row)) {
      loss[row] = background_row<true, false, T>(logits_of<T>(in, row), in.classes, 0.0f, nullptr);
      continue;
    }
    RowSum sum;
    for_classes<T>(in, row, [&](int64_t piece, int64_t, int64_t, const Term& term) { sum.parts[piece] += term.value; });
    loss[row] = sum.total();
  }
}

template <class T>
void backward(const QflInput& in, const float* grad_loss, T* grad_pred, float* grad_target, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float scale = grad_loss[row];
    const int64_t first = row * in.classes;
    if (is_background(in, row)) {
      if (grad_pred != nullptr) {
        background_row<false, true>(logits_of<T>(in, row), in.classes, scale, grad_pred + first);
      }
      if (grad_target != nullptr) grad_target[row] = 0.0f;
      continue;
    }
    for_classes<T>(in, row, [&](int64_t, int64_t c, int64_t count, const Term& term) {
      if (grad_pred != nullptr) store_floats(scale * term.grad_pred, count, grad_pred + first + c);
      if (grad_target == nullptr) return;
      if (in.label == nullptr) {
        store_floats(scale * term.grad_target, count, grad_target + first + c);
      } else if (in.label[row] >= c && in.label[row] < c + kWidth) {
        grad_target[row] = scale * term.grad_target[in.label[row] - c];
      }
    });
  }
}

template <class T>
void both(const QflInput& in, const float* scales, float* loss, T* grad_pred, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float scale = scales[row];
    T* grad = grad_pred + row * in.classes;
    if (is_background(in, row)) {
      loss[row] = background_row<true, true>(logits_of<T>(in, row), in.classes, scale, grad);
      continue;
    }
    RowSum sum;
    for_classes<T>(in, row, [&](int64_t piece, int64_t c, int64_t count, const Term& term) {
      sum.parts[piece] += term.value;
      store_floats(scale * term.grad_pred, count, grad + c);
    });
    loss[row] = sum.total();
  }
}

}  // namespace

void qfl_forward(const QflInput& in, float* loss, int64_t begin, int64_t end) {
  dispatch_float(in.dtype, [&](auto t) { forward<decltype(t)>(in, loss, begin, end); });
}

void qfl_backward(const QflInput& in, const float* grad_loss, void* grad_pred, float* grad_target, int64_t begin,
                  int64_t end) {
  dispatch_float(in.dtype, [&](auto t) {
    backward(in, grad_loss, static_cast<decltype(t)*>(grad_pred), grad_target, begin, end);
  });
}

void qfl_forward_and_gradient(const QflInput& in, const float* scales, float* loss, void* grad_pred, int64_t begin,
                              int64_t end) {
  dispatch_float(in.dtype, [&](auto t) { both(in, scales, loss, static_cast<decltype(t)*>(grad_pred), begin, end); });
}

}  // namespace gfl::GFL_ISA
