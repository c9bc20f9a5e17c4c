// SPDX-License-Identifier: Apache-2.0
// log(1 + e) for e in [0, 1] as e times a minimax polynomial, relative error 4.8e-9: the coefficients, and the form for
// one float by Horner's scheme.
#pragma once
#include <cmath>

#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

struct Log1p {
  static constexpr float c1 = -0.49999902f, c2 = 0.33329964f, c3 = -0.24954133f, c4 = 0.19675931f, c5 = -0.15305570f,
                         c6 = 0.10603617f, c7 = -0.056959159f, c8 = 0.019851264f, c9 = -0.0032439810f;
};

GFL_HOST_DEVICE float log1p_polynomial(float e) {
  float p = Log1p::c9;
  p = std::fma(p, e, Log1p::c8);
  p = std::fma(p, e, Log1p::c7);
  p = std::fma(p, e, Log1p::c6);
  p = std::fma(p, e, Log1p::c5);
  p = std::fma(p, e, Log1p::c4);
  p = std::fma(p, e, Log1p::c3);
  p = std::fma(p, e, Log1p::c2);
  p = std::fma(p, e, Log1p::c1);
  return std::fma(p * e, e, e);
}

GFL_ISA_CLOSE
}  // namespace gfl
