// SPDX-License-Identifier: Apache-2.0
// How the operators on distributions find their rows in memory: conv outputs are read in place in either layout.
#pragma once
#include "gfl/types.h"

namespace gfl {

// The most bins a row can have; R is at most 128.
constexpr int64_t kMaxBins = 129;

// Distance in elements between neighbours along two leading dimensions. Location i = outer · count_inner + inner lies
// at outer · stride.outer + inner · stride.inner; one dimension alone is `inner`, and a broadcast one has stride 0.
struct LocationStride { int64_t outer, inner; };

// Logits: at each of count_outer · count_inner locations `sides` rows of `bins`. Row r = location · sides + side.
//
//   [N, 4(R+1)] contiguous        count (1, N),  sides 4, strides ((0, 4(R+1)), R+1, 1)
//   [B, 4(R+1), H, W] contiguous  count (B, HW), sides 4, strides ((4(R+1)HW, 1), (R+1)HW, HW)
struct BinRows {
  const void* data;
  DType dtype;
  int64_t count_outer, count_inner, sides, bins;  // 2 ≤ bins ≤ kMaxBins
  LocationStride stride_location;
  int64_t stride_side, stride_bin;

  int64_t locations() const { return count_outer * count_inner; }
  int64_t rows() const { return locations() * sides; }
};

}  // namespace gfl
