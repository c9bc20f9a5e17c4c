// SPDX-License-Identifier: Apache-2.0
// dim3 and the vector types, with the sizes and alignments that the CUDA programming guide gives them, so that a
// misaligned vector access is one here too.
#pragma once

#define GFL_HOST_VECTOR(base, stem, align2, align4)                                                     \
  struct stem##1 { base x; };                                                                           \
  struct alignas(align2) stem##2 { base x, y; };                                                        \
  struct stem##3 { base x, y, z; };                                                                     \
  struct alignas(align4) stem##4 { base x, y, z, w; };                                                  \
  static_assert(sizeof(stem##2) == 2 * sizeof(base) && sizeof(stem##4) == 4 * sizeof(base), "padding"); \
  inline stem##1 make_##stem##1(base x) { return {x}; }                                                 \
  inline stem##2 make_##stem##2(base x, base y) { return {x, y}; }                                      \
  inline stem##3 make_##stem##3(base x, base y, base z) { return {x, y, z}; }                           \
  inline stem##4 make_##stem##4(base x, base y, base z, base w) { return {x, y, z, w}; }

GFL_HOST_VECTOR(signed char, char, 2, 4)
GFL_HOST_VECTOR(unsigned char, uchar, 2, 4)
GFL_HOST_VECTOR(short, short, 4, 8)
GFL_HOST_VECTOR(unsigned short, ushort, 4, 8)
GFL_HOST_VECTOR(int, int, 8, 16)
GFL_HOST_VECTOR(unsigned, uint, 8, 16)
GFL_HOST_VECTOR(long long, longlong, 16, 16)
GFL_HOST_VECTOR(unsigned long long, ulonglong, 16, 16)
GFL_HOST_VECTOR(float, float, 8, 16)
GFL_HOST_VECTOR(double, double, 16, 16)
#undef GFL_HOST_VECTOR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return uint3{x, y, z}; }
};
