// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 on logits that lie side by side: kLanes classes at a time, one exponential and one
// logarithm an element, the terms of focal.h in a form without branches.
#include "gfl/qfl.h"

#include "vector_math.h"

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
      GFL_LANES(j) {
        const float x = clamp_infinite(lanes.x[j]), t = lanes.t[j];
        const float e = exp_of_negative(-absolute_of(x));
        const float r = 1.0f / (1.0f + e);
        const float difference = (x >= 0.0f ? r : e * r) - t;
        const float bce = (x > 0.0f ? 1.0f - t : -t) * x + log1p_of_unit(e);
        sums[j] += difference * difference * bce;
      }
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
        const float x = clamp_infinite(lanes.x[j]), t = lanes.t[j];
        const float e = exp_of_negative(-absolute_of(x));
        const float r = 1.0f / (1.0f + e);
        const float difference = (x >= 0.0f ? r : e * r) - t;
        const float bce = (x > 0.0f ? 1.0f - t : -t) * x + log1p_of_unit(e);
        const float slope = 2.0f * difference * bce;
        const float square = difference * difference;
        // An infinite logit has no gradient.
        const float finite = x == lanes.x[j] ? 1.0f : (x != x ? x : 0.0f);
        pred[j] = scale * (slope * (e * r * r) + square * difference) * finite;
        target[j] = scale * (square * -x - slope);
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

// fp64 is not served here.
template <class F> void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16: return f(half_t{});
    case DType::bf16: return f(bfloat16_t{});
    default: return f(float{});
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
