// SPDX-License-Identifier: Apache-2.0
// The vocabulary of our kernels for a host compiler. What is missing here is missing on purpose: __activemask,
// cooperative groups and static __shared__ arrays are not used in this project (csrc/tests/cuda_on_host/README.md).
#pragma once
#include <math.h>
#include <stdlib.h>

#include "cuda_on_host.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ GFL_use_gfl_shared_instead_of_a_static_shared_array

constexpr int warpSize = 32;

// --- rendezvous ---------------------------------------------------------------------------------------------------
inline void __syncthreads(gfl_host::Site site = gfl_host::Site::here()) {
  gfl_host::sync_block(gfl_host::BlockOp::sync, 0, site);
}
inline int __syncthreads_count(int predicate, gfl_host::Site site = gfl_host::Site::here()) {
  return gfl_host::sync_block(gfl_host::BlockOp::count, predicate, site);
}
inline int __syncthreads_and(int predicate, gfl_host::Site site = gfl_host::Site::here()) {
  return gfl_host::sync_block(gfl_host::BlockOp::all, predicate, site);
}
inline int __syncthreads_or(int predicate, gfl_host::Site site = gfl_host::Site::here()) {
  return gfl_host::sync_block(gfl_host::BlockOp::any, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, gfl_host::Site site = gfl_host::Site::here()) {
  gfl_host::sync_warp(gfl_host::WarpOp::sync, mask, 0, 0, 32, site);
}

#define GFL_HOST_SHUFFLE(name, op, argument)                                                                    \
  template <class T>                                                                                            \
  T name(unsigned mask, T value, argument from, int width = 32, gfl_host::Site site = gfl_host::Site::here()) { \
    return gfl_host::shuffle(gfl_host::WarpOp::op, mask, value, static_cast<int>(from), width, site);           \
  }
GFL_HOST_SHUFFLE(__shfl_sync, shuffle_index, int)
GFL_HOST_SHUFFLE(__shfl_up_sync, shuffle_up, unsigned)
GFL_HOST_SHUFFLE(__shfl_down_sync, shuffle_down, unsigned)
GFL_HOST_SHUFFLE(__shfl_xor_sync, shuffle_xor, int)
#undef GFL_HOST_SHUFFLE

#define GFL_HOST_VOTE(result, name, op)                                                                       \
  inline result name(unsigned mask, int predicate, gfl_host::Site site = gfl_host::Site::here()) {            \
    return static_cast<result>(gfl_host::sync_warp(gfl_host::WarpOp::op, mask, predicate != 0, 0, 32, site)); \
  }
GFL_HOST_VOTE(unsigned, __ballot_sync, ballot)
GFL_HOST_VOTE(int, __all_sync, all)
GFL_HOST_VOTE(int, __any_sync, any)
#undef GFL_HOST_VOTE

template <class T> unsigned __match_any_sync(unsigned mask, T value, gfl_host::Site site = gfl_host::Site::here()) {
  return static_cast<unsigned>(
      gfl_host::sync_warp(gfl_host::WarpOp::match_any, mask, gfl_host::to_bits(value), 0, 32, site));
}

#define GFL_HOST_REDUCE(type, name, op)                                                       \
  inline type name(unsigned mask, type value, gfl_host::Site site = gfl_host::Site::here()) { \
    return gfl_host::shuffle(gfl_host::WarpOp::op, mask, value, 0, 32, site);                 \
  }
GFL_HOST_REDUCE(int, __reduce_add_sync, add)
GFL_HOST_REDUCE(unsigned, __reduce_add_sync, add)
GFL_HOST_REDUCE(int, __reduce_min_sync, min_signed)
GFL_HOST_REDUCE(unsigned, __reduce_min_sync, min_unsigned)
GFL_HOST_REDUCE(int, __reduce_max_sync, max_signed)
GFL_HOST_REDUCE(unsigned, __reduce_max_sync, max_unsigned)
GFL_HOST_REDUCE(unsigned, __reduce_and_sync, bit_and)
GFL_HOST_REDUCE(unsigned, __reduce_or_sync, bit_or)
GFL_HOST_REDUCE(unsigned, __reduce_xor_sync, bit_xor)
#undef GFL_HOST_REDUCE

inline void __threadfence() { gfl_host::maybe_yield(); }
inline void __threadfence_block() { gfl_host::maybe_yield(); }
inline void __threadfence_system() { gfl_host::maybe_yield(); }
inline void __nanosleep(unsigned) { gfl_host::maybe_yield(); }
[[noreturn]] inline void __trap() { gfl_host::fail("__trap()"); }

// --- atomics: one host thread runs them all, so they are plain; another thread of the block may come first ---------
namespace gfl_host {
template <class T, class F> T atomic(T* address, F&& next) {
  maybe_yield();
  T old = *address;
  *address = next(old);
  return old;
}
}  // namespace gfl_host

#define GFL_HOST_ATOMIC(type, name, expression)                                     \
  inline type name(type* address, type value) {                                     \
    return gfl_host::atomic(address, [=](type old) -> type { return expression; }); \
  }
#define GFL_HOST_ATOMIC_INTEGER(type)                         \
  GFL_HOST_ATOMIC(type, atomicMin, value < old ? value : old) \
  GFL_HOST_ATOMIC(type, atomicMax, value > old ? value : old) \
  GFL_HOST_ATOMIC(type, atomicAnd, old& value)                \
  GFL_HOST_ATOMIC(type, atomicOr, old | value)                \
  GFL_HOST_ATOMIC(type, atomicXor, old ^ value)
GFL_HOST_ATOMIC_INTEGER(int)
GFL_HOST_ATOMIC_INTEGER(unsigned)
GFL_HOST_ATOMIC_INTEGER(long long)
GFL_HOST_ATOMIC_INTEGER(unsigned long long)
// Signed sums wrap on a device; through unsigned they do so here without undefined behaviour.
GFL_HOST_ATOMIC(int, atomicAdd, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
GFL_HOST_ATOMIC(int, atomicSub, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
GFL_HOST_ATOMIC(unsigned, atomicAdd, old + value)
GFL_HOST_ATOMIC(unsigned, atomicSub, old - value)
GFL_HOST_ATOMIC(unsigned, atomicInc, old >= value ? 0 : old + 1)
GFL_HOST_ATOMIC(unsigned, atomicDec, old == 0 || old > value ? value : old - 1)
GFL_HOST_ATOMIC(unsigned long long, atomicAdd, old + value)
GFL_HOST_ATOMIC(float, atomicAdd, old + value)
GFL_HOST_ATOMIC(double, atomicAdd, old + value)
GFL_HOST_ATOMIC(int, atomicExch, (static_cast<void>(old), value))
GFL_HOST_ATOMIC(unsigned, atomicExch, (static_cast<void>(old), value))
GFL_HOST_ATOMIC(unsigned long long, atomicExch, (static_cast<void>(old), value))
GFL_HOST_ATOMIC(float, atomicExch, (static_cast<void>(old), value))
#undef GFL_HOST_ATOMIC_INTEGER
#undef GFL_HOST_ATOMIC

#define GFL_HOST_CAS(type)                                                                            \
  inline type atomicCAS(type* address, type compare, type value) {                                    \
    return gfl_host::atomic(address, [=](type old) -> type { return old == compare ? value : old; }); \
  }
GFL_HOST_CAS(int)
GFL_HOST_CAS(unsigned)
GFL_HOST_CAS(unsigned short)
GFL_HOST_CAS(unsigned long long)
#undef GFL_HOST_CAS

// --- loads and stores with a cache hint ---------------------------------------------------------------------------
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldca(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> T __ldlu(const T* address) { return *address; }
template <class T> void __stwb(T* address, T value) { *address = value; }
template <class T> void __stcg(T* address, T value) { *address = value; }
template <class T> void __stcs(T* address, T value) { *address = value; }
template <class T> void __stwt(T* address, T value) { *address = value; }

// --- arithmetic (the build has -ffp-contract=off: a product and a sum stay two roundings) --------------------------
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
// Macros, since glibc's <math.h> declares functions of these names.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.0f, (x))
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf((x), (y))
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)

#define GFL_HOST_MIN_MAX(a, b, result)                                                                        \
  constexpr result min(a x, b y) {                                                                            \
    return static_cast<result>(x) < static_cast<result>(y) ? static_cast<result>(x) : static_cast<result>(y); \
  }                                                                                                           \
  constexpr result max(a x, b y) {                                                                            \
    return static_cast<result>(x) > static_cast<result>(y) ? static_cast<result>(x) : static_cast<result>(y); \
  }
GFL_HOST_MIN_MAX(int, int, int)
GFL_HOST_MIN_MAX(unsigned, unsigned, unsigned)
GFL_HOST_MIN_MAX(int, unsigned, unsigned)
GFL_HOST_MIN_MAX(unsigned, int, unsigned)
GFL_HOST_MIN_MAX(long, long, long)
GFL_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
GFL_HOST_MIN_MAX(long long, long long, long long)
GFL_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef GFL_HOST_MIN_MAX
// As fminf and fmaxf do, a device's min and max drop a NaN.
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

// --- bits ---------------------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= ((x >> bit) & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __float_as_uint(float x) { return gfl_host::from_bits<unsigned>(gfl_host::to_bits(x)); }
inline int __float_as_int(float x) { return gfl_host::from_bits<int>(gfl_host::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return gfl_host::from_bits<float>(x); }
inline float __int_as_float(int x) { return gfl_host::from_bits<float>(gfl_host::to_bits(x)); }
inline long long __double_as_longlong(double x) { return gfl_host::from_bits<long long>(gfl_host::to_bits(x)); }
inline double __longlong_as_double(long long x) { return gfl_host::from_bits<double>(gfl_host::to_bits(x)); }

// --- conversions: out of range they saturate and NaN gives 0, unlike a C cast --------------------------------------
namespace gfl_host {
inline int to_int(float x) {
  if (x != x) return 0;
  if (x >= 2147483648.0f) return 2147483647;
  return x < -2147483648.0f ? -2147483647 - 1 : static_cast<int>(x);
}
inline unsigned to_unsigned(float x) {
  if (!(x > 0.0f)) return 0u;
  return x >= 4294967296.0f ? 0xffffffffu : static_cast<unsigned>(x);
}
}  // namespace gfl_host
inline int __float2int_rn(float x) { return gfl_host::to_int(rintf(x)); }
inline int __float2int_rz(float x) { return gfl_host::to_int(x); }
inline int __float2int_rd(float x) { return gfl_host::to_int(floorf(x)); }
inline int __float2int_ru(float x) { return gfl_host::to_int(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return gfl_host::to_unsigned(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return gfl_host::to_unsigned(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
