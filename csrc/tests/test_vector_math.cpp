// SPDX-License-Identifier: Apache-2.0
// The elementary functions of csrc/cpu/simd/vector_math.h against double precision, over the whole of their range, with
// the fused multiply-add of the wider instruction sets and without. Prints the worst error in units in the last place.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>

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

// Every 16th float of [from, upto], as x and its function's argument sign · x.
template <class F, class Exact> double worst(float from, float upto, float sign, F&& f, Exact&& exact) {
  double found = 0;
  for (uint32_t bits = bits_of(from); bits <= bits_of(upto); bits += 16) {
    const float x = sign * float_of(bits);
    const double error = ulps(f(x), exact(static_cast<double>(x)));
    if (error > found) found = error;
  }
  return found;
}

// Registers of fp16 numbers are converted to the bits of single ones, but for signalling NaNs, which may be quieted.
int wrong_halves() {
  using namespace gfl::portable;
  int failures = 0;
  half_t halves[kLanes];
  float lanes[kLanes];
  for (uint32_t first = 0; first < 0x10000; first += kLanes) {
    for (int j = 0; j < kLanes; ++j) halves[j].bits = static_cast<uint16_t>(first + j);
    load_lanes(halves, kLanes, 0.0f, lanes);
    for (int j = 0; j < kLanes; ++j) {
      const uint32_t quiet = std::isnan(lanes[j]) ? 0x400000u : 0u;
      failures += (bits_of(lanes[j]) | quiet) != (bits_of(load(halves + j)) | quiet);
    }
  }
  // A step that reaches every exponent, and ties: multiples of half an ulp of fp16 are multiples of 2^12 in bits.
  for (const uint32_t step : {0x1000u, 65537u}) {
    for (uint64_t first = 0; first < 1ull << 32; first += static_cast<uint64_t>(kLanes) * step) {
      for (int j = 0; j < kLanes; ++j)
        lanes[j] = float_of(static_cast<uint32_t>(first + j * static_cast<uint64_t>(step)));
      store_lanes(lanes, kLanes, halves);
      for (int j = 0; j < kLanes; ++j) {
        half_t want;
        store(&want, lanes[j]);
        failures += halves[j].bits != want.bits;
      }
    }
  }
  return failures;
}

}  // namespace

int main() {
  using namespace gfl::portable;
  const float least = std::numeric_limits<float>::min();
  const double exp_error = worst(least, 87.0f, -1.0f, exp_of_negative<float>, [](double x) { return std::exp(x); });
  const double up_error = worst(least, 87.0f, 1.0f, exp_of_moderate<float>, [](double x) { return std::exp(x); });
  const double unit_error = worst(least, 1.0f, 1.0f, log1p_of_unit<float>, [](double x) { return std::log1p(x); });
  const double log_error = worst(1.0f, 1e38f, 1.0f, log_of_sum, [](double x) { return std::log(x); });
  const auto less_nothing = [](float x) { return log_less(x, 0.0f); };
  const double less_error = worst(2.0f, 1e38f, 1.0f, less_nothing, [](double x) { return std::log(x); });
  std::printf(
      "worst ulp: exp_of_negative %.2f on [-87, 0], exp_of_moderate %.2f on [0, 87], log1p_of_unit %.2f on [0, 1], "
      "log_of_sum %.2f on [1, 1e38], log_less %.2f of log on [2, 1e38]\n",
      exp_error, up_error, unit_error, log_error, less_error);
  int failures = wrong_halves() + !(exp_error <= 1.1) + !(up_error <= 1.1) + !(less_error <= 2.1) +
                 !(unit_error <= 2.1) + !(log_error <= 2.1);
  failures += exp_of_negative(0.0f) != 1.0f || log1p_of_unit(0.0f) != 0.0f || log_of_sum(1.0f) != 0.0f;
  failures += !(exp_of_negative(-1e30f) < 1.7e-38f) || !std::isnan(exp_of_negative(NAN));
  failures += !std::isnan(log1p_of_unit(NAN)) || !std::isnan(log_of_sum(NAN)) || !std::isnan(log_of_sum(-NAN));
  // Close to the logarithm the difference is exact but for log1p's error, which is that of a number below ln 2.
  for (uint32_t bits = bits_of(1e-12f); bits <= bits_of(1e15f); bits += 4099) {
    const float x = float_of(bits), y = static_cast<float>(std::log(static_cast<double>(x)));
    const double want = std::log(static_cast<double>(x)) - static_cast<double>(y);
    failures += !(std::fabs(log_less(x, y) - want) <= 2e-7);
  }
  failures += !std::isnan(log_less(NAN, 0.0f)) || !std::isnan(log_less(2.0f, NAN));
  // A register's lanes have the bits of single floats.
  for (uint32_t bits = bits_of(1e-30f); bits <= bits_of(100.0f); bits += 4099) {
    const Floats x = splat<Floats>(-float_of(bits));
    failures += exp_of_negative(x)[1] != exp_of_negative(x[1]);
    failures += log1p_of_unit(-x)[2] != log1p_of_unit(-x[2]);
  }
  return failures == 0 ? 0 : 1;
}
