// SPDX-License-Identifier: Apache-2.0
// Losses of class scores with the parameters that detectors train with, on logits whose classes are contiguous: one
// register of classes at a time. Rows without a label, and registers that do not hold the label, take the background
// term.
#include <algorithm>

#include "background.h"
#include "terms/score.h"

namespace gfl::GFL_ISA {
namespace {

constexpr int64_t kPiece = 512;  // elements; few enough for a sum in fp32

// One row of the input and of the results; a result that is not wanted is null.
template <class Loss, class T> struct Row {
  FastParams<Loss> params;
  const T* pred;
  int64_t classes;
  int64_t label;        // −1 for background
  const float* target;  // the score at `label`, or the dense targets if `dense`
  bool dense;
  T* grad_pred;
  float* grad_target;  // one number with labels

  Row(const ScoreInput& in, int64_t row, void* grad, void* of_target)
      : params(fast_params<Loss>(in)),
        pred(static_cast<const T*>(in.pred) + row * in.stride[2]),
        classes(in.classes),
        label(in.label == nullptr || in.label[row] < 0 || in.label[row] >= classes ? -1 : in.label[row]),
        target(static_cast<const float*>(in.target) + (in.label == nullptr ? row * classes : row)),
        dense(in.label == nullptr),
        grad_pred(grad == nullptr ? nullptr : static_cast<T*>(grad) + row * classes),
        grad_target(of_target == nullptr ? nullptr : static_cast<float*>(of_target) + (dense ? row * classes : row)) {}

  // `count` elements of a dense map without gaps between rows.
  Row(const ScoreInput& in, int64_t first, int64_t count, void* grad)
      : params(fast_params<Loss>(in)),
        pred(static_cast<const T*>(in.pred) + first),
        classes(count),
        label(-1),
        target(static_cast<const float*>(in.target) + first),
        dense(true),
        grad_pred(grad == nullptr ? nullptr : static_cast<T*>(grad) + first),
        grad_target(nullptr) {}

  // Returns the row's loss, 0 without kLoss. With kGrad also writes `scale` times the gradient of the scores; that of
  // the target is written whenever it is wanted.
  template <bool kLoss, bool kGrad> float walk(float scale) const {
    if (dense) {
      return walk_row<kLoss, kGrad>(pred, classes, scale, grad_pred, [&](int64_t c, Floats x) GFL_INLINED {
        const Term<Floats> term = Loss::term(params, x, load_floats(target + c, classes - c, 0.0f));
        if (grad_target != nullptr) store_floats(scale * term.grad_target, classes - c, grad_target + c);
        return term;
      });
    }
    if (grad_target != nullptr) *grad_target = 0.0f;
    if (label < 0) {
      return walk_row<kLoss, kGrad>(pred, classes, scale, grad_pred,
                                    [&](int64_t, Floats x) GFL_INLINED { return Loss::background(params, x); });
    }
    return walk_row<kLoss, kGrad>(pred, classes, scale, grad_pred, [&](int64_t c, Floats x) GFL_INLINED {
      if (label < c || label >= c + kWidth) return Loss::background(params, x);
      float lanes[kWidth] = {};
      lanes[label - c] = *target;
      const Term<Floats> term = Loss::term(params, x, load_floats(lanes));
      if (grad_target != nullptr) *grad_target = scale * term.grad_target[label - c];
      return term;
    });
  }
};

// Calls f(loss, element) for the loss and the element type of `in`.
template <class F> void dispatch_score(const ScoreInput& in, const F& f) {
  ScoreLosses::find(in.loss, [&](auto loss, int) { dispatch_float(in.dtype, [&](auto t) { f(loss, t); }); });
}

}  // namespace

void score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred, void* grad_target,
                int64_t begin, int64_t end) {
  const float* scales = static_cast<const float*>(grad_loss);
  float* out = static_cast<float*>(loss);
  dispatch_score(in, [&](auto kind, auto t) {
    const auto each = [&](const auto& use) {
      for (int64_t row = begin; row < end; ++row) {
        use(row, Row<decltype(kind), decltype(t)>(in, row, grad_pred, grad_target));
      }
    };
    if constexpr (decltype(kind)::summed) {
      if (out != nullptr) each([&](int64_t row, const auto& r) { out[row] = r.template walk<true, false>(0.0f); });
      else if (grad_pred != nullptr)
        each([&](int64_t row, const auto& r) { r.template walk<false, true>(scales[row]); });
      else each([&](int64_t row, const auto& r) { r.template walk<false, false>(scales[row]); });
    }
  });
}

void score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss, void* grad_pred,
                    void* grad_target, int64_t begin, int64_t end) {
  const float* target = static_cast<const float*>(in.target);
  const float* scales = static_cast<const float*>(grad_loss);
  dispatch_score(in, [&](auto kind, auto t) {
    using Loss = decltype(kind);
    using T = decltype(t);
    const FastParams<Loss> params = fast_params<Loss>(in);
    const auto each = [&](const auto& use) {
      for (int64_t i = begin; i < end; i += kWidth) {
        const Floats x = load_floats(static_cast<const T*>(in.pred) + i, end - i, 0.0f);
        use(i, Loss::term(params, x, load_floats(target + i, end - i, 0.0f)));
      }
    };
    if constexpr (!Loss::summed) {
      if (loss != nullptr) {
        return each([&](int64_t i, const Term<Floats>& term) {
          store_floats(term.value, end - i, static_cast<float*>(loss) + i);
        });
      }
      each([&](int64_t i, const Term<Floats>& term) {
        const Floats scale = grad_stride == 0 ? splat<Floats>(*scales) : load_floats(scales + i, end - i, 0.0f);
        if (grad_pred != nullptr) store_floats(scale * term.grad_pred, end - i, static_cast<T*>(grad_pred) + i);
        if (grad_target != nullptr)
          store_floats(scale * term.grad_target, end - i, static_cast<float*>(grad_target) + i);
      });
    }
  });
}

double score_reduced(const ScoreInput& in, float scale, void* grad, int64_t begin, int64_t end) {
  const float* weights = static_cast<const float*>(in.weight);
  double sum = 0;
  dispatch_score(in, [&](auto kind, auto t) {
    using R = Row<decltype(kind), decltype(t)>;
    const auto walk = [&](const R& row, float weight) {
      const float loss =
          grad != nullptr ? row.template walk<true, true>(scale * weight) : row.template walk<true, false>(0.0f);
      sum += static_cast<double>(weight * loss);
    };
    if (in.label == nullptr && weights == nullptr && in.stride[2] == in.classes) {
      // Rows don't matter to a dense map without weights: take pieces that fill registers, however few its classes.
      for (int64_t i = begin * in.classes; i < end * in.classes; i += kPiece) {
        walk(R(in, i, std::min(kPiece, end * in.classes - i), grad), 1.0f);
      }
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      walk(R(in, row, grad, nullptr), weights != nullptr ? weights[row] : 1.0f);
    }
  });
  return sum;
}

}  // namespace gfl::GFL_ISA
