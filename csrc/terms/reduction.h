// SPDX-License-Identifier: Apache-2.0
// How the losses of rows or elements become one number: factor · Σ weight · loss / (norm + ε).
#pragma once
#include "gfl/score_loss.h"
#include "host_device.h"

namespace gfl {

// factor / (norm + ε); factor alone where there is no norm.
inline float reduction_scale(double factor, const float* norm) {
  if (norm != nullptr) factor /= *norm + static_cast<float>(kScoreNormEps);
  return static_cast<float>(factor);
}

}  // namespace gfl
