// SPDX-License-Identifier: Apache-2.0
// Costs of a box with the locations of an image, and of a location with the boxes, a register at a time. All but the
// cost of the classes comes first: it bounds the whole from below, and rules most pairs out. The classes of a location
// are summed once, when a pair first needs them.
#include "cpu/dynamic_k.h"

#include "terms/dynamic_k.h"

namespace gfl::GFL_ISA {
namespace {

// kLanes partial sums and a tree over them.
template <class T> float sum_of_background(DynamicKCost cost, const T* row, int64_t classes, int64_t stride) {
  Floats sums[kParts] = {};
  const float nothing = takes_probabilities(cost) ? 0.0f : -kInfinity;
  for (int64_t first = 0; first < classes; first += kLanes) {
    float lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] = first + j < classes ? static_cast<float>(load(row + (first + j) * stride)) : nothing;
    }
    for (int k = 0; k < kParts; ++k) {
      const Floats x = prepared_score(cost, load_floats(lanes + k * kWidth));
      sums[k] += background_cost(cost, x);
    }
  }
  for (int parts = kParts / 2; parts > 0; parts /= 2) {
    for (int k = 0; k < parts; ++k) sums[k] += sums[k + parts];
  }
  return sum_of(sums[0]);
}

template <class T>
float cost_of(const DynamicKInput& in, const cpu::DynamicKImage& image, const PairCost<float>& pair, int64_t label,
              int64_t place) {
  const T* row = static_cast<const T*>(image.scores) + image.location[place] * in.score_stride[1];
  float& others = image.others[place];
  if (others < 0.0f) {
    others = in.cost == DynamicKCost::mmyolo ? 0.0f : sum_of_background(in.cost, row, in.classes, in.score_stride[2]);
  }
  const float score = static_cast<float>(load(row + label * in.score_stride[2]));
  return whole_cost(in, pair, prepared_score(in.cost, score), others);
}

RatedBox<Floats> load_boxes(const cpu::BoxArrays& b, int64_t i) {
  return {load_floats(b.x1 + i), load_floats(b.y1 + i),   load_floats(b.x2 + i),
          load_floats(b.y2 + i), load_floats(b.area + i), splat<Floats>(0.0f)};
}
RatedBox<Floats> same_boxes(const cpu::BoxArrays& b, int64_t i) {
  return {splat<Floats>(b.x1[i]), splat<Floats>(b.y1[i]),   splat<Floats>(b.x2[i]),
          splat<Floats>(b.y2[i]), splat<Floats>(b.area[i]), splat<Floats>(0.0f)};
}

// A register's pairs, one after another.
struct Lanes {
  float overlap[kWidth], log[kWidth], penalty[kWidth], bound[kWidth];

  explicit Lanes(const PairCost<Floats>& c) {
    store_floats(c.overlap, overlap);
    store_floats(c.log, log);
    store_floats(c.penalty, penalty);
    store_floats(c.bound(), bound);
  }
  PairCost<float> operator[](int j) const { return {overlap[j], log[j], penalty[j]}; }
};

void insert_overlap(cpu::DynamicKTop& top, float overlap) {
  int64_t at = top.overlaps < top.capacity ? top.overlaps++ : top.capacity - 1;
  for (; at > 0 && top.overlap[at - 1] < overlap; --at) top.overlap[at] = top.overlap[at - 1];
  top.overlap[at] = overlap;
}

void insert_cost(cpu::DynamicKTop& top, float cost, int32_t place) {
  int64_t at = top.costs < top.capacity ? top.costs++ : top.capacity - 1;
  for (; at > 0 && top.cost[at - 1] > cost; --at) {
    top.cost[at] = top.cost[at - 1];
    top.place[at] = top.place[at - 1];
  }
  top.cost[at] = cost;
  top.place[at] = place;
}

template <class T>
void rank(const DynamicKInput& in, const cpu::DynamicKImage& image, const cpu::DynamicKObjects& objects, int64_t object,
          cpu::DynamicKTop& top) {
  const RatedBox<Floats> g = same_boxes(objects.boxes, object);
  const int64_t label = objects.labels[object];
  Ints lane;
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  // No pair without an overlap costs less.
  const Floats none = splat<Floats>(0.0f);
  const float apart = mul_rn(-logarithm(1e-7f), in.iou_weight);
  for (int64_t i = 0; i < image.count; i += kWidth) {
    const int32_t here = static_cast<int32_t>(image.count - i < kWidth ? image.count - i : kWidth);
    const RatedBox<Floats> p = load_boxes(image.boxes, i);
    const int32_t ranked = static_cast<int32_t>(image.candidates - i < here ? image.candidates - i : here);
    // Of a NaN none, as in the overlap.
    const Ints meets = (larger(p.x1, g.x1) < smaller(p.x2, g.x2)) & (larger(p.y1, g.y1) < smaller(p.y2, g.y2));
    const bool full = top.costs == top.capacity;
    const bool may_rank = ranked > 0 && !(full && top.cost[top.costs - 1] <= apart);
    if (!any_of(meets) && !may_rank) continue;
    const Floats every = task_aligned_overlap(TaskAlignedOverlap::iou, g, p);
    const Floats overlap = lane < here ? every : none;
    const float least = top.overlaps == top.capacity ? top.overlap[top.overlaps - 1] : 0.0f;
    if (any_of(overlap > least)) {
      float overlaps[kWidth];
      store_floats(overlap, overlaps);
      for (int j = 0; j < here; ++j) {
        const float now = top.overlaps == top.capacity ? top.overlap[top.overlaps - 1] : 0.0f;
        if (overlaps[j] > now) insert_overlap(top, overlaps[j]);
      }
    }
    if (ranked <= 0) continue;
    const Location<Floats> at{load_floats(image.x + i), load_floats(image.y + i), load_floats(image.stride_x + i),
                              load_floats(image.stride_y + i)};
    const PairCost<Floats> pairs = pair_cost(in, g, p, at);
    const Ints comes_near = full ? ~(pairs.bound() >= top.cost[top.costs - 1]) : lane < here;
    if (!any_of(comes_near & (lane < ranked))) continue;
    const Lanes lanes(pairs);
    for (int32_t j = 0; j < ranked; ++j) {
      const bool is_full = top.costs == top.capacity;
      if (is_full && lanes.bound[j] >= top.cost[top.costs - 1]) continue;
      const float cost = cost_of<T>(in, image, lanes[j], label, i + j);
      if (!is_full || cost < top.cost[top.costs - 1]) insert_cost(top, cost, static_cast<int32_t>(i + j));
    }
  }
}

template <class T>
cpu::DynamicKWinner winner(const DynamicKInput& in, const cpu::DynamicKImage& image,
                           const cpu::DynamicKObjects& objects, int64_t place) {
  const RatedBox<Floats> p = same_boxes(image.boxes, place);
  const Location<Floats> at{splat<Floats>(image.x[place]), splat<Floats>(image.y[place]),
                            splat<Floats>(image.stride_x[place]), splat<Floats>(image.stride_y[place])};
  float best = kInfinity;
  cpu::DynamicKWinner found{0, task_aligned_overlap(TaskAlignedOverlap::iou, load_boxes(objects.boxes, 0), p)[0]};
  for (int64_t i = 0; i < objects.count; i += kWidth) {
    const PairCost<Floats> pairs = pair_cost(in, load_boxes(objects.boxes, i), p, at);
    if (!any_of(~(pairs.bound() >= best))) continue;
    const Lanes lanes(pairs);
    for (int64_t j = 0; j < kWidth && i + j < objects.count; ++j) {
      if (lanes.bound[j] >= best) continue;
      const float cost = cost_of<T>(in, image, lanes[static_cast<int>(j)], objects.labels[i + j], place);
      if (!(cost < best)) continue;
      best = cost;
      found = {static_cast<int32_t>(i + j), lanes.overlap[j]};
    }
  }
  return found;
}

}  // namespace

void dynamic_k_areas(const cpu::BoxArrays& boxes, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const RatedBox<Floats> b = rated_box(TaskAlignedOverlap::iou, load_floats(boxes.x1 + i), load_floats(boxes.y1 + i),
                                         load_floats(boxes.x2 + i), load_floats(boxes.y2 + i));
    store_floats(b.area, boxes.area + i);
  }
}

void dynamic_k_rank(const DynamicKInput& in, const cpu::DynamicKImage& image, const cpu::DynamicKObjects& objects,
                    int64_t object, cpu::DynamicKTop& top) {
  dispatch(in.score_dtype, [&](auto t) { rank<decltype(t)>(in, image, objects, object, top); });
}

cpu::DynamicKWinner dynamic_k_winner(const DynamicKInput& in, const cpu::DynamicKImage& image,
                                     const cpu::DynamicKObjects& objects, int64_t place) {
  return dispatch(in.score_dtype, [&](auto t) { return winner<decltype(t)>(in, image, objects, place); });
}

}  // namespace gfl::GFL_ISA
