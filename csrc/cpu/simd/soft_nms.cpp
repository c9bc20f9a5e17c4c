// SPDX-License-Identifier: Apache-2.0
// Soft-NMS within a class. Boxes lie in groups of lanes in the order of their indices; each group remembers its best
// score, as an integer that orders like the scores. When a box is taken, every group is tested for an intersection by
// vector code, and only groups that have one go box by box and look for their best again. Where few pairs of many boxes
// can overlap, the same is done with the boxes that a grid finds near the taken one.
#include "gfl/select.h"

#include <cmath>

#include "box_grid.h"
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

constexpr int64_t kMany = 512;  // boxes from which on a grid is considered

inline int64_t groups_of(int64_t count) { return (count + kLanes - 1) / kLanes; }

template <class A> struct Boxes {
  using I = typename Rank<A>::type;
  A *x1, *y1, *x2, *y2, *area, *score;
  I *rank, *best;  // of each box, of each group

  static int64_t bytes(int64_t count) { return groups_of(count) * int64_t((7 * kLanes + 1) * sizeof(A)); }
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

template <class A> inline void decay(const Boxes<A>& boxes, int64_t i, A weight, A min_score) {
  boxes.score[i] = mul_rn(boxes.score[i], weight);
  boxes.rank[i] = boxes.score[i] < min_score ? kGone<A> : rank_of(boxes.score[i]);
}

template <class A> inline void decay_all(const Boxes<A>& boxes, int64_t groups, int64_t taken, const SoftNmsInput& in) {
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
      decay(boxes, i, weight_of(iou, in), min_score);
    }
    boxes.update(g);
  }
}

// exp(x) for x in (−80, 0], within 4 ulp: the range is reduced to |r| ≤ ln 2 / 2, whose powers end below 2^-57.
inline double exp_of_double(double x) {
  constexpr double shift = 0x1.8p52;
  const double shifted = x * 0x1.71547652b82fep0 + shift, n = shifted - shift;
  const double r = (x - n * 0x1.62e42fefa0000p-1) - n * 0x1.cf79abc9e3b3ap-40;
  double p = 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1;
  p = p * r + 1;
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + (uint64_t(1023) << 52);  // 2^n
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// A group's gaussian weights. A vector's exponential is good enough where everything within 8 ulp of it rounds to the
// same float; std::exp, which all backends agree with, decides the others.
inline void gaussian_weights(const float* iou, const SoftNmsInput& in, float* weight) {
  int32_t sure = 1;
  GFL_LANES(j) {
    const double q = static_cast<double>(iou[j]), x = -(q * q) / in.sigma, e = exp_of_double(x);
    weight[j] = static_cast<float>(e - e * 0x1p-50);
    sure &= static_cast<int32_t>(weight[j] == static_cast<float>(e + e * 0x1p-50)) & static_cast<int32_t>(x > -80.0);
  }
  if (sure == 0) {
    for (int64_t j = 0; j < kLanes; ++j) weight[j] = weight_of(iou[j], in);
  }
}
inline void gaussian_weights(const double* iou, const SoftNmsInput& in, double* weight) {
  for (int64_t j = 0; j < kLanes; ++j) weight[j] = weight_of(iou[j], in);
}

template <class A> inline void weigh(const A (&iou)[kLanes], const SoftNmsInput& in, A (&weight)[kLanes]) {
  if (in.gaussian) return gaussian_weights(iou, in, weight);
  const A threshold = static_cast<A>(in.iou_threshold);
  GFL_LANES(j) weight[j] = iou[j] >= threshold ? sub_rn(A(1), iou[j]) : A(1);
}

// The boxes that a taken one intersects, by their places in the grid; room for whole groups.
template <class A> struct Hits {
  A *intersection, *united;
  int32_t* at;

  Hits(void* scratch, int64_t room)
      : intersection(static_cast<A*>(scratch)),
        united(intersection + room),
        at(reinterpret_cast<int32_t*>(united + room)) {}
  static int64_t bytes(int64_t room) { return room * int64_t(2 * sizeof(A) + sizeof(int32_t)); }

  // Returns how many they are.
  int64_t find(const BoxGrid<A>& grid, const Box<A>& box, A area) const {
    int64_t count = 0;
    grid.near(box, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kLanes) {
        Overlap<A> overlap[kLanes];
        typename Rank<A>::type any = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          overlap[lane] = box_overlap(box, area, grid.box(first + lane), grid.area[first + lane], A(0));
          any |= static_cast<typename Rank<A>::type>(overlap[lane].intersection > A(0));
        }
        if (any == 0) continue;  // an IoU of 0 or NaN: a weight of 1
        for (int64_t lane = 0; lane < kLanes && first + lane < end; ++lane) {
          intersection[count] = overlap[lane].intersection;
          united[count] = overlap[lane].union_area;
          at[count] = static_cast<int32_t>(first + lane);
          count += overlap[lane].intersection > A(0) ? 1 : 0;
        }
      }
    });
    for (int64_t j = count; j % kLanes != 0; ++j) intersection[j] = united[j] = A(1);
    return count;
  }
};

// Returns how many boxes it takes out of the grid: those that are gone.
template <class A>
inline int64_t decay_near(const Boxes<A>& boxes, int64_t taken, const SoftNmsInput& in, BoxGrid<A>& grid,
                          const Hits<A>& hits) {
  const int64_t count = hits.find(grid, boxes.box(taken), boxes.area[taken]);
  int64_t removed = 0, group = taken / kLanes;
  bool stale = false;  // the group's best may be less than it was
  for (int64_t first = 0; first < count; first += kLanes) {
    A iou[kLanes], weight[kLanes];
    GFL_LANES(j) iou[j] = div_rn(hits.intersection[first + j], hits.united[first + j]);
    weigh(iou, in, weight);
    for (int64_t j = 0; j < kLanes && first + j < count; ++j) {
      const int64_t at = hits.at[first + j], i = grid.index[at];
      if (boxes.rank[i] != kGone<A>) {
        if (weight[j] == A(1)) continue;
        if (i / kLanes != group) {
          if (stale) boxes.update(group);
          group = i / kLanes;
          stale = false;
        }
        stale = stale || boxes.rank[i] == boxes.best[group];
        decay(boxes, i, weight[j], static_cast<A>(in.min_score));
        if (boxes.rank[i] > boxes.best[group]) boxes.best[group] = boxes.rank[i];
      }
      if (boxes.rank[i] != kGone<A>) continue;
      grid.remove(at);
      ++removed;
    }
  }
  if (stale) boxes.update(group);
  return removed;
}

// Calls take(i) for the boxes in the order in which they are taken; decay(i) lowers the others.
template <class A, class Take, class Decay>
inline void take_all(const Boxes<A>& boxes, int64_t groups, const Take& take, const Decay& decay) {
  for (int64_t taken = best_of(boxes, groups); taken >= 0; taken = best_of(boxes, groups)) {
    take(taken);
    boxes.rank[taken] = kGone<A>;
    boxes.update(taken / kLanes);
    decay(taken);
  }
}

template <class A, class Take>
void take_near(const Boxes<A>& boxes, int64_t count, const SoftNmsInput& in, const Reach<A>& reach,
               unsigned char* scratch, const Take& take) {
  const int64_t groups = groups_of(count);
  const Hits<A> hits(scratch, groups * kLanes);
  BoxGrid<A> grid(scratch + Hits<A>::bytes(groups * kLanes), count, reach);
  int64_t removed = 1;
  take_all(boxes, groups, take, [&](int64_t taken) {
    // At first, and whenever most of the boxes in the grid are gone.
    if (2 * removed > grid.size()) {
      grid.build(count, [&](int64_t i) { return boxes.box(i); }, [&](int64_t i) { return boxes.rank[i] != kGone<A>; });
      removed = 0;
    }
    removed += decay_near(boxes, taken, in, grid, hits);
  });
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
  const auto take = [&](int64_t taken) {
    keep[order[taken]] = 1;
    static_cast<A*>(final_scores)[order[taken]] = boxes.score[taken];
  };
  const Reach<A> reach(in.gaussian ? A(0) : static_cast<A>(in.iou_threshold), A(0));
  if (count >= kMany && grid_pays(count, reach, [&](int64_t i) { return boxes.box(i); })) {
    return take_near(boxes, count, in, reach, static_cast<unsigned char*>(scratch) + Boxes<A>::bytes(count), take);
  }
  take_all(boxes, groups, take, [&](int64_t taken) { decay_all(boxes, groups, taken, in); });
}

}  // namespace

// Of the largest class that will be walked with it. Aligned to 16.
int64_t soft_nms_class_scratch_bytes(int64_t count, DType dtype) {
  const auto bytes = [&](auto a) {
    using A = decltype(a);
    const int64_t room = groups_of(count) * kLanes;
    return Boxes<A>::bytes(count) + (count < kMany ? 0 : Hits<A>::bytes(room) + BoxGrid<A>::bytes(count));
  };
  return dtype == DType::f64 ? bytes(double{}) : bytes(float{});
}

// order: [count] indices of the boxes of one class, rising.
void soft_nms_class(const SoftNmsInput& in, const int64_t* order, int64_t count, void* scratch, void* final_scores,
                    uint8_t* keep) {
  dispatch(in.dtype, [&](auto t) { walk<decltype(t)>(in, order, count, scratch, final_scores, keep); });
}

}  // namespace gfl::GFL_ISA
