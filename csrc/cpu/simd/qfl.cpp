// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 on logits that lie side by side, a register of classes at a time. Where no class of a
// register is the label, the shorter term against background serves.
#include "gfl/qfl.h"

#include "focal_terms.h"

namespace gfl::GFL_ISA {
namespace {

// The row's label where it is a class, else one that no class has.
inline int64_t label_of(const QflInput& in, int64_t row) {
  const int64_t label = in.label[row];
  return label >= 0 && label < in.classes ? label : -1 - kLanes;
}

// Calls visit(piece, first class, count, term) along a row; the loss of a class that is not there is 0. `piece` says
// which of the row's kLanes partial sums the classes belong to.
template <class T, class Visit>
inline void for_classes(const QflInput& in, int64_t row, int64_t label, const Visit& visit) {
  const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row;
  const float* target = static_cast<const float*>(in.target);
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0, piece = 0; c < in.classes; c += kWidth, piece = (piece + 1) % (kLanes / kWidth)) {
    const int64_t count = in.classes - c;
    const Floats x = load_floats(pred + c, count, kNothing);
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

struct RowSum {
  Floats parts[kLanes / kWidth] = {};
  float total() {
    for (int count = kLanes / kWidth / 2; count > 0; count /= 2) {
      for (int i = 0; i < count; ++i) parts[i] += parts[i + count];
    }
    return sum_of(parts[0]);
  }
};

template <class T> void forward(const QflInput& in, float* loss, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    RowSum sum;
    for_classes<T>(in, row, in.label == nullptr ? 0 : label_of(in, row),
                   [&](int64_t piece, int64_t, int64_t, const Term& term) { sum.parts[piece] += term.value; });
    loss[row] = sum.total();
  }
}

template <class T>
void backward(const QflInput& in, const float* grad_loss, T* grad_pred, float* grad_target, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = in.label == nullptr ? 0 : label_of(in, row);
    const float scale = grad_loss[row];
    const int64_t first = row * in.classes;
    float by_target = 0.0f;
    for_classes<T>(in, row, label, [&](int64_t, int64_t c, int64_t count, const Term& term) {
      if (grad_pred != nullptr) store_floats(scale * term.grad_pred, count, grad_pred + first + c);
      if (grad_target == nullptr) return;
      if (in.label == nullptr) store_floats(scale * term.grad_target, count, grad_target + first + c);
      else if (label >= c && label < c + kWidth) by_target = scale * term.grad_target[label - c];
    });
    if (grad_target != nullptr && in.label != nullptr) grad_target[row] = by_target;
  }
}

template <class T>
void both(const QflInput& in, const float* scales, float* loss, T* grad_pred, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    RowSum sum;
    const float scale = scales[row];
    T* grad = grad_pred + row * in.classes;
    for_classes<T>(in, row, in.label == nullptr ? 0 : label_of(in, row),
                   [&](int64_t piece, int64_t c, int64_t count, const Term& term) {
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
