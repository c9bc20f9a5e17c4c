// SPDX-License-Identifier: Apache-2.0
// The arithmetic of terms/score.h for a register of floats. All of it is free of branches but general_power, which the
// vectorised path never calls, since its exponents have forms of their own.
#pragma once
#include <cmath>

#include "vector_math.h"

namespace gfl::GFL_ISA {

inline Floats absolute(Floats x) { return absolute_of(x); }
inline Floats zero_where(Ints condition, Floats x) { return (Floats)(~condition & (Ints)x); }
inline Ints is_infinite(Floats x) { return absolute_of(x) > std::numeric_limits<float>::max(); }
inline Floats finite_positive_part(Floats x) { return at_most(std::numeric_limits<float>::max(), at_least(0.0f, x)); }
inline Floats reciprocal_of_unit(Floats e) { return 1.0f / (1.0f + e); }
inline Floats sign(Floats x) {
  return x > 0.0f ? splat<Floats>(1.0f) : (x < 0.0f ? splat<Floats>(-1.0f) : splat<Floats>(0.0f));
}
inline Floats general_power(Floats base, float exponent) {
  for (int j = 0; j < kWidth; ++j) base[j] = std::pow(base[j], exponent);
  return base;
}

}  // namespace gfl::GFL_ISA
