// SPDX-License-Identifier: Apache-2.0
// Ranking of scores: the order "greater value first, then lower index" as one unsigned integer, and the value that a
// candidate must exceed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host_device.h"

namespace gfl {

// Monotone in x, equal for −0 and +0; between 0 and the greatest integer, which is the rank of no number. Not for NaN.
GFL_HOST_DEVICE uint32_t rank_of(float x) {
  x += 0.0f;  // turns −0 into +0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

GFL_HOST_DEVICE uint64_t rank_of(double x) {
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// The x of a rank (+0 for that of −0).
GFL_HOST_DEVICE float value_of(uint32_t rank) {
  const uint32_t bits = rank & 0x80000000u ? rank & 0x7fffffffu : ~rank;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Greater keys come first: by value, equal ones by the lower index. `index` is below 2^32.
GFL_HOST_DEVICE uint64_t ranking_key(uint32_t rank, uint64_t index) {
  return static_cast<uint64_t>(rank) << 32 | (0xffffffffu - index);
}
GFL_HOST_DEVICE uint32_t rank_in(uint64_t key) { return static_cast<uint32_t>(key >> 32); }
GFL_HOST_DEVICE uint32_t index_in(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// What a logit must exceed for its probability to exceed `score_threshold`: fp32(logit(threshold)). Sigmoid saturates,
// so the comparison is made before it. With probabilities (`activated`) the threshold itself.
inline float ranking_threshold(double score_threshold, bool activated) {
  if (activated) return static_cast<float>(score_threshold);
  if (score_threshold <= 0) return -std::numeric_limits<float>::infinity();
  if (score_threshold >= 1) return std::numeric_limits<float>::infinity();
  return static_cast<float>(std::log(score_threshold / (1 - score_threshold)));
}

}  // namespace gfl
