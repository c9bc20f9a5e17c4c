// SPDX-License-Identifier: Apache-2.0
// A loss of class scores as the losses of heads take it, by its exponent alone; the term against background is most of
// what a class map costs.
#pragma once
#include "terms/gfl_loss.h"
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl::cuda {

template <class Head_> struct FastPath : FastParams<typename Head_::Score> {
  using Head = Head_;
  static constexpr bool vectorised = true;
};
template <class Head_, class A> struct General : GeneralParams<A> {
  using Head = Head_;
  static constexpr bool vectorised = false;
};

// Calls f with the form of the parameters for elements of T.
template <class Head, class T, class F> void dispatch_terms(double exponent, const F& f) {
  using Loss = typename Head::Score;
  if constexpr (sizeof(T) < 8 && Loss::params == 0) {
    f(FastPath<Head>{});
  } else {
    if constexpr (sizeof(T) < 8) {
      if (exponent == FastPath<Head>::exponent) return f(FastPath<Head>{});
    }
    General<Head, acc_t<T>> general{};
    general.exponent = static_cast<acc_t<T>>(exponent);
    f(general);
  }
}

template <class Params, class A> __device__ __forceinline__ Term<A> background_term(const Params& params, A x) {
  return Params::Head::Score::background(params, x);
}
// Of the class that a positive learns.
template <class Params, class A>
__device__ __forceinline__ Term<A> positive_term(const Params& params, A x, A target) {
  const GeneralParams<A> general{static_cast<A>(params.exponent), A(0), A(0), false};
  return Params::Head::Score::term(general, x, target);
}

}  // namespace gfl::cuda
