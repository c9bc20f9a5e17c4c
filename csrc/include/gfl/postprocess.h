// SPDX-License-Identifier: Apache-2.0
// From a head's maps to detections: threshold, top-k a level, decoding of the survivors, class-wise NMS an image.
#pragma once
#include "gfl/types.h"

namespace gfl {

constexpr int kPostprocessMaxLevels = 8;
constexpr int kPostprocessMaxReg = 128;

// One level's maps, by strides in elements for (image, channel, row, column).
struct PostprocessLevel {
  const void* cls;          // [B, classes, height, width] cls_dtype
  const void* reg;          // [B, 4(reg_max+1), height, width] reg_dtype, bins of a side together, sides l, t, r, b
  int64_t cls_stride[4], reg_stride[4];
  int64_t height, width;    // classes · height · width ≤ 2^32
  double stride;            // pixels between neighbouring locations
  double center_offset;     // where in its cell a centre is, in cells
};

struct PostprocessInput {
  PostprocessLevel level[kPostprocessMaxLevels];
  int levels;
  DType cls_dtype, reg_dtype;
  int64_t batch, classes;
  int reg_max;                  // 1 … kPostprocessMaxReg
  const float* image_sizes;     // [B, 2]: height, width
  const float* scale_factors;   // [B, 2]: horizontal, vertical; or null
  double score_threshold;
  int64_t nms_pre;              // candidates a level keeps; ≤ 0: all
  double iou_threshold;
  int64_t max_detections;       // K
  bool anchor_topk;             // nms_pre counts locations, by their best class, instead of (location, class) pairs
  bool activated;               // cls holds probabilities
  bool legacy;                  // GFocal v1: centres x·s + (s−1)/2, clip at size − 1, widths one greater in the IoU
};

struct PostprocessOutput {
  float* boxes;      // [B, K, 4] xyxy
  float* scores;     // [B, K]
  int64_t* labels;   // [B, K]
  int32_t* count;    // [B]
  float* uncertainty;  // [B, K, 4, 3], or null: variance (bins²), entropy (nats) and peak of each side's distribution
};

namespace cpu {
// Images [begin, end); unused slots are zero with label −1. Allocates scratch in proportion to an image's candidates.
void postprocess(const PostprocessInput& in, const PostprocessOutput& out, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
// Whether the kernels can: up to 2^32 pairs of location and class in an image, 2^31 locations in a level.
bool postprocess_fits(const PostprocessInput& in);
// Memory that is needed for the time of the call; bounded by the shapes, whatever is above the threshold.
size_t postprocess_workspace_bytes(const PostprocessInput& in);
// Four graph nodes, five with the uncertainty. cudaErrorInvalidValue where `postprocess_fits` says no.
cudaError_t postprocess(const PostprocessInput& in, const PostprocessOutput& out, void* workspace,
                        cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
