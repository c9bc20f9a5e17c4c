// SPDX-License-Identifier: Apache-2.0
// Quality focal loss as the head's loss takes it, by its exponent alone; the term against background is most of what a
// class map costs.
#pragma once
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl::cuda {

struct FastPath : FastParams<Qfl> { static constexpr bool wide = true; };
template <class A> struct General : GeneralParams<A> { static constexpr bool wide = false; };

// Calls f with the form of the parameters for elements of T.
template <class T, class F> void dispatch_terms(double exponent, bool activated, const F& f) {
  if constexpr (sizeof(T) < 8) {
    if (exponent == FastPath::exponent && !activated) return f(FastPath{});
  }
  General<acc_t<T>> general{};
  general.exponent = static_cast<acc_t<T>>(exponent);
  general.activated = activated;
  f(general);
}

template <class Params, class A> __device__ __forceinline__ Term<A> background_term(const Params& params, A x) {
  return Qfl::background(params, x);
}

}  // namespace gfl::cuda
