// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 on logits that lie side by side: kLanes classes at a time.
#include "gfl/qfl.h"

#include "focal_terms.h"

namespace gfl::GFL_ISA {
namespace {

struct Lanes { float x[kLanes], t[kLanes]; };

// Classes [c, c + kLanes) of a row; missing ones are −∞ with target 0, whose loss is 0.
template <class T> inline void load_row(const QflInput& in, int64_t row, int64_t c, int32_t label, Lanes& lanes) {
  const T* pred = static_cast<const T*>(in.pred) + row * in.stride_row + c;
  const float* target = static_cast<const float*>(in.target);
  const int64_t count = in.classes - c;
  load_lanes(pred, count, -std::numeric_limits<float>::infinity(), lanes.x);
  if (in.label == nullptr) {
    load_lanes(target + row * in.classes + c, count, 0.0f, lanes.t);
  } else {
    const int32_t lane = label - static_cast<int32_t>(c);
    const float score = target[row];
    GFL_LANES(j) lanes.t[j] = j == lane ? score : 0.0f;
  }
}

// The row's label where it is a class, else one that no lane has.
inline int32_t label_of(const QflInput& in, int64_t row) {
  if (in.label == nullptr) return -1;
  const int64_t label = in.label[row];
  return label >= 0 && label < in.classes ? static_cast<int32_t>(label) : -1 - kLanes;
}

template <class T> void forward(const QflInput& in, float* loss, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t label = label_of(in, row);
    float sums[kLanes] = {};
    for (int64_t c = 0; c < in.classes; c += kLanes) {
      Lanes lanes;
      load_row<T>(in, row, c, label, lanes);
      GFL_LANES(j) sums[j] += qfl_term(lanes.x[j], lanes.t[j]).value;
    }
    loss[row] = sum_of_lanes(sums);
  }
}

template <class T>
void backward(const QflInput& in, const float* grad_loss, T* grad_pred, float* grad_target, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t label = label_of(in, row);
    const float scale = grad_loss[row];
    float by_target = 0.0f;
    for (int64_t c = 0; c < in.classes; c += kLanes) {
      Lanes lanes;
      load_row<T>(in, row, c, label, lanes);
      float pred[kLanes], target[kLanes];
      GFL_LANES(j) {
        const Term term = qfl_term(lanes.x[j], lanes.t[j]);
        pred[j] = scale * term.grad_pred;
        target[j] = scale * term.grad_target;
      }
      const int64_t count = in.classes - c;
      if (grad_pred != nullptr) store_lanes(pred, count, grad_pred + row * in.classes + c);
      if (grad_target == nullptr) continue;
      if (in.label == nullptr) store_lanes(target, count, grad_target + row * in.classes + c);
      else if (label >= c && label < c + kLanes) by_target = target[label - c];
    }
    if (grad_target != nullptr && in.label != nullptr) grad_target[row] = by_target;
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

}  // namespace gfl::GFL_ISA
