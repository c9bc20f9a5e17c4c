// SPDX-License-Identifier: Apache-2.0
// What a kernel is compiled for: the fast path of one loss of terms/score.h, or the general path of all.
#pragma once
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl::cuda {

// The fast path knows its loss when it is compiled; the general one holds the loss's index among those of one form.
template <class Loss_> struct FastPath : FastParams<Loss_> { using Loss = Loss_; };
template <bool summed> struct GeneralLoss;
template <class A, bool summed> struct General : GeneralParams<A> {
  using Loss = GeneralLoss<summed>;
  int loss;
};
template <bool summed_> struct GeneralLoss {
  static constexpr bool summed = summed_;
  template <class A> static __device__ __forceinline__ Term<A> term(const General<A, summed>& params, A x, A t) {
    return ScoreLosses::term<summed>(params.loss, params, x, t);
  }
  template <class A> static __device__ __forceinline__ Term<A> background(const General<A, summed>& params, A x) {
    return term(params, x, A(0));
  }
};

// Which form a loss has besides the reduced one: one number per row, perhaps with labels, or one per element.
template <class Loss> constexpr bool has_rows = Loss::summed;
template <class Loss> constexpr bool has_elements = !Loss::summed;

// Calls f(parameters) for the loss of `in` over elements of T.
template <class T, class F> void dispatch_loss(const ScoreInput& in, const F& f) {
  using A = acc_t<T>;
  ScoreLosses::find(in.loss, [&](auto kind, int index) {
    using Loss = decltype(kind);
    if constexpr (sizeof(T) < 8) {
      if (is_fast<Loss>(in)) return f(FastPath<Loss>{fast_params<Loss>(in)});
    }
    f(General<A, Loss::summed>{general_params<A>(in), index});
  });
}

}  // namespace gfl::cuda
