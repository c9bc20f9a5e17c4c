// SPDX-License-Identifier: Apache-2.0
// Decoding and NMS of the CUDA sources as plain C functions, for tests/test_real_heads_by_parts.py: compiled there with
// csrc/tests/cuda_on_host, where a host pointer serves as a device's.
#include <vector>

#include "gfl/decode.h"
#include "gfl/nms.h"

extern "C" int decode_rows(const float* pred, const float* points, const float* scale, const float* limit, int64_t count,
                           int64_t bins, float* boxes) {
  gfl::DecodeInput in{};
  in.pred = gfl::BinRows{pred, gfl::DType::f32, 1, count, 4, bins, {0, 4 * bins}, bins, 1};
  in.points = points;
  in.scale = scale;
  in.limit = limit;
  in.stride_points = {0, 2};
  in.stride_scale = {0, 1};
  in.stride_limit = {0, 2};
  return gfl::cuda::decode_forward(in, boxes, nullptr);
}

extern "C" int nms_rows(const float* boxes, const int64_t* classes, const int64_t* order, int64_t count, double threshold,
                        uint8_t* keep) {
  const gfl::NmsInput in{boxes, gfl::DType::f32, 4, 1, count, threshold, false};
  std::vector<double> workspace(gfl::cuda::nms_workspace_bytes(count, gfl::DType::f32) / sizeof(double) + 2);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
  return gfl::cuda::nms(in, classes, order, aligned, keep, nullptr);
}
