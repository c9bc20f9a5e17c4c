// SPDX-License-Identifier: Apache-2.0
// The four element types, their accumulator, and the dispatch from a run-time DType to a compile-time type.
//
// Half and bfloat16 are CUDA's own types in `.cu` files and two plain structs elsewhere; both round to nearest even, so
// the same bits come out on every backend.
#pragma once
#include <cstdint>
#include <cstring>

#include "gfl/types.h"
#include "host_device.h"

#if defined(__CUDACC__) || defined(GFL_CUDA_ON_HOST)
#define GFL_CUDA_TYPES 1
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gfl {
GFL_ISA_OPEN

#if defined(GFL_CUDA_TYPES)
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
GFL_HOST_DEVICE float to_float(half_t x) { return __half2float(x); }
GFL_HOST_DEVICE float to_float(bfloat16_t x) { return __bfloat162float(x); }
GFL_HOST_DEVICE void from_float(float x, half_t& out) { out = __float2half_rn(x); }
GFL_HOST_DEVICE void from_float(float x, bfloat16_t& out) { out = __float2bfloat16_rn(x); }
#else
struct half_t { uint16_t bits; };
struct bfloat16_t { uint16_t bits; };

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(bfloat16_t x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline void from_float(float x, bfloat16_t& out) {
  const uint32_t bits = float_to_bits(x);
  // Adding 0x7fff plus the lowest kept bit rounds to nearest even; a NaN must not be carried into infinity.
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fffu : rounded);
}

inline float to_float(half_t x) {
  // Shift exponent and mantissa into place, then rescale by 2^112: exact for normal and subnormal halves alike.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}
inline void from_float(float x, half_t& out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds once the magic number aligns the bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}
#endif

// All arithmetic is in the accumulator type: double for double, float for everything else.
template <class T> struct accumulator { using type = float; };
template <> struct accumulator<double> { using type = double; };
template <class T> using acc_t = typename accumulator<T>::type;

GFL_HOST_DEVICE float load(const float* p) { return *p; }
GFL_HOST_DEVICE double load(const double* p) { return *p; }
GFL_HOST_DEVICE float load(const half_t* p) { return to_float(*p); }
GFL_HOST_DEVICE float load(const bfloat16_t* p) { return to_float(*p); }
GFL_HOST_DEVICE void store(float* p, float x) { *p = x; }
GFL_HOST_DEVICE void store(double* p, double x) { *p = x; }
GFL_HOST_DEVICE void store(half_t* p, float x) { from_float(x, *p); }
GFL_HOST_DEVICE void store(bfloat16_t* p, float x) { from_float(x, *p); }

// Calls `f` with a value of the C++ type that `dtype` names: dispatch(dtype, [&](auto t) { using T = decltype(t); … }).
template <class F> auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f16: return f(half_t{});
    case DType::bf16: return f(bfloat16_t{});
    case DType::f64: return f(double{});
    case DType::f32: break;
  }
  return f(float{});
}

GFL_ISA_CLOSE
}  // namespace gfl
