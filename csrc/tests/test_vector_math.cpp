// SPDX-License-Identifier: Apache-2.0
// The elementary functions of csrc/cpu/simd/vector_math.h against double precision, over the whole of their range, with the
// fused multiply-add of the wider instruction sets and without. Prints the worst error in units in the last place.
#include <cmath>
#include <cstdio>
#include <cstring>

#define GFL_ISA portable
#include "../cpu/simd/vector_math.h"

namespace {

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// The error in ulps of the exact result's binade.
double ulps(float got, double want) {
  int exponent;
  std::frexp(want, &exponent);
  return std::fabs(got - want) / std::ldexp(1.0, exponent - 24);
}

// Every 16th float of (0, upto], as x and its function's argument sign · x.
template <class F, class Exact> double worst(float upto, float sign, F&& f, Exact&& exact) {
  double found = 0;
  for (uint32_t bits = 0x00800000u; bits <= bits_of(upto); bits += 16) {
    const float x = sign * float_of(bits);
    const double error = ulps(f(x), exact(static_cast<double>(x)));
    if (error > found) found = error;
  }
  return found;
}

}  // namespace

int main() {
  using namespace gfl::portable;
  const double exp_error = worst(87.0f, -1.0f, exp_of_negative, [](double x) { return std::exp(x); });
  const double log_error = worst(1.0f, 1.0f, log1p_of_unit, [](double x) { return std::log1p(x); });
  std::printf("exp_of_negative on [-87, 0]: %.2f ulp; log1p_of_unit on [0, 1]: %.2f ulp\n", exp_error, log_error);
  int failures = !(exp_error <= 1.1) + !(log_error <= 2.0);
  failures += exp_of_negative(0.0f) != 1.0f || log1p_of_unit(0.0f) != 0.0f;
  failures += !(exp_of_negative(-1e30f) < 1.7e-38f) || !std::isnan(exp_of_negative(NAN)) || !std::isnan(log1p_of_unit(NAN));
  return failures == 0 ? 0 : 1;
}
