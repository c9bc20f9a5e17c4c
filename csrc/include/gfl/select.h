// SPDX-License-Identifier: Apache-2.0
// Which boxes remain: suppression of one class or many, soft suppression, and the whole way from a head's maps.
//
//   nms              from the best score down (ties by lower index, NaN first), a box is kept unless its IoU with a
//                    kept box of its class is above the threshold; classes are compared as such, coordinates are not
//                    shifted; IoU and comparison are those of csrc/terms/box.h
//   multiclass       every pair of a box and a class whose score is above the threshold, in the order of
//                    box · classes + class: what `nms` is then given
//   soft_nms         arXiv 1704.04503: the best box left is taken, and the scores of the others of its class are
//                    multiplied by 1 − IoU where IoU ≥ threshold (linear) or exp(−IoU² / sigma) (gaussian), until none
//                    is left whose score is at least `min_score`; a NaN IoU leaves a score as it is
//   postprocess      threshold, top-k per level, decoding of the survivors, class-wise NMS per image
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

struct MulticlassInput {
  const void* boxes;  // [rows, 4] dtype, or [rows, 4·classes] if `per_class`: class c has the columns [4c, 4c + 4)
  DType dtype;
  int64_t stride_box, stride_coordinate;
  bool per_class;
  const void* scores;  // [rows, classes] score_dtype
  DType score_dtype;
  int64_t stride_row, stride_class;
  int64_t rows, classes;
  double score_threshold;  // rounded to fp32, to fp64 for fp64 scores; a NaN score is never above it
};

// A part of the candidates that holds the best: those whose score is above `least`, and of those whose score equals it
// the first `ties`.
struct MulticlassCut {
  double least;
  int64_t ties;
  int64_t count;  // of the candidates in it
  bool all;       // there are no others
};

// `A` below is double where `dtype` is f64, else float: the type of IoUs and scores. exp is in double for either, and
// its result rounded to A, so that all backends take the same boxes.
struct SoftNmsInput {
  const void* boxes;  // [count, 4] dtype, xyxy
  DType dtype;
  int64_t stride_box, stride_coordinate;
  const void* scores;  // [count] score_dtype, any stride; read as A
  DType score_dtype;
  int64_t stride_score;
  int64_t count;
  double iou_threshold, sigma, min_score;
  bool gaussian;
};

constexpr int kPostprocessMaxLevels = 8;
constexpr int kPostprocessMaxReg = 128;

// One level's maps, by strides in elements for (image, channel, row, column).
struct PostprocessLevel {
  const void* cls;  // [B, classes, height, width] cls_dtype
  const void* reg;  // [B, 4(reg_max+1), height, width] reg_dtype, bins of a side together, sides l, t, r, b
  int64_t cls_stride[4], reg_stride[4];
  int64_t height, width;  // classes · height · width ≤ 2^32
  double stride;          // pixels between neighbouring locations
  double center_offset;   // where in its cell a centre is, in cells
};

struct PostprocessInput {
  PostprocessLevel level[kPostprocessMaxLevels];
  int levels;
  DType cls_dtype, reg_dtype;
  int64_t batch, classes;
  int reg_max;                 // 1 … kPostprocessMaxReg
  const float* image_sizes;    // [B, 2]: height, width
  const float* scale_factors;  // [B, 2]: horizontal, vertical; or null
  double score_threshold;
  int64_t nms_pre;  // candidates kept per level; ≤ 0: all
  double iou_threshold;
  int64_t max_detections;  // K
  bool anchor_topk;        // nms_pre counts locations, by their best class, instead of (location, class) pairs
  bool activated;          // cls holds probabilities
  bool legacy;             // GFocal v1: centres x·s + (s−1)/2, clip at size − 1, widths one greater in the IoU
};

struct PostprocessOutput {
  float* boxes;        // [B, K, 4] xyxy
  float* scores;       // [B, K]
  int64_t* labels;     // [B, K]
  int32_t* count;      // [B]
  int64_t* locations;  // [B, K] where each was read: an index over the locations of all levels
};

namespace cpu {

// order[i] is the index of the i-th score, falling; equal ones (all NaN are, and are the greatest) by lower index.
void order_by_score(const void* scores, DType dtype, int64_t stride, int64_t count, int64_t* order);

// Rearranges `order` by rising class, each class in the order it has there: grouped [count], which may be `order` where
// `classes` is null, for one class. Class s has the positions [bounds[s], bounds[s + 1]); bounds has room for
// count + 1. Returns the number of classes.
int64_t group_by_class(const int64_t* classes, const int64_t* order, int64_t count, int64_t* grouped, int64_t* bounds);

// Classes [begin, end) of `grouped`. keep: [count] by index of the box, 1 or 0. Scratch: O(boxes of a class).
void nms(const NmsInput& in, const int64_t* grouped, const int64_t* bounds, uint8_t* keep, int64_t begin, int64_t end);

// How many of the flags are set, and the boxes whose flag is, as they follow in `order`.
int64_t count_kept(const uint8_t* keep, int64_t count);
void collect_kept(const uint8_t* keep, const int64_t* order, int64_t count, int64_t* kept);

// The best `most` candidates, equal scores in their order; or all, where there are no more than four times as many.
MulticlassCut multiclass_cut(const MulticlassInput& in, int64_t most);

// boxes: [cut.count, 4] dtype. scores: [cut.count] score_dtype. labels: [cut.count].
void multiclass_gather(const MulticlassInput& in, const MulticlassCut& cut, void* boxes, void* scores, int64_t* labels);

// Classes [begin, end) of `grouped`, each in the order of the boxes' indices; as cpu::group_by_class makes
// it of 0, 1, 2, …. keep: [count] by index, 1 or 0. final_scores: [count] of A by index, written where kept.
void soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* bounds, void* final_scores, uint8_t* keep,
              int64_t begin, int64_t end);

// The kept boxes by falling final score, equal ones by lower index. If there is none, the box of the greatest score is
// taken, so that of a nonempty input one is always kept. indices, scores: room for max(kept, 1). Returns how many there
// are.
int64_t soft_nms_collect(const SoftNmsInput& in, const void* final_scores, const uint8_t* keep, int64_t* indices,
                         float* scores);

// Images [begin, end); unused slots are zero with label and location −1. Allocates scratch in proportion to the
// candidates of an image.
void postprocess(const PostprocessInput& in, const PostprocessOutput& out, int64_t begin, int64_t end);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {

size_t nms_workspace_bytes(int64_t count, DType dtype);

// order: [count] as cpu::order_by_score gives it. classes: [count] by index of the box, or null for one class. keep:
// [count] by position in `order`, 1 or 0. workspace: nms_workspace_bytes, aligned to 16. Never waits for the device.
cudaError_t nms(const NmsInput& in, const int64_t* classes, const int64_t* order, void* workspace, uint8_t* keep,
                cudaStream_t stream);

// The same for many boxes of many classes. grouped: [count] positions in `order`, class by class and rising within
// each.
// labels: [count] the classes in that order. too_large: [1], 1 if a class has more than 4096 boxes: then `keep` is not
// decided, and `nms` has to be called.
cudaError_t nms_by_class(const NmsInput& in, const int64_t* order, const int64_t* grouped, const int64_t* labels,
                         void* workspace, int32_t* too_large, uint8_t* keep, cudaStream_t stream);

size_t multiclass_workspace_bytes(const MulticlassInput& in);

// total: [1], the number of candidates. What it leaves in the workspace (aligned to 8) is for `multiclass_gather`.
// cudaErrorInvalidValue for 2^43 pairs or more.
cudaError_t multiclass_count(const MulticlassInput& in, void* workspace, int64_t* total, cudaStream_t stream);

// boxes: [total, 4] dtype. scores: [total] score_dtype. labels: [total].
cudaError_t multiclass_gather(const MulticlassInput& in, const void* workspace, void* boxes, void* scores,
                              int64_t* labels, cudaStream_t stream);

size_t soft_nms_workspace_bytes(int64_t count, DType dtype);

// grouped: [count] indices of the boxes, class by class, rising within a class. labels: [count] the classes in that
// order, or null for one class. keep and final_scores as above. workspace: soft_nms_workspace_bytes, aligned to 16.
// Never waits for the device.
cudaError_t soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* labels, void* workspace,
                     void* final_scores, uint8_t* keep, cudaStream_t stream);

// Whether the kernels can: up to 2^32 pairs of location and class in an image, 2^31 locations in a level.
bool postprocess_fits(const PostprocessInput& in);
// Memory that is needed for the time of the call; bounded by the shapes, whatever is above the threshold.
size_t postprocess_workspace_bytes(const PostprocessInput& in);
// Four graph nodes. cudaErrorInvalidValue where `postprocess_fits` says no.
cudaError_t postprocess(const PostprocessInput& in, const PostprocessOutput& out, void* workspace, cudaStream_t stream);

}  // namespace cuda
#endif

}  // namespace gfl
