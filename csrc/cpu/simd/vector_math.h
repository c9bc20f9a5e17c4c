// SPDX-License-Identifier: Apache-2.0
// Elementary functions that a compiler turns into vector code: no branch, no call, no table.
//
// Loops over kLanes elements at a time call them; -fno-trapping-math lets the compiler turn their conditions into
// blends. Worst errors, measured over every 16th float of the range by csrc/tests/test_vector_math.cpp for each
// instruction set: exp_of_negative 1.1 ulp on [-87, 0]; log1p_of_unit on [0, 1] 1.6 ulp with fused multiply-add and 2.0
// without; log_of_sum on [1, 1e38] the same.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#include "scalar.h"

#if !defined(GFL_ISA)
#error "files in csrc/cpu/simd are compiled once for each instruction set, with GFL_ISA naming it"
#endif

namespace gfl::GFL_ISA {

// Elements that go through a loop together, and partial sums of a row: the same for every instruction set, so that the
// order of a sum does not depend on it.
constexpr int kLanes = 16;

// A loop over the lanes. The pragma keeps the compiler from unrolling it into scalar code before it vectorises.
#define GFL_LANES(j) _Pragma("omp simd") for (int j = 0; j < kLanes; ++j)

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline float absolute_of(float x) { return __builtin_fabsf(x); }

// Infinities become the largest finite floats; NaN stays.
inline float clamp_infinite(float x) {
  constexpr float largest = std::numeric_limits<float>::max();
  x = x > largest ? largest : x;
  return x < -largest ? -largest : x;
}

// e^x for x <= 0. Below −87 the result stays at e^−87 = 1.6e-38, which vanishes in every sum that it appears in.
inline float exp_of_negative(float x) {
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5·2^23 rounds to the nearest integer.
  const float n = multiply_add(x, 1.44269504f, 12582912.0f) - 12582912.0f;
  float r = multiply_add(n, -0.693359375f, x);  // ln 2 in two parts; the first has so few bits that n times it is exact
  r = multiply_add(n, 2.12194440e-4f, r);
  // (e^r − 1 − r) / r² by a minimax polynomial on [−ln2/2, ln2/2], relative error of e^r 3.2e-9.
  float p = 0.0013950600f;
  p = multiply_add(p, r, 0.0083689541f);
  p = multiply_add(p, r, 0.041666206f);
  p = multiply_add(p, r, 0.16666518f);
  p = multiply_add(p, r, 0.5f);
  const float e = multiply_add(p, r * r, r) + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return e * power;
}

// log(1 + e) for e in [0, 1]: e times a minimax polynomial, relative error 4.8e-9.
inline float log1p_of_unit(float e) {
  float p = -0.0032439810f;
  p = multiply_add(p, e, 0.019851264f);
  p = multiply_add(p, e, -0.056959159f);
  p = multiply_add(p, e, 0.10603617f);
  p = multiply_add(p, e, -0.15305570f);
  p = multiply_add(p, e, 0.19675931f);
  p = multiply_add(p, e, -0.24954133f);
  p = multiply_add(p, e, 0.33329964f);
  p = multiply_add(p, e, -0.49999902f);
  return multiply_add(p * e, e, e);
}

// log(x) for x in [1, 2^127]: x is 2^n · m, and both n · ln 2 and log m count upwards, so that nothing cancels.
// NaN stays.
inline float log_of_sum(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t n = static_cast<int32_t>(bits >> 23) - 127;
  bits = static_cast<uint32_t>(127 - n) << 23;
  float inverse;
  std::memcpy(&inverse, &bits, sizeof inverse);
  const float exponent = static_cast<float>(n), m = x * inverse;
  return multiply_add(exponent, 0.693359375f, multiply_add(exponent, -2.12194440e-4f, log1p_of_unit(m - 1.0f)));
}

// The sum of kLanes partial sums, in a fixed tree. Overwrites them.
inline float sum_of_lanes(float* lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// kLanes elements as floats, and back. `count` of them are there; the others are read as `fill` and not written.
template <class T> inline void load_lanes(const T* from, int64_t count, float fill, float* lanes) {
  if (count >= kLanes) {
    GFL_LANES(j) lanes[j] = load(from + j);
    return;
  }
  GFL_LANES(j) lanes[j] = j < count ? load(from + j) : fill;
}

template <class T> inline void store_lanes(const float* lanes, int64_t count, T* to) {
  if (count >= kLanes) {
    GFL_LANES(j) store(to + j, lanes[j]);
    return;
  }
  for (int j = 0; j < count; ++j) store(to + j, lanes[j]);
}

// Calls f with a value of the C++ type that `dtype` names; fp64 does not come here.
template <class F> void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f16: return f(half_t{});
    case DType::bf16: return f(bfloat16_t{});
    default: return f(float{});
  }
}

}  // namespace gfl::GFL_ISA
