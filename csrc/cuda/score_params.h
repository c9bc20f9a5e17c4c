// SPDX-License-Identifier: Apache-2.0
// Which loss of terms/score.h a kernel is compiled for: one by its fast path, or any by the general one.
#pragma once
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl::cuda {

// The loss of the fast path, and any loss, its number beside the general parameters.
template <class Loss_> struct Fast : FastParams<Loss_> { using Loss = Loss_; };
struct AnyLoss;
template <class A> struct AnyScore : GeneralParams<A> {
  using Loss = AnyLoss;
  int loss;
};
struct AnyLoss {
  template <class A> static __device__ __forceinline__ Term<A> term(const AnyScore<A>& params, A x, A t) {
    return ScoreLosses::term(params.loss, params, x, t);
  }
  template <class A> static __device__ __forceinline__ Term<A> background(const AnyScore<A>& params, A x) {
    return term(params, x, A(0));
  }
};

// Which forms a loss has beside the reduced one: losses of rows, which may have labels, or losses of elements.
template <class Loss> constexpr bool has_rows = Loss::summed;
template <class Loss> constexpr bool has_elements = !Loss::summed;
template <> constexpr bool has_rows<AnyLoss> = true;
template <> constexpr bool has_elements<AnyLoss> = true;

// Calls f(parameters) for the loss of `in` over elements of T.
template <class T, class F> void dispatch_loss(const ScoreInput& in, const F& f) {
  using A = acc_t<T>;
  ScoreLosses::find(in.loss, [&](auto kind, int index) {
    using Loss = decltype(kind);
    if constexpr (sizeof(T) < 8) {
      if (is_fast<Loss>(in)) return f(Fast<Loss>{fast_params<Loss>(in)});
    }
    f(AnyScore<A>{general_params<A>(in), index});
  });
}

}  // namespace gfl::cuda
