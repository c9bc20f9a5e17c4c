// SPDX-License-Identifier: Apache-2.0
// Losses of class scores down to one number on the CPU: a piece of the rows at a time, small enough that what the single
// losses leave between them stays in the cache, so that memory is walked once.
#include "gfl/score_loss.h"

#include <vector>

#include "gfl/focal.h"
#include "gfl/qfl.h"
#include "gfl/vfl.h"
#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

constexpr int64_t kPiece = 4096;  // elements, unless a row has more

// Rows [begin, end) as an input of their own.
template <class T> ScoreLossInput part(const ScoreLossInput& in, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  ScoreLossInput p = in;
  p.pred = static_cast<const T*>(in.pred) + begin * in.stride[2];
  p.target = static_cast<const A*>(in.target) + begin * (in.label != nullptr ? 1 : in.classes);
  if (in.label != nullptr) p.label = in.label + begin;
  if (in.weight != nullptr) p.weight = static_cast<const A*>(in.weight) + begin;
  p.locations = end - begin;
  return p;
}

template <class A> A weight_of(const ScoreLossInput& in, int64_t row) {
  return in.weight != nullptr ? static_cast<const A*>(in.weight)[row] : A(1);
}

// Quality focal loss gives a number a row.
template <class T> double quality(const ScoreLossInput& in, double scale, T* grad) {
  using A = acc_t<T>;
  const QflInput rows{in.pred,   in.dtype,     in.stride[2], in.stride[1],  in.label,
                      in.target, in.locations, in.classes,   in.exponent, in.activated};
  std::vector<A> loss(in.locations), scales(in.locations);
  for (int64_t row = 0; row < in.locations; ++row) scales[row] = static_cast<A>(scale) * weight_of<A>(in, row);
  if (grad != nullptr) qfl_forward_and_gradient(rows, scales.data(), loss.data(), grad, 0, in.locations);
  else qfl_forward(rows, loss.data(), 0, in.locations);
  double sum = 0;
  for (int64_t row = 0; row < in.locations; ++row) sum += static_cast<double>(weight_of<A>(in, row) * loss[row]);
  return sum;
}

// The others give a number an element: forward(losses, begin, end) and backward(factor, gradient, begin, end).
template <class T, class Forward, class Backward>
double elements(const ScoreLossInput& in, double scale, T* grad, const Forward& forward, const Backward& backward) {
  using A = acc_t<T>;
  const int64_t classes = in.classes, count = in.locations * classes;
  std::vector<A> loss(count);
  forward(loss.data(), 0, count);
  double sum = 0;
  for (int64_t row = 0; row < in.locations; ++row) {
    A of_row = 0;
    for (int64_t c = 0; c < classes; ++c) of_row += loss[row * classes + c];
    sum += static_cast<double>(weight_of<A>(in, row) * of_row);
  }
  if (grad == nullptr) return sum;
  const A factor = static_cast<A>(scale);
  if (in.weight == nullptr) {
    backward(&factor, grad, 0, count);
    return sum;
  }
  for (int64_t row = 0; row < in.locations; ++row) {
    const A by = factor * weight_of<A>(in, row);
    backward(&by, grad, row * classes, (row + 1) * classes);
  }
  return sum;
}

template <class T> double piece(const ScoreLossInput& in, double scale, T* grad) {
  if (in.kind == ScoreLoss::quality) return quality(in, scale, grad);
  const int64_t count = in.locations * in.classes;
  if (in.kind == ScoreLoss::focal) {
    const FocalInput all{in.pred, in.dtype, in.target, count, in.alpha, in.exponent, in.activated};
    return elements(
        in, scale, grad, [&](void* loss, int64_t begin, int64_t end) { focal_forward(all, loss, begin, end); },
        [&](const void* by, T* out, int64_t begin, int64_t end) {
          focal_backward(all, by, 0, out, nullptr, begin, end);
        });
  }
  const bool weighted = in.kind == ScoreLoss::varifocal;
  const VflInput all{in.pred, in.dtype, in.target, count, in.alpha, in.exponent, weighted, in.activated};
  return elements(
      in, scale, grad, [&](void* loss, int64_t begin, int64_t end) { vfl_forward(all, loss, begin, end); },
      [&](const void* by, T* out, int64_t begin, int64_t end) { vfl_backward(all, by, 0, out, nullptr, begin, end); });
}

}  // namespace

double score_loss(const ScoreLossInput& in, double scale, void* grad, int64_t begin, int64_t end) {
  const int64_t step = in.classes > 0 && in.classes < kPiece ? kPiece / in.classes : 1;
  double sum = 0;
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t row = begin; row < end; row += step) {
      T* out = grad != nullptr ? static_cast<T*>(grad) + row * in.classes : nullptr;
      sum += piece(part<T>(in, row, end < row + step ? end : row + step), scale, out);
    }
  });
  return sum;
}

}  // namespace gfl::cpu
