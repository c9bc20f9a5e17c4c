// SPDX-License-Identifier: Apache-2.0
// The workspace of post-processing, and the keys of a segment: one level of one image.
#pragma once
#include <cstdint>

#include "gfl/select.h"

#include "terms/box.h"
#include "launch.h"
#include "terms/ranking.h"
#include "terms/scalar.h"

namespace gfl::cuda {

constexpr int64_t kSegmentKeys = 16384;  // room per segment; with more candidates the map is read again

using Key = unsigned long long;

// A kept box as later ones are compared with it.
struct alignas(16) KeptBox {
  Box<float> box;
  float area;
  int label;
};

struct PostprocessPlan {
  float threshold;
  int64_t locations;                     // per image
  int64_t start[kPostprocessMaxLevels];  // first location of a level
  int64_t first[kPostprocessMaxLevels];  // first (location, class) pair of a level: start · classes
  int64_t room[kPostprocessMaxLevels], keys_at[kPostprocessMaxLevels];  // of a level's keys within an image's
  int64_t keys_per_image;
  int first_tile[kPostprocessMaxLevels], tiles;
  unsigned* count;  // [images, levels] candidates; more than there is room for: at least so many
  unsigned* best;   // [images, locations] rank of the best class, 0 for none; with anchor_topk
  Key* cut;         // [images, levels] least key that is kept: of pairs, or of locations with anchor_topk
  Key* keys;        // [images, keys_per_image]
  KeptBox* kept;    // [images, max_detections]
};

// One segment.
struct Segment {
  const PostprocessInput& in;
  const PostprocessPlan& plan;
  int64_t image;
  int level;

  __device__ __forceinline__ const PostprocessLevel& map() const { return in.level[level]; }
  __device__ __forceinline__ int64_t index() const { return image * in.levels + level; }
  __device__ __forceinline__ int64_t locations() const { return map().height * map().width; }
  __device__ __forceinline__ Key* keys() const { return plan.keys + image * plan.keys_per_image + plan.keys_at[level]; }
  __device__ __forceinline__ unsigned* best() const { return plan.best + image * plan.locations + plan.start[level]; }
  __device__ __forceinline__ Key key(float x, int64_t location, int64_t label) const {
    return ranking_key(rank_of(x), static_cast<uint64_t>(plan.first[level] + location * in.classes + label));
  }
  __device__ __forceinline__ int64_t location_of(Key key) const {
    return (int64_t(index_in(key)) - plan.first[level]) / in.classes;
  }
};

__device__ __forceinline__ float as_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16: return load(static_cast<const half_t*>(data) + i);
    case DType::bf16: return load(static_cast<const bfloat16_t*>(data) + i);
    case DType::f64: return static_cast<float>(static_cast<const double*>(data)[i]);
    case DType::f32: break;
  }
  return static_cast<const float*>(data)[i];
}

// visit(key) for this thread's share of the map's values above the threshold.
template <class Visit> __device__ __forceinline__ void for_map(const Segment& s, const Visit& visit) {
  const PostprocessLevel& map = s.map();
  const int64_t locations = s.locations(), pairs = locations * s.in.classes;
  const bool classes_inside = map.cls_stride[1] == 1 && s.in.classes > 1;
  for (int64_t i = threadIdx.x; i < pairs; i += blockDim.x) {
    const int64_t location = classes_inside ? i / s.in.classes : i % locations;
    const int64_t label = classes_inside ? i % s.in.classes : i / locations;
    const int64_t y = location / map.width, x = location % map.width;
    const float value = as_float(
        map.cls, s.in.cls_dtype,
        s.image * map.cls_stride[0] + label * map.cls_stride[1] + y * map.cls_stride[2] + x * map.cls_stride[3]);
    if (value > s.plan.threshold) visit(s.key(value, location, label));
  }
}

// The same from the segment's memory, where there was room for all.
template <class Visit> __device__ __forceinline__ void for_candidates(const Segment& s, const Visit& visit) {
  const unsigned count = s.plan.count[s.index()];
  if (count > s.plan.room[s.level]) {
    for_map(s, visit);
    return;
  }
  const Key* keys = s.keys();
  for (unsigned i = threadIdx.x; i < count; i += blockDim.x) visit(keys[i]);
}

// Those of them that the level's top-k leaves.
template <class Visit> __device__ __forceinline__ void for_kept(const Segment& s, const Visit& visit) {
  const Key cut = s.plan.cut[s.index()];
  for_candidates(s, [&](Key key) {
    Key deciding = key;
    if (s.in.anchor_topk && cut != 0) {
      const int64_t location = s.location_of(key);
      deciding = ranking_key(s.best()[location], static_cast<uint64_t>(location));
    }
    if (deciding >= cut) visit(key);
  });
}

}  // namespace gfl::cuda
