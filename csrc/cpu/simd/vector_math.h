// SPDX-License-Identifier: Apache-2.0
// Elementary functions that a compiler turns into vector code: no branch, no call, no table.
//
// Loops over kLanes elements at a time call them; -fno-trapping-math lets the compiler turn their conditions into
// blends. Worst errors, measured over every 16th float of the range by csrc/tests/test_vector_math.cpp for each
// instruction set: exp_of_negative 1.1 ulp on [-87, 0], exp_of_moderate the same on [-87, 87]; log1p_of_unit on [0, 1]
// 1.7 ulp with fused multiply-add and 2.1 without; log_of_sum on [1, 1e38] the same.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "terms/log1p.h"
#include "terms/scalar.h"

#if !defined(GFL_ISA)
#error "files in csrc/cpu/simd are compiled once for each instruction set, with GFL_ISA naming it"
#endif

namespace gfl::GFL_ISA {

// Elements that go through a loop together, and partial sums of a row: the same for every instruction set, so that the
// order of a sum does not depend on it.
constexpr int kLanes = 16;

// A loop over the lanes. The pragma keeps the compiler from unrolling it into scalar code before it vectorises.
#define GFL_LANES(j) _Pragma("omp simd") for (int j = 0; j < kLanes; ++j)

// One register of floats. What is written over `F` serves it and a single float, with the same bits.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;  // registers that kLanes fill
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Ints = int32_t __attribute__((vector_size(4 * kWidth)));
using Bits = uint32_t __attribute__((vector_size(4 * kWidth)));

template <class F> inline F splat(float x) { return F{} + x; }

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__FMA__) && defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
template <class F> inline F multiply_add(F a, F b, float c) { return multiply_add(a, b, splat<F>(c)); }

inline float absolute_of(float x) { return __builtin_fabsf(x); }
inline Floats absolute_of(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// `x` times the power of two whose exponent lies in the lowest bits of `shifted`, where both are normal numbers.
inline float times_power(float x, float shifted) {
  uint32_t bits, exponent;
  std::memcpy(&bits, &x, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline Floats times_power(Floats x, Floats shifted) { return (Floats)((Bits)x + ((Bits)shifted << 23)); }

// A bound that NaN passes: the instructions return their second operand then.
inline float at_most(float limit, float x) { return limit < x ? limit : x; }
inline float at_least(float limit, float x) { return limit > x ? limit : x; }
#if defined(__FMA__) && defined(__AVX512F__)
// With all lanes masked in: the plain form makes GCC 12 warn of the register that it never reads.
inline Floats at_most(float limit, Floats x) { return _mm512_maskz_min_ps(0xffff, splat<Floats>(limit), x); }
inline Floats at_least(float limit, Floats x) { return _mm512_maskz_max_ps(0xffff, splat<Floats>(limit), x); }
#elif defined(__FMA__)
inline Floats at_most(float limit, Floats x) { return _mm256_min_ps(splat<Floats>(limit), x); }
inline Floats at_least(float limit, Floats x) { return _mm256_max_ps(splat<Floats>(limit), x); }
#else
inline Floats at_most(float limit, Floats x) { return x > limit ? splat<Floats>(limit) : x; }
inline Floats at_least(float limit, Floats x) { return x < limit ? splat<Floats>(limit) : x; }
#endif

inline Floats larger_of(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX__)
  return _mm256_sqrt_ps(x);
#else
  for (int j = 0; j < kWidth; ++j) x[j] = __builtin_sqrtf(x[j]);
  return x;
#endif
}
inline bool any_of(Ints condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)condition) != 0;
#else
  return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}

// Infinities become the largest finite floats; NaN stays.
template <class F> inline F clamp_infinite(F x) {
  constexpr float largest = std::numeric_limits<float>::max();
  return at_least(-largest, at_most(largest, x));
}

// e^x where it is a normal number, for x in [−87, 87].
template <class F> inline F exp_of_moderate(F x) {
  // Adding 1.5·2^23 rounds to the nearest integer, and leaves it in the lowest bits.
  const F shifted = multiply_add(x, splat<F>(1.44269504f), 12582912.0f);
  const F n = shifted - 12582912.0f;
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  F r = multiply_add(n, splat<F>(-0.693359375f), x);
  r = multiply_add(n, splat<F>(2.12194440e-4f), r);
  // (e^r − 1 − r) / r² by a minimax polynomial on [−ln2/2, ln2/2], relative error of e^r 3.2e-9.
  // Pairs of terms first: the chain of operations is shorter than that of Horner's form.
  const F r2 = r * r;
  const F high = multiply_add(splat<F>(0.0013950600f), r2, multiply_add(r, splat<F>(0.0083689541f), 0.041666206f));
  const F p = multiply_add(high, r2, multiply_add(r, splat<F>(0.16666518f), 0.5f));
  return times_power(multiply_add(p, r2, r) + 1.0f, shifted);
}

// e^x for x <= 0; 0 below −87, where the result would vanish in every sum that it appears in.
template <class F> inline F exp_of_negative(F x) {
  const F e = exp_of_moderate(x);
  return x < -87.0f ? splat<F>(0.0f) : e;
}

// log(1 + e) for e in [0, 1], by the polynomial of terms/log1p.h.
template <class F> inline F log1p_of_unit(F e) {
  // In pairs, as above.
  const F e2 = e * e, e4 = e2 * e2;
  const F p01 = multiply_add(e, splat<F>(Log1p::c2), Log1p::c1);
  const F p23 = multiply_add(e, splat<F>(Log1p::c4), Log1p::c3);
  const F p45 = multiply_add(e, splat<F>(Log1p::c6), Log1p::c5);
  const F p67 = multiply_add(e, splat<F>(Log1p::c8), Log1p::c7);
  const F low = multiply_add(p23, e2, p01);
  const F high = multiply_add(multiply_add(e2, splat<F>(Log1p::c9), p67), e2, p45);
  return multiply_add(multiply_add(high, e4, low), e2, e);
}

// x >= 2^-126 as 2^n · m with m in [1, 2).
struct Parts { float n, m; };
inline Parts parts_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t n = static_cast<int32_t>(bits >> 23) - 127;
  bits = static_cast<uint32_t>(127 - n) << 23;
  float inverse;
  std::memcpy(&inverse, &bits, sizeof inverse);
  return {static_cast<float>(n), x * inverse};
}

// log(x) for x in [1, 2^127]: x is 2^n · m, and both n · ln 2 and log m count upwards, so that nothing cancels.
// NaN stays.
inline float log_of_sum(float x) {
  const Parts x_is = parts_of(x);
  const float above = multiply_add(x_is.n, -2.12194440e-4f, log1p_of_unit(x_is.m - 1.0f));
  return multiply_add(x_is.n, 0.693359375f, above);
}

// log(x) − y, where y may be close to the logarithm: n · ln 2 goes off y first, which loses nothing.
inline float log_less(float x, float y) {
  const Parts x_is = parts_of(x);
  const float rest = multiply_add(x_is.n, 2.12194440e-4f, multiply_add(x_is.n, -0.693359375f, y));
  return log1p_of_unit(x_is.m - 1.0f) - rest;
}

// The sum of a register's floats: in a tree, halves first, which goes on with the order of the tree that adds up the
// registers of kLanes partial sums.
inline float sum_of(Floats x) {
#if defined(__clang__)
  for (int width = kWidth / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) x[j] += x[j + width];
  }
#else
  Ints lane;
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  for (int width = kWidth / 2; width > 0; width /= 2) x += __builtin_shuffle(x, lane + width);
#endif
  return x[0];
}

// kWidth elements as floats, and back. fp16 by the CPU's own conversions where it has them, which give the bits of
// terms/scalar.h but for quieting a signalling NaN.
inline Floats load_floats(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Floats load_floats(const bfloat16_t* from) {
  uint16_t __attribute__((vector_size(2 * kWidth))) bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Bits) << 16);
}
inline Floats load_floats(const half_t* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  float lanes[kWidth];
  _Pragma("omp simd") for (int j = 0; j < kWidth; ++j) lanes[j] = load(from + j);
  return load_floats(lanes);
#endif
}
inline void store_floats(Floats v, float* to) { std::memcpy(to, &v, sizeof v); }
template <class T> inline void store_floats(Floats v, T* to) {
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof v);
  _Pragma("omp simd") for (int j = 0; j < kWidth; ++j) store(to + j, lanes[j]);
}
#if defined(__F16C__)
inline void store_floats(Floats v, half_t* to) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  // Every NaN becomes the one with all bits set, and keeps its sign.
  v = (Floats)((Ints)v | ((Ints)(v != v) & 0x7fffffff));
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, v, kNearest));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, kNearest));
#endif
}
#endif

// kLanes elements as floats, and back. `count` of them are there; the others are read as `fill` and not written.
template <class T> inline void load_lanes(const T* from, int64_t count, float fill, float* lanes) {
  if (count >= kLanes) {
    for (int k = 0; k < kLanes; k += kWidth) store_floats(load_floats(from + k), lanes + k);
    return;
  }
  GFL_LANES(j) lanes[j] = j < count ? load(from + j) : fill;
}

template <class T> inline void store_lanes(const float* lanes, int64_t count, T* to) {
  if (count >= kLanes) {
    for (int k = 0; k < kLanes; k += kWidth) store_floats(load_floats(lanes + k), to + k);
    return;
  }
  for (int j = 0; j < count; ++j) store(to + j, lanes[j]);
}

// The same where only `count` of them are there; the others are read as `fill` and not written.
template <class T> inline Floats load_floats(const T* from, int64_t count, float fill) {
  if (count >= kWidth) return load_floats(from);
  float lanes[kWidth];
  for (int j = 0; j < kWidth; ++j) lanes[j] = j < count ? load(from + j) : fill;
  return load_floats(lanes);
}
template <class T> inline void store_floats(Floats v, int64_t count, T* to) {
  if (count >= kWidth) return store_floats(v, to);
  float lanes[kWidth];
  std::memcpy(lanes, &v, sizeof v);
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
