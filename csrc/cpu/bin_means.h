// SPDX-License-Identifier: Apache-2.0
// The vector code of simd/integral.cpp, which serves the integral and decoding.
#pragma once
#include "gfl/rows.h"
#include "isa.h"

namespace gfl {

// The gradient that the mean of each row receives: given, or worked out from the mean itself by code that is not
// compiled for an instruction set.
struct SlopeOfMean {
  const float* scales;  // [rows], where `of_rows` is null
  // Fills `scales` for `count` rows with the given indices and means.
  void (*of_rows)(void* context, const int64_t* row, int count, const float* mean, float* scales);
  void* context;
};

#if !defined(GFL_ISA)
// Rows [begin, end) of fp32 or 16-bit logits. mean: [rows]. grad_pred: [rows, bins] of pred's dtype, or null.
GFL_DECLARE_PER_ISA(void integral_forward(const BinRows& pred, float* mean, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void integral_backward(const BinRows& pred, const SlopeOfMean& slope, void* grad_pred,
                                           int64_t begin, int64_t end))
#endif

}  // namespace gfl
