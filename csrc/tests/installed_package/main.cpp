// SPDX-License-Identifier: Apache-2.0
// The quality focal loss of one logit through the installed headers and library, against the same formula written out.
#include <gfl/score.h>

#include <cmath>
#include <cstdio>

int main() {
  const float logit = 0.5f, score = 0.7f;
  const int64_t label = 0;
  float loss = -1.0f;
  gfl::ScoreInput in{};
  in.loss = "qfl";
  in.pred = &logit;
  in.dtype = gfl::DType::f32;
  in.images = in.classes = in.locations = 1;
  in.stride[1] = in.stride[2] = 1;
  in.label = &label;
  in.target = &score;
  in.params[0] = 2.0;
  gfl::cpu::score_rows(in, nullptr, &loss, nullptr, nullptr, 0, 1);

  const double p = 1.0 / (1.0 + std::exp(-0.5));
  const double expected = -(0.7 * std::log(p) + 0.3 * std::log(1.0 - p)) * (0.7 - p) * (0.7 - p);
  std::printf("loss %.8g, expected %.8g\n", static_cast<double>(loss), expected);
  return std::abs(loss - expected) < 1e-6 * expected + 1e-9 ? 0 : 1;
}
