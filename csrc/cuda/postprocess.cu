// SPDX-License-Identifier: Apache-2.0
// Post-processing on the GPU: four graph nodes for the whole batch, of which the host learns nothing.
//
//   cls [B, C, H, W] per level  cls_dtype  read once, along memory     reg [B, 4(R+1), H, W] per level  reg_dtype  read
//   boxes [B, K, 4], scores [B, K]  float  write     labels, locations [B, K] int64, count [B] int32  write
// clear   the counters
// scan    one block per tile of 128 locations with all classes: values above the threshold become 64-bit keys
//         (value, ~pair) in the segment's memory, a segment being one level of one image
// select  one block per segment: the key down to which nms_pre candidates (or locations) lie, by radix selection
// finish  one block per image: the next 2048 or fewer greatest keys, sorted; 128 at a time are decoded, compared with
//         the boxes kept so far and with each other; it ends at K kept boxes or with the last key
// Memory is bounded: a segment has room for 16384 keys. Where more is above the threshold, the map itself is walked
// again instead, up to six times per selection; the result is the same. Bytes: sizeof(cls_dtype) per score, 8 per
// candidate written and read about three times, 4(R+1)·sizeof(reg_dtype) for each candidate that comes up for
// suppression. Decisions in float, rounded as on the CPU. Repeatable: the order of keys in memory changes from run to
// run, their set and the sorted order do not.
#include "gfl/select.h"

#include "terms/bins.h"
#include "terms/box.h"
#include "launch.h"
#include "map_tile.h"
#include "postprocess_plan.h"
#include "select.h"

namespace gfl::cuda {
namespace {

constexpr int kScanKeys = 512;  // of a tile, before they go to the segment
constexpr int kChunk = 2048;    // candidates sorted at a time, fewer where a digit's border is near
constexpr int kRound = 128;     // candidates decoded and compared at a time, four threads per candidate
constexpr int kWords = kRound / 32;
static_assert(kRound * 4 == kSelectThreads, "one thread per side");

struct ScanScratch {
  Key keys[kScanKeys];
  unsigned count, at;
};

template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>)
    postprocess_scan_kernel(const __grid_constant__ PostprocessInput in, const __grid_constant__ PostprocessPlan plan) {
  ScanScratch& scratch = *shared<ScanScratch>();
  const int tile = static_cast<int>(int64_t(blockIdx.x) / in.batch);
  int level = in.levels - 1;
  while (level > 0 && tile < plan.first_tile[level]) --level;
  const Segment segment{in, plan, int64_t(blockIdx.x) % in.batch, level};
  const PostprocessLevel& map = segment.map();
  const int64_t begin = int64_t(tile - plan.first_tile[level]) * kMapTile;
  unsigned* const total = plan.count + segment.index();
  const unsigned room = static_cast<unsigned>(plan.room[level]);
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();

  const T* data = static_cast<const T*>(map.cls);
  const MapTile shape = map_tile<T>(data, map.cls_stride, segment.image, map.height, map.width, begin, in.classes);
  for_runs<T>(
      shape, [&](Run<T>& run) { load_run(data, shape, run); },
      [&](Run<T>& run) {
        for_elements(shape, run, [&](const T& element, int place, int label) {
          const float value = static_cast<float>(load(&element));
          if (!(value > plan.threshold)) return;
          const int64_t location = begin + place;
          if (in.anchor_topk) atomicMax(segment.best() + location, rank_of(value));
          const Key key = segment.key(value, location, label);
          const unsigned at = atomicAdd(&scratch.count, 1u);
          if (at < kScanKeys) {
            scratch.keys[at] = key;
          } else if (__ldcg(total) <= room) {  // once there are too many, it does not matter how many
            const unsigned place_of_key = atomicAdd(total, 1u);
            if (place_of_key < room) segment.keys()[place_of_key] = key;
          }
        });
      });
  __syncthreads();
  const unsigned count = scratch.count < kScanKeys ? scratch.count : kScanKeys;
  if (count == 0) return;
  if (threadIdx.x == 0) scratch.at = __ldcg(total) > room ? room : atomicAdd(total, count);
  __syncthreads();
  for (unsigned i = threadIdx.x; i < count; i += kMapThreads) {
    if (scratch.at + i < room) segment.keys()[scratch.at + i] = scratch.keys[i];
  }
}

struct LevelScratch {
  SelectScratch select;
  unsigned count;
};

__global__ void __launch_bounds__(kSelectThreads, 1)
    postprocess_select_kernel(const __grid_constant__ PostprocessInput in,
                              const __grid_constant__ PostprocessPlan plan) {
  LevelScratch& scratch = *shared<LevelScratch>();
  const Segment segment{in, plan, int64_t(blockIdx.x) / in.levels, static_cast<int>(int64_t(blockIdx.x) % in.levels)};
  unsigned* const total = plan.count + segment.index();
  const unsigned count = *total, room = static_cast<unsigned>(plan.room[segment.level]);
  const Key wanted = in.nms_pre > 0 ? static_cast<Key>(in.nms_pre) : ~Key{0};
  Key cut = 0;
  if (in.nms_pre > 0 && (count > wanted || count > room)) {
    if (in.anchor_topk) {
      const unsigned* best = segment.best();
      const auto each = [&](const auto& visit) {
        for (int64_t i = threadIdx.x; i < segment.locations(); i += kSelectThreads) {
          if (best[i] != 0) visit(ranking_key(best[i], static_cast<uint64_t>(i)));
        }
      };
      cut = select_greatest(each, wanted, wanted, scratch.select);
    } else {
      cut = select_greatest([&](const auto& visit) { for_candidates(segment, visit); }, wanted, wanted, scratch.select);
    }
  }
  // Too many for the segment's memory, but what is left of them is not: no other kernel need walk the map.
  if (!in.anchor_topk && cut != 0 && count > room && wanted <= room) {
    if (threadIdx.x == 0) scratch.count = 0;
    __syncthreads();
    Key* const keys = segment.keys();
    for_map(segment, [&](Key key) {
      if (key >= cut) keys[atomicAdd(&scratch.count, 1u)] = key;
    });
    __syncthreads();
    if (threadIdx.x == 0) *total = scratch.count;
  }
  if (threadIdx.x == 0) plan.cut[segment.index()] = cut;
}

// Between 0 and `limit`; NaN for a NaN coordinate or limit.
__device__ __forceinline__ float clip(float x, float limit) {
  if (x < 0.0f) x = 0.0f;
  return limit < x || limit != limit ? limit : x;
}

__device__ __forceinline__ float centre_of(const PostprocessInput& in, const PostprocessLevel& level, int64_t cell) {
  const float stride = static_cast<float>(level.stride);
  if (in.legacy) return add_rn(mul_rn(static_cast<float>(cell), stride), static_cast<float>((level.stride - 1) / 2));
  return mul_rn(add_rn(static_cast<float>(cell), static_cast<float>(level.center_offset)), stride);
}

// A candidate's place.
struct Candidate {
  int level;
  int64_t location;
  int label;
};

__device__ __forceinline__ Candidate candidate_of(const PostprocessInput& in, const PostprocessPlan& plan,
                                                  int64_t index) {
  int level = in.levels - 1;
  while (level > 0 && index < plan.first[level]) --level;
  const int64_t pair = index - plan.first[level], location = pair / in.classes;
  return {level, location, static_cast<int>(pair - location * in.classes)};
}

// The logits of one side's distribution: from(j) is bin j's.
struct SideLogits {
  const PostprocessLevel& level;
  DType dtype;
  int64_t first;
  __device__ __forceinline__ SideLogits(const PostprocessInput& in, int64_t image, const Candidate& c, int side)
      : level(in.level[c.level]), dtype(in.reg_dtype) {
    const int64_t y = c.location / level.width, x = c.location - y * level.width;
    first = image * level.reg_stride[0] + int64_t(side) * (in.reg_max + 1) * level.reg_stride[1] +
            y * level.reg_stride[2] + x * level.reg_stride[3];
  }
  __device__ __forceinline__ float operator()(int j) const {
    return bounded_logit(as_float(level.reg, dtype, first + j * level.reg_stride[1]));
  }
};

// One coordinate of a candidate's box, clipped to the image.
__device__ __forceinline__ float side_of(const PostprocessInput& in, int64_t image, const Candidate& c, int side) {
  const PostprocessLevel& level = in.level[c.level];
  const int64_t y = c.location / level.width, x = c.location - y * level.width;
  const BinSoftmax<float> s = bin_softmax<float>(in.reg_max + 1, SideLogits(in, image, c, side));
  const float distance = mul_rn(s.mean(), static_cast<float>(level.stride));
  const float centre = centre_of(in, level, side % 2 == 0 ? x : y);
  const float size = in.image_sizes[image * 2 + (side % 2 == 0 ? 1 : 0)];
  return clip(side < 2 ? sub_rn(centre, distance) : add_rn(centre, distance), size - (in.legacy ? 1.0f : 0.0f));
}

struct FinishScratch {
  Key keys[kChunk];
  SelectScratch select;
  Box<float> box[kRound];
  float area[kRound];
  int label[kRound];
  alignas(16) unsigned suppressed[kRound][kWords];  // by each box, later ones of the round
  unsigned alive[kWords];
  int chosen[kRound];
  int count, chosen_count;
};

// Decodes and compares candidates [begin, begin + count) of the sorted keys; returns how many boxes are kept by now.
__device__ __forceinline__ int64_t one_round(const PostprocessInput& in, const PostprocessPlan& plan,
                                             const PostprocessOutput& out, int64_t image, int begin, int count,
                                             int64_t used, FinishScratch& s) {
  const int thread = static_cast<int>(threadIdx.x), mine = thread % kRound, part = thread / kRound;
  const float offset = box_offset<float>(in.legacy), threshold = static_cast<float>(in.iou_threshold);
  if (thread / 4 < count) {
    const Candidate c = candidate_of(in, plan, index_in(s.keys[begin + thread / 4]));
    const float coordinate = side_of(in, image, c, thread % 4);
    reinterpret_cast<float*>(s.box + thread / 4)[thread % 4] = coordinate;
    if (thread % 4 == 0) s.label[thread / 4] = c.label;
  }
  __syncthreads();
  const bool there = mine < count;
  Box<float> box{0, 0, 0, 0};
  if (there) box = s.box[mine];
  const float area = box_area(box, offset);
  const int label = there ? s.label[mine] : -1;
  if (part == 0) s.area[mine] = area;
  // A quarter of the kept boxes each.
  bool alive = there && sub_rn(box.x2, box.x1) > 0.0f && sub_rn(box.y2, box.y1) > 0.0f;
  const KeptBox* kept = plan.kept + image * in.max_detections;
  for (int64_t k = part; k < used && alive; k += kSelectThreads / kRound) {
    if (kept[k].label != label) continue;
    alive = !iou_exceeds(box_overlap(kept[k].box, kept[k].area, box, area, offset), threshold);
  }
  const unsigned alive_bits = __ballot_sync(kFullMask, alive);
  // Four warps have the same 32 candidates, one of each quarter.
  if (thread % kWarp == 0) s.suppressed[part * kWords + mine / kWarp][0] = alive_bits;
  __syncthreads();
  if (thread < kWords) {
    unsigned all = ~0u;
    for (int p = 0; p < kSelectThreads / kRound; ++p) all &= s.suppressed[p * kWords + thread][0];
    s.alive[thread] = all;
  }
  __syncthreads();
  // A word of later candidates each.
  unsigned word = 0;
  if (there && (s.alive[mine / 32] >> (mine % 32) & 1u) != 0) {
    for (int b = 0; b < 32; ++b) {
      const int other = part * 32 + b;
      if (other <= mine || other >= count || s.label[other] != label) continue;
      if (iou_exceeds(box_overlap(box, area, s.box[other], s.area[other], offset), threshold)) word |= 1u << b;
    }
  }
  s.suppressed[mine][part] = word;
  __syncthreads();
  if (thread == 0) {
    int chosen = 0;
    const int64_t left = in.max_detections - used;
    for (int w = 0; w < kWords && chosen < left; ++w) {
      while (s.alive[w] != 0 && chosen < left) {
        const int bit = __ffs(static_cast<int>(s.alive[w])) - 1, next = w * 32 + bit;
        s.chosen[chosen++] = next;
        s.alive[w] &= ~(1u << bit);
        for (int later = w; later < kWords; ++later) s.alive[later] &= ~s.suppressed[next][later];
      }
    }
    s.chosen_count = chosen;
  }
  __syncthreads();
  if (thread < s.chosen_count) {
    const int i = s.chosen[thread];
    const int64_t slot = image * in.max_detections + used + thread;
    const Box<float> b = s.box[i];
    plan.kept[slot] = {b, s.area[i], s.label[i]};
    const float x = in.scale_factors == nullptr ? 1.0f : in.scale_factors[image * 2];
    const float y = in.scale_factors == nullptr ? 1.0f : in.scale_factors[image * 2 + 1];
    out.boxes[slot * 4 + 0] = div_rn(b.x1, x);
    out.boxes[slot * 4 + 1] = div_rn(b.y1, y);
    out.boxes[slot * 4 + 2] = div_rn(b.x2, x);
    out.boxes[slot * 4 + 3] = div_rn(b.y2, y);
    const float value = value_of(rank_in(s.keys[begin + i]));
    out.scores[slot] = in.activated ? value : 1.0f / (1.0f + std::exp(-value));
    out.labels[slot] = s.label[i];
    out.locations[slot] = static_cast<int64_t>(index_in(s.keys[begin + i])) / in.classes;
  }
  used += s.chosen_count;
  __syncthreads();
  return used;
}

__global__ void __launch_bounds__(kSelectThreads, 2)
    postprocess_finish_kernel(const __grid_constant__ PostprocessInput in, const __grid_constant__ PostprocessPlan plan,
                              PostprocessOutput out) {
  FinishScratch& s = *shared<FinishScratch>();
  const int64_t image = blockIdx.x, slots = in.max_detections;
  int64_t used = 0;
  Key upper = ~Key{0};
  while (used < slots) {
    const auto each = [&](const auto& visit) {
      for (int level = 0; level < in.levels; ++level) {
        for_kept(Segment{in, plan, image, level}, [&](Key key) {
          if (key < upper) visit(key);
        });
      }
    };
    const Key lower = select_greatest(each, kChunk, kChunk / 4, s.select);
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    each([&](Key key) {
      if (key >= lower) s.keys[atomicAdd(&s.count, 1)] = key;
    });
    __syncthreads();
    const int count = s.count;
    int size = 2;
    while (size < count) size *= 2;
    sort_descending(s.keys, count, size);
    for (int begin = 0; begin < count && used < slots; begin += kRound) {
      used = one_round(in, plan, out, image, begin, count - begin < kRound ? count - begin : kRound, used, s);
    }
    if (lower == 0) break;
    upper = lower;
  }
  for (int64_t i = image * slots + used + threadIdx.x; i < (image + 1) * slots; i += kSelectThreads) {
    for (int side = 0; side < 4; ++side) out.boxes[i * 4 + side] = 0.0f;
    out.scores[i] = 0.0f;
    out.labels[i] = -1;
    out.locations[i] = -1;
  }
  if (threadIdx.x == 0) out.count[image] = static_cast<int32_t>(used);
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// The plan for a workspace, and through `bytes` its size and what of it, from its beginning, must be cleared.
struct Bytes { size_t cleared, all; };

PostprocessPlan plan_of(const PostprocessInput& in, void* workspace, Bytes& bytes) {
  PostprocessPlan plan{};
  plan.threshold = ranking_threshold(in.score_threshold, in.activated);
  int64_t pairs = 0;
  for (int l = 0; l < in.levels; ++l) {
    const int64_t locations = in.level[l].height * in.level[l].width, here = locations * in.classes;
    plan.start[l] = plan.locations;
    plan.first[l] = pairs;
    plan.first_tile[l] = plan.tiles;
    plan.room[l] = here < kSegmentKeys ? here : kSegmentKeys;
    plan.keys_at[l] = plan.keys_per_image;
    plan.locations += locations;
    plan.tiles += static_cast<int>((locations + kMapTile - 1) / kMapTile);
    plan.keys_per_image += plan.room[l];
    pairs += here;
  }
  char* const base = static_cast<char*>(workspace);
  size_t at = 0;
  const auto take = [&](size_t size) {
    char* const here = base == nullptr ? nullptr : base + at;
    at += aligned(size);
    return here;
  };
  const size_t images = static_cast<size_t>(in.batch), segments = images * static_cast<size_t>(in.levels);
  plan.count = reinterpret_cast<unsigned*>(take(sizeof(unsigned) * segments));
  if (in.anchor_topk) {
    plan.best = reinterpret_cast<unsigned*>(take(sizeof(unsigned) * images * static_cast<size_t>(plan.locations)));
  }
  bytes.cleared = at;
  plan.cut = reinterpret_cast<Key*>(take(sizeof(Key) * segments));
  plan.keys = reinterpret_cast<Key*>(take(sizeof(Key) * images * static_cast<size_t>(plan.keys_per_image)));
  plan.kept = reinterpret_cast<KeptBox*>(take(sizeof(KeptBox) * images * static_cast<size_t>(in.max_detections)));
  bytes.all = at;
  return plan;
}

}  // namespace

bool postprocess_fits(const PostprocessInput& in) {
  int64_t pairs = 0, tiles = 0;
  for (int l = 0; l < in.levels; ++l) {
    const int64_t locations = in.level[l].height * in.level[l].width;
    if (locations >= int64_t{1} << 31) return false;
    pairs += locations * in.classes;
    tiles += (locations + kMapTile - 1) / kMapTile;
  }
  return pairs <= int64_t{1} << 32 && tiles * in.batch < int64_t{1} << 31 && in.classes < int64_t{1} << 24;
}

size_t postprocess_workspace_bytes(const PostprocessInput& in) {
  Bytes bytes{};
  plan_of(in, nullptr, bytes);
  return bytes.all;
}

cudaError_t postprocess(const PostprocessInput& in, const PostprocessOutput& out, void* workspace,
                        cudaStream_t stream) {
  if (in.batch == 0) return cudaSuccess;
  if (!postprocess_fits(in)) return cudaErrorInvalidValue;
  Bytes bytes{};
  const PostprocessPlan plan = plan_of(in, workspace, bytes);
  const cudaError_t cleared = cudaMemsetAsync(workspace, 0, bytes.cleared, stream);
  if (cleared != cudaSuccess) return cleared;
  const unsigned images = static_cast<unsigned>(in.batch);
  if (plan.tiles > 0) {
    dispatch(in.cls_dtype, [&](auto t) {
      using T = decltype(t);
      GFL_LAUNCH(postprocess_scan_kernel<T>, dim3(static_cast<unsigned>(plan.tiles) * images), dim3(kMapThreads),
                 sizeof(ScanScratch), stream, in, plan);
    });
  }
  if (in.levels > 0) {
    GFL_LAUNCH(postprocess_select_kernel, dim3(images * static_cast<unsigned>(in.levels)), dim3(kSelectThreads),
               sizeof(LevelScratch), stream, in, plan);
  }
  GFL_LAUNCH(postprocess_finish_kernel, dim3(images), dim3(kSelectThreads), sizeof(FinishScratch), stream, in, plan,
             out);
  return cudaGetLastError();
}

}  // namespace gfl::cuda
