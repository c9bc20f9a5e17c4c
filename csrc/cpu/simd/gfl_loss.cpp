// SPDX-License-Identifier: Apache-2.0
// Quality focal loss with β = 2 against background, p²·BCE(x, 0), over a tile of logits in place.
#include "focal_terms.h"

namespace gfl::GFL_ISA {

// `count` is a multiple of kLanes.
void head_background_loss(float* tile, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) store_floats(background_term(load_floats(tile + i)).value, tile + i);
}

// scale · d/dx of that; 0 for an infinite logit.
void head_background_gradient(float* tile, float scale, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    store_floats(scale * background_term(load_floats(tile + i)).grad_pred, tile + i);
  }
}

}  // namespace gfl::GFL_ISA
