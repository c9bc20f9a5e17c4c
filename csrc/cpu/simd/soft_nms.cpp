// SPDX-License-Identifier: Apache-2.0
// Soft-NMS within a class. Boxes lie in groups of lanes in the order of their indices; each group remembers its best
// score, as an integer that orders like the scores. When a box is taken, every group is tested for an intersection by
// vector code, and only groups that have one go box by box and look for their best again.
#include "gfl/select.h"

#include <cmath>

#include "terms/box.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {
namespace {

// Integers that order like the scores: NaN the greatest, −0 equal to 0, a box that is gone the least.
template <class A> struct Rank;
template <> struct Rank<float> {
  using type = int32_t;
  static constexpr type kSign = 0x7fffffff;
};
template <> struct Rank<double> {
  using type = int64_t;
  static constexpr type kSign = 0x7fffffffffffffff;
};

template <class A> inline typename Rank<A>::type rank_of(A score) {
  using I = typename Rank<A>::type;
  if (score != score) return std::numeric_limits<I>::max();
  score += A(0);
  I bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits < 0 ? bits ^ Rank<A>::kSign : bits;
}

template <class A> constexpr typename Rank<A>::type kGone = std::numeric_limits<typename Rank<A>::type>::min();

inline int64_t groups_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

template <class A> struct Boxes {
  using I = typename Rank<A>::type;
  A *x1, *y1, *x2, *y2, *area, *score;
  I *rank, *best;  // of each box, of each group

  Boxes(void* scratch, int64_t count) {
    const int64_t groups = groups_of(count), capacity = groups * kLanes;
    x1 = static_cast<A*>(scratch);
    y1 = x1 + capacity;
    x2 = y1 + capacity;
    y2 = x2 + capacity;
    area = y2 + capacity;
    score = area + capacity;
    rank = reinterpret_cast<I*>(score + capacity);
    best = rank + capacity;
    for (int64_t i = 0; i < 6 * capacity; ++i) x1[i] = A(0);
    for (int64_t i = 0; i < capacity; ++i) rank[i] = kGone<A>;
  }
  Box<A> box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }
  // A group's best, and where it is: the first of equal ones.
  int64_t update(int64_t group) const {
    int64_t at = group * kLanes;
    for (int64_t i = at + 1; i < (group + 1) * kLanes; ++i) {
      if (rank[i] > rank[at]) at = i;
    }
    best[group] = rank[at];
    return at;
  }
};

// The best box left, or −1.
template <class A> inline int64_t best_of(const Boxes<A>& boxes, int64_t groups) {
  typename Rank<A>::type greatest = kGone<A>;
  for (int64_t g = 0; g < groups; ++g) greatest = boxes.best[g] > greatest ? boxes.best[g] : greatest;
  if (greatest == kGone<A>) return -1;
  int64_t g = 0;
  while (boxes.best[g] != greatest) ++g;
  return boxes.update(g);
}

template <class A> inline A weight_of(A iou, const SoftNmsInput& in) {
  if (in.gaussian) {
    const double q = static_cast<double>(iou);
    return iou == iou ? static_cast<A>(std::exp(-(q * q) / in.sigma)) : A(1);
  }
  return iou >= static_cast<A>(in.iou_threshold) ? sub_rn(A(1), iou) : A(1);
}

template <class A> inline void decay(const Boxes<A>& boxes, int64_t groups, int64_t taken, const SoftNmsInput& in) {
  const Box<A> box = boxes.box(taken);
  const A area = boxes.area[taken], min_score = static_cast<A>(in.min_score);
  for (int64_t g = 0; g < groups; ++g) {
    if (boxes.best[g] == kGone<A>) continue;
    const int64_t first = g * kLanes;
    typename Rank<A>::type any = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Overlap<A> overlap = box_overlap(box, area, boxes.box(first + lane), boxes.area[first + lane], A(0));
      any |= static_cast<typename Rank<A>::type>(overlap.intersection > A(0));
    }
    if (any == 0) continue;  // an IoU of 0 or NaN: a weight of 1
    for (int64_t i = first; i < first + kLanes; ++i) {
      if (boxes.rank[i] == kGone<A>) continue;
      const A iou = box_iou(box, area, boxes.box(i), boxes.area[i], A(0));
      boxes.score[i] = mul_rn(boxes.score[i], weight_of(iou, in));
      boxes.rank[i] = boxes.score[i] < min_score ? kGone<A> : rank_of(boxes.score[i]);
    }
    boxes.update(g);
  }
}

template <class T>
void walk(const SoftNmsInput& in, const int64_t* order, int64_t count, void* scratch, void* final_scores,
          uint8_t* keep) {
  using A = acc_t<T>;
  const A min_score = static_cast<A>(in.min_score);
  const Boxes<A> boxes(scratch, count);
  const int64_t groups = groups_of(count);
  for (int64_t i = 0; i < count; ++i) {
    const T* p = static_cast<const T*>(in.boxes) + order[i] * in.stride_box;
    const int64_t s = in.stride_coordinate;
    const Box<A> box{load(p), load(p + s), load(p + 2 * s), load(p + 3 * s)};
    boxes.x1[i] = box.x1;
    boxes.y1[i] = box.y1;
    boxes.x2[i] = box.x2;
    boxes.y2[i] = box.y2;
    boxes.area[i] = box_area(box, A(0));
    boxes.score[i] = dispatch(in.score_dtype, [&](auto t) {
      return static_cast<A>(load(static_cast<const decltype(t)*>(in.scores) + order[i] * in.stride_score));
    });
    boxes.rank[i] = boxes.score[i] < min_score ? kGone<A> : rank_of(boxes.score[i]);
    keep[order[i]] = 0;
  }
  for (int64_t g = 0; g < groups; ++g) boxes.update(g);
  for (int64_t taken = best_of(boxes, groups); taken >= 0; taken = best_of(boxes, groups)) {
    keep[order[taken]] = 1;
    static_cast<A*>(final_scores)[order[taken]] = boxes.score[taken];
    boxes.rank[taken] = kGone<A>;
    boxes.update(taken / kLanes);
    decay(boxes, groups, taken, in);
  }
}

}  // namespace

// Of the largest class that will be walked with it.
int64_t soft_nms_class_scratch_bytes(int64_t count, DType dtype) {
  const int64_t size = static_cast<int64_t>(dtype == DType::f64 ? sizeof(double) : sizeof(float));
  return size * groups_of(count) * (7 * kLanes + 1);
}

// order: [count] indices of the boxes of one class, rising.
void soft_nms_class(const SoftNmsInput& in, const int64_t* order, int64_t count, void* scratch, void* final_scores,
                    uint8_t* keep) {
  dispatch(in.dtype, [&](auto t) { walk<decltype(t)>(in, order, count, scratch, final_scores, keep); });
}

}  // namespace gfl::GFL_ISA
