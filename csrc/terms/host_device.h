// SPDX-License-Identifier: Apache-2.0
// What lets CPU and CUDA kernels share their arithmetic.
#pragma once

#if defined(__CUDACC__)
#define GFL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GFL_HOST_DEVICE inline
#endif

// In files compiled per instruction set (csrc/cpu/simd) inline functions get names of their own. Otherwise the linker
// could give every caller the version that only newer processors can run.
#if defined(GFL_ISA)
#define GFL_ISA_OPEN inline namespace GFL_ISA {
#define GFL_ISA_CLOSE }
#else
#define GFL_ISA_OPEN
#define GFL_ISA_CLOSE
#endif

namespace gfl {
GFL_ISA_OPEN

// IEEE product, sum, difference and quotient that no compiler may contract into a fused multiply-add. Every geometric
// decision (IoU, distance, threshold) uses these, so that all backends take the same one. On the host the build flag
// -ffp-contract=off ensures it; nvcc contracts by default, hence the intrinsics.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub_rn(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float div_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double sub_rn(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ double div_rn(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class T> GFL_HOST_DEVICE T mul_rn(T a, T b) { return a * b; }
template <class T> GFL_HOST_DEVICE T add_rn(T a, T b) { return a + b; }
template <class T> GFL_HOST_DEVICE T sub_rn(T a, T b) { return a - b; }
template <class T> GFL_HOST_DEVICE T div_rn(T a, T b) { return a / b; }
#endif

GFL_ISA_CLOSE
}  // namespace gfl
