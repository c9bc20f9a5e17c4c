// SPDX-License-Identifier: Apache-2.0
// NMS on the CPU: a box is tested against the boxes of its class that are kept already, and left at the first hit. The kept
// boxes are a structure of arrays padded to whole groups, so that a group is one straight-line loop over vectors, compiled
// for each instruction set; the group test needs no division, and decides alike on all of them.
#include "gfl/nms.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "box.h"
#include "scalar.h"
#include "sort.h"

// Instruction sets are chosen at run time; contraction is off in all of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define GFL_X86_VARIANTS 1
#define GFL_INLINE __attribute__((always_inline)) inline
#else
#define GFL_INLINE inline
#endif

namespace gfl::cpu {
namespace {

constexpr int64_t kGroup = 16;    // kept boxes tested at once
constexpr int64_t kPiece = 1024;  // kept boxes that fit the first-level cache
constexpr int64_t kTile = 64;     // boxes that share a piece

template <class A> struct Scored {
  Box<A> box;
  A area;
  bool dropped;
};

// The kept boxes of a class. What follows the last one has a NaN area, which suppresses nothing.
template <class A> struct Kept {
  std::vector<A> storage;
  A *x1, *y1, *x2, *y2, *area;
  int64_t capacity = 0;

  void reset(int64_t count) {
    const int64_t wanted = (count + kGroup - 1) / kGroup * kGroup;
    if (wanted > capacity) {
      capacity = wanted;
      storage.assign(static_cast<size_t>(5 * capacity), A(0));
    }
    x1 = storage.data();
    y1 = x1 + capacity;
    x2 = y1 + capacity;
    y2 = x2 + capacity;
    area = y2 + capacity;
    for (int64_t i = 0; i < wanted; ++i) area[i] = std::numeric_limits<A>::quiet_NaN();
  }
  GFL_INLINE Box<A> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  GFL_INLINE void put(int64_t i, const Scored<A>& b) {
    x1[i] = b.box.x1;
    y1[i] = b.box.y1;
    x2[i] = b.box.x2;
    y2[i] = b.box.y2;
    area[i] = b.area;
  }
};

// Whether one of the kept boxes [begin, end) overlaps `box` above the threshold; may look at the rest of their groups.
template <class A>
GFL_INLINE bool suppressed(const Kept<A>& kept, int64_t begin, int64_t end, const Scored<A>& box, A offset, A threshold) {
  using Mask = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const bool every = threshold < A(0);  // without an intersection the IoU is 0, and above such a threshold
  for (int64_t first = begin / kGroup * kGroup; first < end; first += kGroup) {
    Mask any = every ? Mask(1) : Mask(0);
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const Overlap<A> overlap = box_overlap(kept.box(first + lane), kept.area[first + lane], box.box, box.area, offset);
      // Bitwise, not logical: a branch would keep the loop from becoming vectors.
      any |= static_cast<Mask>(overlap.intersection > A(0)) &
             static_cast<Mask>(overlap.intersection >= mul_rn(threshold, overlap.union_area));
    }
    if (any == 0) continue;
    for (int64_t k = first; k < first + kGroup; ++k) {
      if (iou_exceeds(box_overlap(kept.box(k), kept.area[k], box.box, box.area, offset), threshold)) return true;
    }
  }
  return false;
}

template <class T>
GFL_INLINE void walk(const NmsInput& in, const int64_t* order, int64_t count, Kept<acc_t<T>>& kept, uint8_t* keep) {
  using A = acc_t<T>;
  const A threshold = static_cast<A>(in.iou_threshold);
  const A offset = box_offset<A>(in.legacy);
  int64_t size = 0;
  for (int64_t tile = 0; tile < count; tile += kTile) {
    const int64_t here = std::min(kTile, count - tile);
    Scored<A> boxes[kTile];
    for (int64_t i = 0; i < here; ++i) {
      const T* p = static_cast<const T*>(in.boxes) + order[tile + i] * in.stride_box;
      const int64_t s = in.stride_coordinate;
      boxes[i].box = {load(p), load(p + s), load(p + 2 * s), load(p + 3 * s)};
      boxes[i].area = box_area(boxes[i].box, offset);
      boxes[i].dropped = false;
    }
    // The tile against what was kept before it, a piece that stays in the first-level cache at a time.
    for (int64_t begin = 0; begin < size; begin += kPiece) {
      const int64_t end = std::min(begin + kPiece, size);
      for (int64_t i = 0; i < here; ++i) {
        if (!boxes[i].dropped) boxes[i].dropped = suppressed(kept, begin, end, boxes[i], offset, threshold);
      }
    }
    const int64_t before = size;
    for (int64_t i = 0; i < here; ++i) {
      const bool keeps = !boxes[i].dropped && !suppressed(kept, before, size, boxes[i], offset, threshold);
      keep[order[tile + i]] = keeps ? 1 : 0;
      if (keeps) kept.put(size++, boxes[i]);
    }
  }
}

template <class T>
void walk_generic(const NmsInput& in, const int64_t* order, int64_t count, Kept<acc_t<T>>& kept, uint8_t* keep) {
  walk<T>(in, order, count, kept, keep);
}

template <class T> using Walk = void (*)(const NmsInput&, const int64_t*, int64_t, Kept<acc_t<T>>&, uint8_t*);

#if defined(GFL_X86_VARIANTS)
template <class T>
__attribute__((target("avx2"))) void walk_avx2(const NmsInput& in, const int64_t* order, int64_t count,
                                               Kept<acc_t<T>>& kept, uint8_t* keep) {
  walk<T>(in, order, count, kept, keep);
}
template <class T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void walk_avx512(
    const NmsInput& in, const int64_t* order, int64_t count, Kept<acc_t<T>>& kept, uint8_t* keep) {
  walk<T>(in, order, count, kept, keep);
}
#endif

template <class T> Walk<T> best_walk() {
#if defined(GFL_X86_VARIANTS)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return walk_avx512<T>;
  }
  if (__builtin_cpu_supports("avx2")) return walk_avx2<T>;
#endif
  return walk_generic<T>;
}

template <class T> void order_by(const T* scores, int64_t stride, int64_t count, int64_t* order) {
  using Key = decltype(falling_key(acc_t<T>{}));
  std::vector<Keyed<Key>> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) items[static_cast<size_t>(i)] = {falling_key(load(scores + i * stride)), i};
  sort_stable(items);
  for (int64_t i = 0; i < count; ++i) order[i] = items[static_cast<size_t>(i)].index;
}

}  // namespace

void order_by_score(const void* scores, DType dtype, int64_t stride, int64_t count, int64_t* order) {
  dispatch(dtype, [&](auto t) { order_by(static_cast<const decltype(t)*>(scores), stride, count, order); });
}

int64_t group_by_class(const int64_t* classes, const int64_t* order, int64_t count, int64_t* grouped, int64_t* bounds) {
  std::vector<Keyed<uint64_t>> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) items[static_cast<size_t>(i)] = {rising_key(classes[order[i]]), order[i]};
  sort_stable(items);
  int64_t met = 0;
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    grouped[i] = items[at].index;
    if (i == 0 || items[at].key != items[at - 1].key) bounds[met++] = i;
  }
  bounds[met] = count;
  return met;
}

void nms(const NmsInput& in, const int64_t* grouped, const int64_t* bounds, uint8_t* keep, int64_t begin, int64_t end) {
  dispatch(in.dtype, [&](auto t) {
    using T = decltype(t);
    const Walk<T> walk_class = best_walk<T>();
    Kept<acc_t<T>> kept;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t count = bounds[s + 1] - bounds[s];
      kept.reset(count);
      walk_class(in, grouped + bounds[s], count, kept, keep);
    }
  });
}

}  // namespace gfl::cpu
