// SPDX-License-Identifier: Apache-2.0
// Elementary functions of the assignments that read predictions, for a float or a register of floats: polynomials whose
// every operation is rounded by itself and in the order of the reference, so that all backends get the same bits.
#pragma once
#include <cstring>
#include <limits>

#include "assign.h"
#include "box.h"

namespace gfl {
GFL_ISA_OPEN

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class V> struct IntegersOf { using type = uint32_t; };
#if defined(GFL_ISA)
template <> struct IntegersOf<Floats> { using type = Bits; };
#endif
template <class V> using Integers = typename IntegersOf<V>::type;

template <class V> GFL_HOST_DEVICE Integers<V> bits_of(const V& x) {
  Integers<V> bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class V> GFL_HOST_DEVICE V of_bits(const Integers<V>& bits) {
  V x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// c₀·x^n + … + c_n.
template <class V, int N> GFL_HOST_DEVICE V polynomial(const V& x, const float (&c)[N]) {
  V p = constant<V>(c[0]);
  for (int i = 1; i < N; ++i) p = add_rn(mul_rn(p, x), constant<V>(c[i]));
  return p;
}

// e^r · 2^n for r in [−ln2/2, ln2/2]; `shifted` is 1.5·2^23 + n, which has n in its lowest bits.
template <class V> GFL_HOST_DEVICE V scaled_exponential(const V& r, const V& shifted) {
  const V p = polynomial(r, {1.9875691e-4f, 1.3981999e-3f, 8.3334519e-3f, 4.1665796e-2f, 1.6666667e-1f, 0.5f});
  const V e = add_rn(add_rn(mul_rn(mul_rn(r, r), p), r), constant<V>(1.0f));
  return of_bits<V>(bits_of(e) + (bits_of(shifted) << 23));
}

// e^x for x ≤ 0 within 2 ulp; 0 below −87.
template <class V> GFL_HOST_DEVICE V exponential(const V& x) {
  const V round = constant<V>(12582912.0f);
  const V shifted = add_rn(mul_rn(x, constant<V>(1.442695f)), round), n = sub_rn(shifted, round);
  const V r = add_rn(sub_rn(x, mul_rn(n, constant<V>(0.69335938f))), mul_rn(n, constant<V>(2.1219444e-4f)));
  const V e = scaled_exponential(r, shifted);
  return x < constant<V>(-87.0f) ? constant<V>(0.0f) : e;
}

// 10^x within 4 ulp; 0 below −37, infinite above 38; NaN stays.
template <class V> GFL_HOST_DEVICE V power_of_ten(const V& x) {
  const V round = constant<V>(12582912.0f);
  const V shifted = add_rn(mul_rn(x, constant<V>(3.3219281f)), round), n = sub_rn(shifted, round);
  const V rest = sub_rn(sub_rn(x, mul_rn(n, constant<V>(0.30102539f))), mul_rn(n, constant<V>(4.6050390e-6f)));
  const V e = add_rn(scaled_exponential(mul_rn(rest, constant<V>(2.3025851f)), shifted), sub_rn(x, x));
  const V low = x < constant<V>(-37.0f) ? constant<V>(0.0f) : e;
  return x > constant<V>(38.0f) ? constant<V>(kInfinity) : low;
}

// log `whole`, which is 1 + u, within 2 ulp; −100 where it is no normal positive number; NaN stays.
template <class V> GFL_HOST_DEVICE V logarithm_of_sum(const V& u, const V& whole) {
  const Integers<V> bits = bits_of(whole);
  const Integers<V> exponent = (bits + 0x004afb0d) >> 23;  // n + 127, of whole = 2^n · m with m in [√½, √2)
  const V m = of_bits<V>(bits - ((exponent << 23) - 0x3f800000));
  const V n = sub_rn(of_bits<V>(exponent + 0x4b400000), constant<V>(12583039.0f));
  const V x = n == constant<V>(0.0f) ? u : sub_rn(m, constant<V>(1.0f));
  const V z = mul_rn(x, x);
  const V p = polynomial(x, {7.0376836e-2f, -1.151461e-1f, 1.1676999e-1f, -1.242014e-1f, 1.4249323e-1f, -1.6668058e-1f,
                             2.0000715e-1f, -2.4999994e-1f, 3.3333331e-1f});
  const V y =
      sub_rn(add_rn(mul_rn(mul_rn(x, z), p), mul_rn(n, constant<V>(-2.1219444e-4f))), mul_rn(z, constant<V>(0.5f)));
  const V log = add_rn(add_rn(add_rn(x, y), mul_rn(n, constant<V>(0.69335938f))), sub_rn(whole, whole));
  return whole < constant<V>(1.1754944e-38f) ? constant<V>(-100.0f) : log;
}

template <class V> GFL_HOST_DEVICE V logarithm(const V& x) { return logarithm_of_sum(sub_rn(x, constant<V>(1.0f)), x); }

// σ(x) and log(1 + e^−|x|).
template <class V> struct Sigmoid {
  V p, log;

  GFL_HOST_DEVICE explicit Sigmoid(const V& x) {
    const V zero = constant<V>(0.0f), one = constant<V>(1.0f);
    const V e = exponential(x < zero ? x : -x), whole = add_rn(one, e);
    p = div_rn(x < zero ? e : one, whole);
    log = logarithm_of_sum(e, whole);
  }
};

GFL_ISA_CLOSE
}  // namespace gfl
