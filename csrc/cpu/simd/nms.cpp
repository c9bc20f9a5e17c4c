// SPDX-License-Identifier: Apache-2.0
// NMS within a class: a box is tested against the kept boxes until one suppresses it. The kept boxes are a structure of
// arrays padded to whole groups of lanes, so that a group is one straight-line loop without a division; what passes it
// is decided as box.h says, so that every instruction set decides alike.
//
// Once many boxes are kept, and if few pairs can overlap, it goes the other way round: each kept box suppresses those
// that a grid finds near it.
#include "gfl/select.h"

#include "box_grid.h"
#include "terms/box.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {
namespace {

constexpr int64_t kPiece = 1024;  // kept boxes that fit the first-level cache
constexpr int64_t kTile = 64;     // boxes that share a piece
constexpr int64_t kMany = 512;    // kept boxes from which on a grid is considered, if as many are left

// A truth value as wide as the numbers it comes from, so that it fills vectors of the same shape.
template <class A> struct MaskOf { using type = int32_t; };
template <> struct MaskOf<double> { using type = int64_t; };

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
template <class A> inline int64_t kept_bytes(int64_t count) { return 5 * padded(count) * int64_t(sizeof(A)); }

template <class A> struct Scored {
  Box<A> box;
  A area;
  bool dropped;
};

// The kept boxes of a class. What follows the last one has a NaN area, which suppresses nothing.
template <class A> struct Kept {
  A *x1, *y1, *x2, *y2, *area;

  Kept(A* scratch, int64_t capacity)
      : x1(scratch), y1(x1 + capacity), x2(y1 + capacity), y2(x2 + capacity), area(y2 + capacity) {
    for (int64_t i = 0; i < 4 * capacity; ++i) scratch[i] = A(0);
    for (int64_t i = 0; i < capacity; ++i) area[i] = std::numeric_limits<A>::quiet_NaN();
  }
  Box<A> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  void put(int64_t i, const Scored<A>& b) const {
    x1[i] = b.box.x1;
    y1[i] = b.box.y1;
    x2[i] = b.box.x2;
    y2[i] = b.box.y2;
    area[i] = b.area;
  }
};

// Whether one of the kept boxes [begin, end) overlaps `box` above the threshold; may look at the rest of their groups.
template <class A>
inline bool suppressed(const Kept<A>& kept, int64_t begin, int64_t end, const Scored<A>& box, A offset, A threshold) {
  using Mask = typename MaskOf<A>::type;
  const bool every = threshold < A(0);  // without an intersection the IoU is 0, and above such a threshold
  for (int64_t first = begin / kLanes * kLanes; first < end; first += kLanes) {
    Mask any = every ? Mask(1) : Mask(0);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t k = first + lane;
      const Overlap<A> overlap = box_overlap(kept.box(k), kept.area[k], box.box, box.area, offset);
      // Bitwise, not logical: a branch would keep the loop from becoming vectors.
      any |= static_cast<Mask>(overlap.intersection > A(0)) &
             static_cast<Mask>(overlap.intersection >= mul_rn(threshold, overlap.union_area));
    }
    if (any == 0) continue;
    for (int64_t k = first; k < first + kLanes; ++k) {
      if (iou_exceeds(box_overlap(kept.box(k), kept.area[k], box.box, box.area, offset), threshold)) return true;
    }
  }
  return false;
}

template <class T> inline Box<acc_t<T>> box_at(const NmsInput& in, int64_t i) {
  const T* p = static_cast<const T*>(in.boxes) + i * in.stride_box;
  const int64_t s = in.stride_coordinate;
  return {load(p), load(p + s), load(p + 2 * s), load(p + 3 * s)};
}

// The rest of a class, of which `size` boxes are kept so far.
template <class T>
void walk_grid(const NmsInput& in, const int64_t* order, int64_t count, const Kept<acc_t<T>>& kept, int64_t size,
               const Reach<acc_t<T>>& reach, unsigned char* scratch, uint8_t* keep) {
  using A = acc_t<T>;
  using Mask = typename MaskOf<A>::type;
  const A threshold = static_cast<A>(in.iou_threshold);
  Box<A>* const boxes = reinterpret_cast<Box<A>*>(scratch);
  for (int64_t i = 0; i < count; ++i) boxes[i] = box_at<T>(in, order[i]);
  BoxGrid<A> grid(scratch + count * static_cast<int64_t>(sizeof(Box<A>)), count, reach);
  grid.build(count, [&](int64_t i) { return boxes[i]; }, [](int64_t) { return true; });
  for (int64_t i = 0; i < count; ++i) keep[order[i]] = 1;
  // What comes before a kept box in the order is decided: it is kept and does not overlap, or is no longer in the grid.
  const auto suppress = [&](const Box<A>& box, A area) {
    grid.near(box, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kLanes) {
        Mask any = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t k = first + lane;
          const Overlap<A> overlap = box_overlap(box, area, grid.box(k), grid.area[k], reach.offset);
          any |= static_cast<Mask>(overlap.intersection > A(0)) &
                 static_cast<Mask>(overlap.intersection >= mul_rn(threshold, overlap.union_area));
        }
        if (any == 0) continue;
        for (int64_t k = first; k < first + kLanes; ++k) {
          if (!iou_exceeds(box_overlap(box, area, grid.box(k), grid.area[k], reach.offset), threshold)) continue;
          keep[order[grid.index[k]]] = 0;
          grid.remove(k);
        }
      }
    });
  };
  for (int64_t k = 0; k < size; ++k) suppress(kept.box(k), kept.area[k]);
  for (int64_t i = 0; i < count; ++i) {
    if (keep[order[i]] == 0) continue;
    suppress(boxes[i], box_area(boxes[i], reach.offset));
    keep[order[i]] = 1;  // it suppressed itself
  }
}

template <class T>
void walk(const NmsInput& in, const int64_t* order, int64_t count, void* scratch, uint8_t* keep) {
  using A = acc_t<T>;
  const A threshold = static_cast<A>(in.iou_threshold);
  const A offset = box_offset<A>(in.legacy);
  const Kept<A> kept(static_cast<A*>(scratch), padded(count));
  const Reach<A> reach(threshold, offset);
  bool considered = threshold < A(0);  // where every pair can suppress
  int64_t size = 0;
  for (int64_t tile = 0; tile < count; tile += kTile) {
    if (size >= kMany && count - tile >= kMany && !considered) {
      considered = true;
      if (grid_pays(count - tile, reach, [&](int64_t i) { return box_at<T>(in, order[tile + i]); })) {
        unsigned char* rest = static_cast<unsigned char*>(scratch) + kept_bytes<A>(count);
        return walk_grid<T>(in, order + tile, count - tile, kept, size, reach, rest, keep);
      }
    }
    const int64_t here = lesser(kTile, count - tile);
    Scored<A> boxes[kTile];
    for (int64_t i = 0; i < here; ++i) {
      boxes[i].box = box_at<T>(in, order[tile + i]);
      boxes[i].area = box_area(boxes[i].box, offset);
      boxes[i].dropped = false;
    }
    // The tile against what was kept before it, a piece that stays in the first-level cache at a time.
    for (int64_t begin = 0; begin < size; begin += kPiece) {
      const int64_t end = lesser(begin + kPiece, size);
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

}  // namespace

// Of the largest class that will be walked with it. Aligned to 16.
int64_t nms_class_scratch_bytes(int64_t count, DType dtype) {
  const auto bytes = [&](auto a) {
    using A = decltype(a);
    const bool many = count > kMany;
    return kept_bytes<A>(count) + (many ? count * int64_t(sizeof(Box<A>)) + BoxGrid<A>::bytes(count) : 0);
  };
  return dtype == DType::f64 ? bytes(double{}) : bytes(float{});
}

// order: [count] indices of the boxes of one class, the best first. keep: by index of the box.
void nms_class(const NmsInput& in, const int64_t* order, int64_t count, void* scratch, uint8_t* keep) {
  dispatch(in.dtype, [&](auto t) { walk<decltype(t)>(in, order, count, scratch, keep); });
}

}  // namespace gfl::GFL_ISA
