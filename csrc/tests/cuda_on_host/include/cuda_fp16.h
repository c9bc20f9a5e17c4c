// SPDX-License-Identifier: Apache-2.0
// IEEE binary16 with round-to-nearest-even conversions. No operators: torch builds extensions with
// -D__CUDA_NO_HALF_OPERATORS__, so kernels convert by name, and this header holds them to it.
#pragma once
#include "cuda_runtime.h"

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };
typedef __half half;
typedef __half2 half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};  // the device's only NaN
  if (magnitude >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)};
  unsigned kept, rest, half_way;
  if (magnitude >= 0x38800000u) {  // normal in half: drop 13 bits, move the exponent from bias 127 to 15
    const unsigned rebased = magnitude - (112u << 23);
    kept = rebased >> 13;
    rest = rebased & 0x1fffu;
    half_way = 0x1000u;
  } else {  // subnormal in half: in units of 2^-24
    const unsigned shift = 126u - (magnitude >> 23);
    if (shift > 25u) return {static_cast<unsigned short>(sign)};
    const unsigned significand = (magnitude & 0x7fffffu) | 0x800000u;
    kept = significand >> shift;
    rest = significand & ((1u << shift) - 1u);
    half_way = 1u << (shift - 1u);
  }
  if (rest > half_way || (rest == half_way && (kept & 1u))) ++kept;
  return {static_cast<unsigned short>(sign | kept)};
}
inline float __half2float(__half value) {
  const unsigned sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // A half's bits shifted into a float's places are the value times 2^-112, subnormals included.
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;
  return __uint_as_float(sign | __float_as_uint(scaled));
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
inline __half2 __float22half2_rn(float2 pair) { return __floats2half2_rn(pair.x, pair.y); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
