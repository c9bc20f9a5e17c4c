// SPDX-License-Identifier: Apache-2.0
// Losses of class scores on the CPU: the rows or elements [begin, end) of the caller's chunk.
//
//   pred [rows, classes] dtype read   label [rows] int64 read   target [rows] or [rows, classes] A read
//   loss [rows] A write   grad_pred [rows, classes] dtype write   grad_target as target A write
// The fast path, with the parameters that detectors train with, is in simd/score.cpp; this file has the general one:
// any exponent, probabilities, fp64 and any stride. A row's sum runs over the classes in order in the accumulator type,
// whatever chunk it is in.
#include "gfl/score.h"

#include "isa.h"
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred,
                                    void* grad_target, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss,
                                        void* grad_pred, void* grad_target, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(double score_reduced(const ScoreInput& in, float scale, void* grad, int64_t begin, int64_t end))

int score_param_count(const char* loss) {
  int count = -1;
  ScoreLosses::find(loss, [&](auto kind, int) { count = decltype(kind)::params; });
  return count;
}

namespace cpu {
namespace {

bool vectorised(const ScoreInput& in) {
  bool fast = false;
  ScoreLosses::find(in.loss, [&](auto kind, int) { fast = is_fast<decltype(kind)>(in); });
  return fast && in.stride[1] == 1;
}

double number_of(const ScoreInput& in, const void* number) {
  return in.dtype == DType::f64 ? *static_cast<const double*>(number) : double{*static_cast<const float*>(number)};
}

// The norm's epsilon is added in A, as a tensor would be.
double scale_of(const ScoreInput& in, const ScoreScale& scale) {
  if (scale.norm == nullptr) return scale.factor;
  const double norm = number_of(in, scale.norm);
  if (in.dtype == DType::f64) return scale.factor / (norm + kScoreNormEps);
  return scale.factor / double{static_cast<float>(norm) + static_cast<float>(kScoreNormEps)};
}

template <class Loss, class T> struct GeneralWalk {
  using A = acc_t<T>;
  const ScoreInput& in;
  GeneralParams<A> params;
  T* grad_pred;
  A* grad_target;

  // Returns the loss of a row, and writes `scale` times its gradients where they are wanted.
  A row(int64_t row, A scale) const {
    const T* pred = static_cast<const T*>(in.pred) + row * in.stride[2];
    const A* target = static_cast<const A*>(in.target);
    const bool sparse = in.label != nullptr;
    if (sparse && grad_target != nullptr) grad_target[row] = 0;
    A sum = 0;
    for (int64_t c = 0; c < in.classes; ++c) {
      const int64_t i = row * in.classes + c;
      const bool own = sparse && in.label[row] == c;
      const A t = !sparse ? target[i] : own ? target[row] : A(0);
      const Term<A> term = Loss::term(params, static_cast<A>(load(pred + c * in.stride[1])), t);
      sum += term.value;
      if (grad_pred != nullptr) store(grad_pred + i, scale * term.grad_pred);
      if (grad_target == nullptr) continue;
      if (!sparse) grad_target[i] = scale * term.grad_target;
      else if (own) grad_target[row] = scale * term.grad_target;
    }
    return sum;
  }
};

template <class F> void general(const ScoreInput& in, void* grad_pred, void* grad_target, const F& f) {
  ScoreLosses::find(in.loss, [&](auto kind, int) {
    dispatch(in.dtype, [&](auto t) {
      using T = decltype(t);
      using A = acc_t<T>;
      f(GeneralWalk<decltype(kind), T>{in, general_params<A>(in), static_cast<T*>(grad_pred),
                                       static_cast<A*>(grad_target)},
        A{});
    });
  });
}

}  // namespace

void score_rows(const ScoreInput& in, const void* grad_loss, void* loss, void* grad_pred, void* grad_target,
                int64_t begin, int64_t end) {
  if (vectorised(in)) {
    GFL_BY_ISA(score_rows, in, grad_loss, loss, grad_pred, grad_target, begin, end);
  }
  score_elements(in, grad_loss, 1, loss, grad_pred, grad_target, begin, end);
}

void score_elements(const ScoreInput& in, const void* grad_loss, int64_t grad_stride, void* loss, void* grad_pred,
                    void* grad_target, int64_t begin, int64_t end) {
  if (in.classes == 1 && vectorised(in)) {
    GFL_BY_ISA(score_elements, in, grad_loss, grad_stride, loss, grad_pred, grad_target, begin, end);
  }
  general(in, grad_pred, grad_target, [&](const auto& walk, auto zero) {
    using A = decltype(zero);
    for (int64_t row = begin; row < end; ++row) {
      const A scale = grad_loss != nullptr ? static_cast<const A*>(grad_loss)[row * grad_stride] : zero;
      const A value = walk.row(row, scale);
      if (loss != nullptr) static_cast<A*>(loss)[row] = value;
    }
  });
}

double score_reduced(const ScoreInput& in, const ScoreScale& given, const void* grad_loss, void* grad, int64_t begin,
                     int64_t end) {
  const double scale = scale_of(in, given) * (grad_loss != nullptr ? number_of(in, grad_loss) : 1.0);
  if (vectorised(in)) {
    GFL_BY_ISA(score_reduced, in, static_cast<float>(scale), grad, begin, end);
  }
  double sum = 0;
  general(in, grad, nullptr, [&](const auto& walk, auto zero) {
    using A = decltype(zero);
    for (int64_t row = begin; row < end; ++row) {
      const A weight = in.weight != nullptr ? static_cast<const A*>(in.weight)[row] : A(1);
      sum += static_cast<double>(weight * walk.row(row, static_cast<A>(scale) * weight));
    }
  });
  return sum;
}

void score_reduced_sum(const ScoreInput& in, const ScoreScale& scale, const double* sums, int64_t count, void* loss) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += sums[i];
  total *= scale_of(in, scale);
  if (in.dtype == DType::f64) *static_cast<double*>(loss) = total;
  else *static_cast<float*>(loss) = static_cast<float>(total);
}

bool score_gradient_stands(const ScoreInput& in, const void* grad_loss) { return number_of(in, grad_loss) == 1.0; }

}  // namespace cpu
}  // namespace gfl
