// SPDX-License-Identifier: Apache-2.0
// Decoding, NMS and post-process of the CUDA sources as plain C functions, for tests/support/cuda_sources.py: compiled
// there with csrc/tests/cuda_on_host, where a host pointer serves as a device's.
#include <vector>

#include "gfl/bins.h"
#include "gfl/select.h"

namespace {

// Memory aligned as a device's.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(bytes / sizeof(double) + 3) {}
  void* aligned() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16); }

 private:
  std::vector<double> memory_;
};

}  // namespace

extern "C" int decode_rows(const float* pred, const float* points, const float* scale, const float* limit,
                           int64_t count, int64_t bins, float* boxes) {
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

extern "C" int nms_rows(const float* boxes, const int64_t* classes, const int64_t* order, int64_t count,
                        double threshold, uint8_t* keep) {
  const gfl::NmsInput in{boxes, gfl::DType::f32, 4, 1, count, threshold, false};
  Workspace workspace(gfl::cuda::nms_workspace_bytes(count, gfl::DType::f32));
  return gfl::cuda::nms(in, classes, order, workspace.aligned(), keep, nullptr);
}

extern "C" int nms_class_rows(const float* boxes, const int64_t* order, const int64_t* grouped, const int64_t* labels,
                              int64_t count, double threshold, uint8_t* keep) {
  const gfl::NmsInput in{boxes, gfl::DType::f32, 4, 1, count, threshold, false};
  Workspace workspace(gfl::cuda::nms_workspace_bytes(count, gfl::DType::f32));
  int32_t too_large = 0;
  const int status =
      gfl::cuda::nms_by_class(in, order, grouped, labels, workspace.aligned(), &too_large, keep, nullptr);
  return status != 0 ? status : too_large;
}

// Maps of half precision, by strides in elements; a level has two sides in `sides` and four strides in each list.
extern "C" int postprocess_maps(const void* const* cls, const void* const* reg, const int64_t* sides,
                                const int64_t* cls_strides, const int64_t* reg_strides, const double* strides,
                                int64_t levels, int64_t batch, int64_t classes, int64_t reg_max,
                                const float* image_sizes, const float* scale_factors, double score_threshold,
                                int64_t nms_pre, double iou_threshold, int64_t max_detections, float* boxes,
                                float* scores, int64_t* labels, int32_t* count, int64_t* locations) {
  gfl::PostprocessInput in{};
  in.levels = static_cast<int>(levels);
  for (int64_t l = 0; l < levels; ++l) {
    gfl::PostprocessLevel& level = in.level[l];
    level.cls = cls[l];
    level.reg = reg[l];
    level.height = sides[2 * l];
    level.width = sides[2 * l + 1];
    level.stride = strides[l];
    for (int i = 0; i < 4; ++i) {
      level.cls_stride[i] = cls_strides[4 * l + i];
      level.reg_stride[i] = reg_strides[4 * l + i];
    }
  }
  in.cls_dtype = in.reg_dtype = gfl::DType::f16;
  in.batch = batch;
  in.classes = classes;
  in.reg_max = static_cast<int>(reg_max);
  in.image_sizes = image_sizes;
  in.scale_factors = scale_factors;
  in.score_threshold = score_threshold;
  in.nms_pre = nms_pre;
  in.iou_threshold = iou_threshold;
  in.max_detections = max_detections;
  Workspace workspace(gfl::cuda::postprocess_workspace_bytes(in));
  return gfl::cuda::postprocess(in, {boxes, scores, labels, count, locations}, workspace.aligned(), nullptr);
}
