// SPDX-License-Identifier: Apache-2.0
// The focal loss of one logit through the installed headers and library, against the same formula written out.
#include <gfl/qfl.h>

#include <cmath>
#include <cstdio>

int main() {
  const float logit = 0.5f, score = 0.7f;
  const int64_t label = 0;
  float loss = -1.0f;
  const gfl::QflInput in{&logit, gfl::DType::f32, 1, 1, &label, &score, 1, 1, 2.0, false};
  gfl::cpu::qfl_forward(in, &loss, 0, 1);

  const double p = 1.0 / (1.0 + std::exp(-0.5));
  const double expected = -(0.7 * std::log(p) + 0.3 * std::log(1.0 - p)) * (0.7 - p) * (0.7 - p);
  std::printf("loss %.8g, expected %.8g\n", static_cast<double>(loss), expected);
  return std::abs(loss - expected) < 1e-6 * expected + 1e-9 ? 0 : 1;
}
