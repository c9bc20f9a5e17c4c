// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 against background, p²·BCE(x, 0), over a tile of logits in place.
#include "vector_math.h"

namespace gfl::GFL_ISA {

// `count` is a multiple of kLanes.
void head_background_loss(float* tile, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float* lanes = tile + i;
    GFL_LANES(j) {
      const float x = clamp_infinite(lanes[j]);
      const float e = exp_of_negative(-absolute_of(x));
      const float r = 1.0f / (1.0f + e);
      const float p = x >= 0.0f ? r : e * r;
      lanes[j] = p * p * ((x > 0.0f ? x : 0.0f) + log1p_of_unit(e));
    }
  }
}

// scale · d/dx of that: p²·(2(1 − p)·BCE + p); 0 for an infinite logit.
void head_background_gradient(float* tile, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float* lanes = tile + i;
    GFL_LANES(j) {
      const float x = clamp_infinite(lanes[j]);
      const float e = exp_of_negative(-absolute_of(x));
      const float r = 1.0f / (1.0f + e);
      const float p = x >= 0.0f ? r : e * r, q = x >= 0.0f ? e * r : r;
      const float entropy = (x > 0.0f ? x : 0.0f) + log1p_of_unit(e);
      const float gradient = scale * (p * p * (2.0f * q * entropy + p));
      lanes[j] = absolute_of(lanes[j]) > std::numeric_limits<float>::max() ? 0.0f : gradient;
    }
  }
}

}  // namespace gfl::GFL_ISA
