// SPDX-License-Identifier: Apache-2.0
// Greedy non-maximum suppression: walking the boxes by falling score (ties by lower
// index, NaN first), keep a box unless its IoU with a kept box of its class is above the threshold. Classes are
// compared as such; coordinates are not shifted. IoU and the comparison are defined in csrc/terms/box.h.
#pragma once
#include <cstddef>

#include "gfl/types.h"

namespace gfl {

struct NmsInput {
  const void* boxes;  // [count, 4] dtype, xyxy
  DType dtype;
  int64_t stride_box, stride_coordinate;
  int64_t count;
  double iou_threshold;  // rounded to the type of the arithmetic
  bool legacy;           // widths and heights are one larger
};

namespace cpu {

// order[i] is the index of the i-th score, falling; equal ones (all NaN are, and are the greatest) by lower index.
void order_by_score(const void* scores, DType dtype, int64_t stride, int64_t count, int64_t* order);

// Rearranges `order` by rising class, each class in the order it has there: grouped [count]. Class s has the positions
// [bounds[s], bounds[s + 1]); bounds has room for count + 1. Returns the number of classes met.
int64_t group_by_class(const int64_t* classes, const int64_t* order, int64_t count, int64_t* grouped, int64_t* bounds);

// Classes [begin, end) of `grouped`. keep: [count] by index of the box, 1 or 0. Scratch: O(boxes of a class).
void nms(const NmsInput& in, const int64_t* grouped, const int64_t* bounds, uint8_t* keep, int64_t begin, int64_t end);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {

size_t nms_workspace_bytes(int64_t count, DType dtype);

// order: [count] as cpu::order_by_score gives it. classes: [count] by index of the box, or null for one class. keep:
// [count] by position in `order`, 1 or 0. workspace: nms_workspace_bytes, aligned to 16. Never waits for the device.
cudaError_t nms(const NmsInput& in, const int64_t* classes, const int64_t* order, void* workspace, uint8_t* keep,
                cudaStream_t stream);

// The same for many boxes of many classes. grouped: [count] positions in `order`, class by class, rising within a class.
// labels: [count] the classes in that order. too_large: [1], 1 if a class has more than 4096 boxes: then `keep` is not
// decided, and `nms` has to be called.
cudaError_t nms_by_class(const NmsInput& in, const int64_t* order, const int64_t* grouped, const int64_t* labels,
                         void* workspace, int32_t* too_large, uint8_t* keep, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace gfl
