// SPDX-License-Identifier: Apache-2.0
// Post-processing on the CPU: one pass over the scores, then work on the survivors alone.
//
//   cls [B, C, H, W] per level         cls_dtype  read once, in the order of memory
//   reg [B, 4(R+1), H, W] per level    reg_dtype  read where a candidate comes up for suppression
//   boxes [B, K, 4], scores [B, K]     float      write        labels, locations [B, K] int64, count [B] int32 write
// One thread per image. Each level's values above the threshold are compacted into 64-bit keys (value, ~index)
// and cut to nms_pre by selection. Suppression takes candidates from the best down, sorted one block at a time; each is
// decoded when its turn comes and compared with the kept boxes of its class only, until K boxes are kept.
#include "gfl/select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "terms/bins.h"
#include "terms/box.h"
#include "terms/ranking.h"
#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

using Keys = std::vector<uint64_t>;

// Elements tested together for a candidate; nearly always there is none.
constexpr int kBlock = 32;

// Tests elements against the threshold, one by one or a block at a time.
template <class T> struct Above {
  float threshold;
  explicit Above(float limit) : threshold(limit) {}
  bool operator()(const T* p) const { return static_cast<float>(load(p)) > threshold; }
  bool any(const T* block) const {
    int32_t hits = 0;
    for (int j = 0; j < kBlock; ++j) hits += static_cast<float>(load(block + j)) > threshold ? 1 : 0;
    return hits != 0;
  }
};

// A 16-bit float's bits, as an integer that rises with its value: positive bits are that already, negative ones fall.
inline int16_t rising(uint16_t bits) {
  return static_cast<int16_t>(bits ^ (static_cast<uint16_t>(static_cast<int16_t>(bits) >> 15) & 0x7fffu));
}

// 16-bit elements are compared as integers, unconverted: those above the threshold are one interval, with NaN outside.
template <class T> struct AboveSixteen {
  int16_t lowest, highest;

  static float value(int16_t key) {
    const uint16_t bits = static_cast<uint16_t>(rising(static_cast<uint16_t>(key)));
    T x;
    std::memcpy(&x, &bits, 2);
    return to_float(x);
  }

  AboveSixteen(float limit, uint16_t infinity) {
    highest = static_cast<int16_t>(infinity);
    int low = rising(static_cast<uint16_t>(infinity | 0x8000u));
    int high = infinity + 1;  // past +∞: nothing is above
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (middle <= infinity && !(value(static_cast<int16_t>(middle)) > limit)) low = middle + 1;
      else high = middle;
    }
    lowest = static_cast<int16_t>(low);
  }

  bool operator()(const T* p) const {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    const int16_t key = rising(bits);
    return key >= lowest && key <= highest;
  }
  bool any(const T* block) const {
    uint16_t bits[kBlock];
    std::memcpy(bits, block, sizeof(bits));
    int16_t hits = 0;
    for (int j = 0; j < kBlock; ++j) {
      const int16_t key = rising(bits[j]);
      hits = static_cast<int16_t>(hits | ((key >= lowest ? -1 : 0) & (key <= highest ? -1 : 0)));
    }
    return hits != 0;
  }
};
template <> struct Above<half_t> : AboveSixteen<half_t> {
  explicit Above(float limit) : AboveSixteen(limit, 0x7c00u) {}
};
template <> struct Above<bfloat16_t> : AboveSixteen<bfloat16_t> {
  explicit Above(float limit) : AboveSixteen(limit, 0x7f80u) {}
};

// Appends the keys of a run of `count` elements whose indices are first, first + step, …
template <class T>
void scan(const T* run, int64_t count, int64_t stride, const Above<T>& above, uint64_t first, uint64_t step,
          Keys& keys) {
  const auto take = [&](int64_t i) {
    const T* p = run + i * stride;
    if (!above(p)) return;
    keys.push_back(ranking_key(rank_of(static_cast<float>(load(p))), first + static_cast<uint64_t>(i) * step));
  };
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kBlock <= count; i += kBlock) {
      if (!above.any(run + i)) continue;
      for (int64_t j = 0; j < kBlock; ++j) take(i + j);
    }
  }
  for (; i < count; ++i) take(i);
}

// The keys of one level's candidates, in no order; the index is location · classes + class.
template <class T>
void scan_level(const PostprocessInput& in, const PostprocessLevel& level, int64_t image, float threshold, Keys& keys) {
  const Above<T> above(threshold);
  const T* map = static_cast<const T*>(level.cls) + image * level.cls_stride[0];
  const int64_t channel = level.cls_stride[1], row = level.cls_stride[2], column = level.cls_stride[3];
  const int64_t locations = level.height * level.width;
  const uint64_t classes = static_cast<uint64_t>(in.classes);
  // The innermost loop follows memory, and is as long as memory allows.
  if (channel == 1 && column == in.classes && (row == level.width * column || level.height == 1)) {
    scan(map, locations * in.classes, 1, above, 0, 1, keys);
  } else if (channel == 1 && column != 1) {
    for (int64_t location = 0; location < locations; ++location) {
      const T* cell = map + location / level.width * row + location % level.width * column;
      scan(cell, in.classes, 1, above, static_cast<uint64_t>(location) * classes, 1, keys);
    }
  } else {
    const bool joined = row == level.width * column;
    const int64_t runs = joined ? 1 : level.height, length = joined ? locations : level.width;
    for (int64_t c = 0; c < in.classes; ++c) {
      for (int64_t y = 0; y < runs; ++y) {
        const uint64_t first = static_cast<uint64_t>(y * length) * classes + static_cast<uint64_t>(c);
        scan(map + c * channel + y * row, length, column, above, first, classes, keys);
      }
    }
  }
}

// Cuts `keys` to the greatest `count`, in no order.
void keep_greatest(Keys& keys, int64_t count) {
  if (count <= 0 || static_cast<int64_t>(keys.size()) <= count) return;
  std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end(), std::greater<>());
  keys.resize(static_cast<size_t>(count));
}

// Keeps the candidates of the `count` locations whose best class is greatest, ties by the lower location.
void keep_greatest_locations(Keys& keys, int64_t classes, int64_t locations, int64_t count) {
  if (count <= 0) return;
  std::vector<uint32_t> best(static_cast<size_t>(locations), 0);
  for (const uint64_t key : keys) {
    uint32_t& slot = best[static_cast<size_t>(index_in(key) / classes)];
    slot = std::max(slot, rank_in(key));
  }
  Keys ranked;
  for (size_t location = 0; location < best.size(); ++location) {
    if (best[location] != 0) ranked.push_back(ranking_key(best[location], location));
  }
  if (static_cast<int64_t>(ranked.size()) <= count) return;
  std::nth_element(ranked.begin(), ranked.begin() + count - 1, ranked.end(), std::greater<>());
  const uint64_t last = ranked[static_cast<size_t>(count - 1)];
  const auto beyond = [&](uint64_t key) {
    const size_t location = static_cast<size_t>(index_in(key) / classes);
    return ranking_key(best[location], location) < last;
  };
  keys.erase(std::remove_if(keys.begin(), keys.end(), beyond), keys.end());
}

struct Candidate {
  uint32_t rank, index;
  int32_t level;

  bool operator<(const Candidate& other) const {
    if (rank != other.rank) return rank > other.rank;
    if (level != other.level) return level < other.level;
    return index < other.index;
  }
};

// Between 0 and `limit`; NaN for a NaN coordinate or limit.
inline float clip(float x, float limit) {
  if (x < 0.0f) x = 0.0f;
  return limit < x || limit != limit ? limit : x;
}

struct Decoder {
  const PostprocessInput& in;
  int64_t image;
  float width, height;  // what boxes are clipped to

  template <class T> Box<float> decode(const PostprocessLevel& level, int64_t x, int64_t y) const {
    const T* cell = static_cast<const T*>(level.reg) + image * level.reg_stride[0] + y * level.reg_stride[2] +
                    x * level.reg_stride[3];
    const int bins = in.reg_max + 1;
    const float stride = static_cast<float>(level.stride);
    float distance[4], row[kPostprocessMaxReg + 1];
    for (int side = 0; side < 4; ++side) {
      const T* logits = cell + side * bins * level.reg_stride[1];
      for (int j = 0; j < bins; ++j) row[j] = bounded_logit(static_cast<float>(load(logits + j * level.reg_stride[1])));
      distance[side] = mul_rn(bin_softmax<float>(bins, [&](int j) { return row[j]; }).mean(), stride);
    }
    const float centre_x = centre(x, level), centre_y = centre(y, level);
    return {clip(sub_rn(centre_x, distance[0]), width), clip(sub_rn(centre_y, distance[1]), height),
            clip(add_rn(centre_x, distance[2]), width), clip(add_rn(centre_y, distance[3]), height)};
  }

  float centre(int64_t cell, const PostprocessLevel& level) const {
    const float stride = static_cast<float>(level.stride);
    if (in.legacy) return add_rn(mul_rn(static_cast<float>(cell), stride), static_cast<float>((level.stride - 1) / 2));
    return mul_rn(add_rn(static_cast<float>(cell), static_cast<float>(level.center_offset)), stride);
  }
};

// The boxes kept so far, in one chain per class.
class Kept {
 public:
  Kept(int64_t classes, float threshold, bool legacy)
      : last_(static_cast<size_t>(classes), -1), threshold_(threshold), offset_(box_offset<float>(legacy)) {}

  // Whether the box is kept: no kept box of its class overlaps it by more than the threshold.
  bool add(const Box<float>& box, int64_t label) {
    const float area = box_area(box, offset_);
    for (int64_t i = last_[static_cast<size_t>(label)]; i >= 0; i = entries_[static_cast<size_t>(i)].previous) {
      const Entry& other = entries_[static_cast<size_t>(i)];
      if (box_iou(other.box, other.area, box, area, offset_) > threshold_) return false;
    }
    entries_.push_back({box, area, last_[static_cast<size_t>(label)]});
    last_[static_cast<size_t>(label)] = static_cast<int64_t>(entries_.size()) - 1;
    return true;
  }

 private:
  struct Entry {
    Box<float> box;
    float area;
    int64_t previous;
  };
  std::vector<Entry> entries_;
  std::vector<int64_t> last_;
  float threshold_, offset_;
};

void one_image(const PostprocessInput& in, const PostprocessOutput& out, int64_t image) {
  const int64_t slots = in.max_detections;
  float* boxes = out.boxes + image * slots * 4;
  float* scores = out.scores + image * slots;
  int64_t* labels = out.labels + image * slots;
  int64_t* places = out.locations + image * slots;
  std::fill(boxes, boxes + slots * 4, 0.0f);
  std::fill(scores, scores + slots, 0.0f);
  std::fill(labels, labels + slots, int64_t(-1));
  std::fill(places, places + slots, int64_t(-1));
  out.count[image] = 0;
  if (slots == 0) return;

  const float threshold = ranking_threshold(in.score_threshold, in.activated);
  std::vector<Candidate> candidates;
  Keys keys;
  int64_t first_location[kPostprocessMaxLevels], locations = 0;
  for (int l = 0; l < in.levels; ++l) {
    const PostprocessLevel& level = in.level[l];
    keys.clear();
    dispatch(in.cls_dtype, [&](auto t) { scan_level<decltype(t)>(in, level, image, threshold, keys); });
    if (in.anchor_topk) keep_greatest_locations(keys, in.classes, level.height * level.width, in.nms_pre);
    else keep_greatest(keys, in.nms_pre);
    for (const uint64_t key : keys) candidates.push_back({rank_in(key), index_in(key), l});
    first_location[l] = locations;
    locations += level.height * level.width;
  }

  const float shrink = in.legacy ? 1.0f : 0.0f;
  const Decoder decoder{in, image, in.image_sizes[image * 2 + 1] - shrink, in.image_sizes[image * 2] - shrink};
  const float factor_x = in.scale_factors == nullptr ? 1.0f : in.scale_factors[image * 2];
  const float factor_y = in.scale_factors == nullptr ? 1.0f : in.scale_factors[image * 2 + 1];
  Kept kept(in.classes, static_cast<float>(in.iou_threshold), in.legacy);
  // A location is decoded once, however many of its classes are candidates.
  std::vector<int32_t> decoded(static_cast<size_t>(locations), -1);
  std::vector<Box<float>> decoded_boxes;

  int64_t used = 0;
  // Most images are full, or out of candidates, after a few blocks: what is never looked at is never sorted.
  size_t block = static_cast<size_t>(std::max<int64_t>(256, 4 * slots));
  for (size_t begin = 0; begin < candidates.size() && used < slots; begin += block, block *= 2) {
    const auto first = candidates.begin() + static_cast<std::ptrdiff_t>(begin);
    const auto last = candidates.size() - begin > block ? first + static_cast<std::ptrdiff_t>(block) : candidates.end();
    if (last != candidates.end()) std::nth_element(first, last, candidates.end());
    std::sort(first, last);
    for (auto candidate = first; candidate != last && used < slots; ++candidate) {
      const PostprocessLevel& level = in.level[candidate->level];
      const int64_t location = candidate->index / in.classes, label = candidate->index % in.classes;
      const int64_t place = first_location[candidate->level] + location;  // over all levels
      int32_t& slot = decoded[static_cast<size_t>(place)];
      if (slot < 0) {
        slot = static_cast<int32_t>(decoded_boxes.size());
        decoded_boxes.push_back(dispatch(in.reg_dtype, [&](auto t) {
          return decoder.decode<decltype(t)>(level, location % level.width, location / level.width);
        }));
      }
      const Box<float>& box = decoded_boxes[static_cast<size_t>(slot)];
      if (!(sub_rn(box.x2, box.x1) > 0.0f && sub_rn(box.y2, box.y1) > 0.0f) || !kept.add(box, label)) continue;
      const float value = value_of(candidate->rank);
      boxes[used * 4 + 0] = div_rn(box.x1, factor_x);
      boxes[used * 4 + 1] = div_rn(box.y1, factor_y);
      boxes[used * 4 + 2] = div_rn(box.x2, factor_x);
      boxes[used * 4 + 3] = div_rn(box.y2, factor_y);
      scores[used] = in.activated ? value : 1.0f / (1.0f + std::exp(-value));
      labels[used] = label;
      places[used] = place;
      ++used;
    }
    if (last == candidates.end()) break;
  }
  out.count[image] = static_cast<int32_t>(used);
}

}  // namespace

void postprocess(const PostprocessInput& in, const PostprocessOutput& out, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image) one_image(in, out, image);
}

}  // namespace gfl::cpu
