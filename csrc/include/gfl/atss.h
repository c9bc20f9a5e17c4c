// SPDX-License-Identifier: Apache-2.0
// Adaptive training sample selection: which ground-truth box each location learns      (arXiv 1912.02424, algorithm 1)
#pragma once
#include "gfl/types.h"

namespace gfl {

// One level of the pyramid: a grid of square priors of side `size`, centred at (x + offset)·stride (+ shift) pixels.
struct AtssLevel {
  int64_t height, width;
  float stride;
  float offset;  // in cells
  float shift;   // in pixels: 0, or (stride − 1)/2 for the legacy geometry
  float half;    // from the centre to a side of the prior: size/2, or (size − 1)/2 for the legacy geometry
};

struct AtssInput {
  const AtssLevel* levels;
  int64_t level_count;
  int64_t locations;         // cells of all levels
  const float* gt_boxes;     // [images, gts, 4] xyxy
  const int64_t* gt_labels;  // [images, gts]; negative: no box
  const float* valid_sizes;  // [images, 2] (h, w) in pixels, or null: every cell is valid
  int64_t images, gts;
  int64_t topk;
  bool legacy;               // widths count both ends: +1
};

namespace cpu {
// Images [begin, end). labels, matched: [images, locations] int64; iou: [images, locations] float.
void atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, int64_t begin, int64_t end);
}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kAtssMaxLevels = 16;
// Whether the kernels can: up to kAtssMaxLevels levels, 6143 candidates a box, 2^31 locations an image.
bool atss_fits(const AtssInput& in);
// The whole batch in three graph nodes. cudaErrorInvalidValue where `atss_fits` says no.
cudaError_t atss(const AtssInput& in, int64_t* labels, int64_t* matched, float* iou, cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
