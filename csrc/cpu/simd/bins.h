// SPDX-License-Identifier: Apache-2.0
// The vector code of simd/bins.cpp for fp32 and 16-bit logits; arguments as in gfl/bins.h, rows [begin, end).
#pragma once
#include "cpu/isa.h"
#include "gfl/bins.h"

namespace gfl {

GFL_DECLARE_PER_ISA(void integral_forward(const BinRows& pred, float* distance, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void integral_backward(const BinRows& pred, const float* grad_distance, void* grad_pred,
                                           int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void decode_backward(const DecodeInput& in, const float* grad_boxes, void* grad_pred,
                                         float* grad_points, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_forward(const DflInput& in, float* loss, float* distance, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_backward(const DflInput& in, const float* grad_loss, const float* grad_distance,
                                      const DflGradients& out, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept,
                                             int64_t begin, int64_t end))
// Returns Σ weight · loss; weight may be null.
GFL_DECLARE_PER_ISA(double dfl_sum_keeping(const DflInput& in, const float* weight, float* distance,
                                           const DflKept& kept, int64_t begin, int64_t end))
GFL_DECLARE_PER_ISA(void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance,
                                    const DflKept& kept, int64_t begin, int64_t end))
// The gradient of each row's loss is scale · weight[row].
GFL_DECLARE_PER_ISA(void dfl_finish_reduced(const DflInput& in, const float* weight, float scale,
                                            const float* grad_distance, const DflKept& kept, int64_t begin,
                                            int64_t end))

}  // namespace gfl
