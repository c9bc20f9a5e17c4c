// SPDX-License-Identifier: Apache-2.0
// Task-aligned assignment on the CPU, images [begin, end) of the caller's chunk.
//
// The candidates of a box are a rectangle of each grid, found by bisection; locations given as points are cut into the
// grids that they form, of a single location at worst. Boxes are ranked in slot order by the vector code in
// simd/task_aligned.cpp, which also keeps each location's largest overlap. Then every location that was selected gets
// its box, and every box the largest metric and overlap of the locations that it got. Scratch:
// O(locations + slots · k).
#include "task_aligned.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "grids.h"
#include "isa.h"
#include "terms/scalar.h"
#include "terms/task_aligned.h"

namespace gfl {
// Fills the arrays of boxes from boxes [locations, 4].
GFL_DECLARE_PER_ISA(void task_aligned_prepare(const TaskAlignedInput& in, const float* boxes,
                                              const cpu::TaskAlignedImage& image))
// Ranks locations for a box; called with rising ones.
GFL_DECLARE_PER_ISA(void task_aligned_rank(const TaskAlignedInput& in, const cpu::TaskAlignedImage& image,
                                           const float* gt_box, int64_t label, int32_t slot,
                                           const cpu::LocationRows& rows, cpu::TaskAlignedTop& top))
}  // namespace gfl

namespace gfl::cpu {
namespace {

// A location that was selected: how often, and the box that has it.
struct Taken {
  int32_t location, slot, count;
  float metric, overlap;
};

void rank(const TaskAlignedInput& in, const TaskAlignedImage& image, const float* gt_box, int64_t label, int32_t slot,
          const LocationRows& rows, TaskAlignedTop& top) {
  GFL_BY_ISA(task_aligned_rank, in, image, gt_box, label, slot, rows, top);
}

void prepare(const TaskAlignedInput& in, const float* boxes, const TaskAlignedImage& image) {
  GFL_BY_ISA(task_aligned_prepare, in, boxes, image);
}

class Assigner {
 public:
  explicit Assigner(const TaskAlignedInput& in)
      : in_(in),
        alpha_(power_of(in.alpha)),
        beta_(power_of(in.beta)),
        topk_(std::min(in.topk, in.locations)),
        laid_(in, 2),
        grids_(laid_.grids) {
    in_.topk = topk_;
    in_.topk2 = std::min(in.topk2, in.locations);
    for (const Grid& grid : grids_) {
      for (int64_t i = grid.first; i < std::min(grid.first + grid.width * grid.height, topk_); ++i) {
        first_.push_back({grid.x[(i - grid.first) % grid.width], grid.y[(i - grid.first) / grid.width]});
      }
    }
    const size_t locations = static_cast<size_t>(in.locations), padded = locations + kTaskAlignedPadding;
    arrays_.resize(7 * padded);
    best_slot_.resize(padded);
    place_.resize(locations);
    float* a = arrays_.data();
    const bool keeps_best = in.variant == TaskAlignedVariant::ultralytics;
    image_ = {a,
              a + padded,
              a + 2 * padded,
              a + 3 * padded,
              a + 4 * padded,
              a + 5 * padded,
              keeps_best ? a + 6 * padded : nullptr,
              best_slot_.data(),
              nullptr};
    const size_t k = static_cast<size_t>(topk_);
    top_metric_.resize(k);
    top_overlap_.resize(k);
    top_location_.resize(k);
    top_ = {top_metric_.data(), top_overlap_.data(), top_location_.data(), 0, topk_};
    largest_metric_.resize(static_cast<size_t>(in.gts));
    largest_overlap_.resize(static_cast<size_t>(in.gts));
  }

  void run(int64_t image, const AssignOutput& out) {
    labels_ = in_.gt_labels + image * in_.gts;
    gt_boxes_ = in_.gt_boxes + image * in_.gts * 4;
    int64_t *to_labels = out.labels + image * in_.locations, *to_matched = out.matched + image * in_.locations;
    float* to_scores = out.scores + image * in_.locations;
    std::fill_n(to_labels, in_.locations, int64_t{-1});
    std::fill_n(to_matched, in_.locations, int64_t{-1});
    std::fill_n(to_scores, in_.locations, 0.0f);
    slots_.clear();
    for (int64_t slot = 0; slot < in_.gts; ++slot) {
      if (holds_box(in_, image * in_.gts + slot)) slots_.push_back(static_cast<int32_t>(slot));
    }
    if (slots_.empty()) return;

    const int64_t offset = image * in_.score_stride[0];
    image_.scores = dispatch(
        in_.score_dtype, [&](auto t) -> const void* { return static_cast<const decltype(t)*>(in_.scores) + offset; });
    prepare(in_, in_.boxes + image * in_.locations * 4, image_);
    if (image_.best != nullptr) std::fill_n(image_.best, in_.locations + kTaskAlignedPadding, 0.0f);
    taken_.clear();
    std::fill(place_.begin(), place_.end(), -1);
    for (const int32_t slot : slots_) select(slot);
    for (Taken& t : taken_) {
      if (t.count > 1 && in_.variant != TaskAlignedVariant::mmdet) settle(t);
    }
    if (in_.topk2 != in_.topk) keep_best();

    for (const int32_t slot : slots_) largest_metric_[slot] = largest_overlap_[slot] = 0.0f;
    for (const Taken& t : taken_) {
      largest_metric_[t.slot] = std::max(largest_metric_[t.slot], t.metric);
      largest_overlap_[t.slot] = std::max(largest_overlap_[t.slot], t.overlap);
    }
    for (const Taken& t : taken_) {
      to_labels[t.location] = labels_[t.slot];
      to_matched[t.location] = t.slot;
      to_scores[t.location] = normalised_metric(in_, t.metric, largest_metric_[t.slot], largest_overlap_[t.slot]);
    }
  }

 private:
  void select(int32_t slot) {
    const float* box = gt_boxes_ + 4 * slot;
    const Inside inside = candidates_of(in_, box);
    top_.count = 0;
    if (in_.variant == TaskAlignedVariant::mmdet) {
      rank(in_, image_, box, labels_[slot], slot, {0, in_.locations, 1, 0}, top_);
      for (int64_t i = 0; i < top_.count; ++i) {
        if (contains(inside, top_.location[i])) take(slot, top_.location[i], top_.metric[i], top_.overlap[i]);
      }
      return;
    }
    for (const Grid& grid : grids_) {
      const LocationRows rows = rows_inside(grid, inside);
      if (rows.height > 0) rank(in_, image_, box, labels_[slot], slot, rows, top_);
    }
    for (int64_t i = 0; i < top_.count; ++i) take(slot, top_.location[i], top_.metric[i], top_.overlap[i]);
    if (top_.count < topk_) take_zeros(slot, inside);
  }

  // Too few candidates have a metric: a sort would go on with those of metric 0, the lowest locations first, of which
  // those inside the box count.
  void take_zeros(int32_t slot, const Inside& inside) {
    int64_t left = topk_ - top_.count;
    const int32_t *ranked = top_.location, *end = ranked + top_.count;
    for (int64_t i = 0; i < static_cast<int64_t>(first_.size()) && left > 0; ++i) {
      if (std::find(ranked, end, static_cast<int32_t>(i)) != end) continue;
      --left;
      if (!inside(first_[i].x, first_[i].y)) continue;
      const int32_t location = static_cast<int32_t>(i);
      take(slot, location, 0.0f, overlap_with(slot, location));
    }
  }

  void take(int32_t slot, int32_t location, float metric, float overlap) {
    int32_t& place = place_[location];
    if (place < 0) {
      place = static_cast<int32_t>(taken_.size());
      taken_.push_back({location, slot, 1, metric, overlap});
      return;
    }
    Taken& t = taken_[place];
    ++t.count;
    if (in_.variant == TaskAlignedVariant::mmdet && overlap > t.overlap) {
      t.slot = slot;
      t.metric = metric;
      t.overlap = overlap;
    }
  }

  // Gives a location that several boxes have selected to the largest overlap, the lowest slot where none has any.
  void settle(Taken& t) const {
    t.slot = slots_[0];
    t.overlap = 0.0f;
    if (image_.best != nullptr) {
      if (image_.best[t.location] > 0.0f) t.slot = image_.best_slot[t.location];
      t.overlap = image_.best[t.location];
    } else {
      for (const int32_t slot : slots_) {
        const float overlap = overlap_with(slot, t.location);
        if (overlap > t.overlap) {
          t.slot = slot;
          t.overlap = overlap;
        }
      }
    }
    t.metric = task_aligned_metric(alpha_, beta_, score_of(t.slot, t.location), t.overlap);
  }

  // Of every box, the `topk2` best of the locations that it got: as before, locations of metric 0 fill up from the
  // lowest on.
  void keep_best() {
    std::sort(taken_.begin(), taken_.end(), [](const Taken& a, const Taken& b) {
      return std::make_tuple(a.slot, -a.metric, a.location) < std::make_tuple(b.slot, -b.metric, b.location);
    });
    const auto has_metric = [](const Taken& t) { return t.metric > 0.0f; };
    auto kept = taken_.begin();
    for (auto first = taken_.begin(); first != taken_.end();) {
      const int32_t slot = first->slot;
      const auto last = std::find_if(first, taken_.end(), [&](const Taken& t) { return t.slot != slot; });
      const auto zeros = std::find_if_not(first, last, has_metric);
      const int64_t ranked = zeros - first, left = in_.topk2 - ranked;
      const auto ranked_begin = kept;
      kept = std::copy(first, first + std::min(ranked, in_.topk2), kept);
      const auto ranked_end = kept;
      for (auto t = zeros; t != last; ++t) {
        const Taken zero = *t;
        const int64_t before =
            std::count_if(ranked_begin, ranked_end, [&](const Taken& other) { return other.location < zero.location; });
        if (zero.location - before < left) *kept++ = zero;
      }
      first = last;
    }
    taken_.erase(kept, taken_.end());
  }

  bool contains(const Inside& inside, int64_t location) const {
    const auto next =
        std::partition_point(grids_.begin(), grids_.end(), [&](const Grid& grid) { return grid.first <= location; });
    const Grid& grid = *(next - 1);
    return inside(grid.x[(location - grid.first) % grid.width], grid.y[(location - grid.first) / grid.width]);
  }

  float overlap_with(int32_t slot, int64_t location) const {
    const float* b = gt_boxes_ + 4 * slot;
    const RatedBox<float> g = rated_box(in_.overlap, b[0], b[1], b[2], b[3]);
    const RatedBox<float> p{image_.x1[location], image_.y1[location],   image_.x2[location],
                            image_.y2[location], image_.area[location], image_.angle[location]};
    return task_aligned_overlap(in_.overlap, g, p);
  }

  float score_of(int32_t slot, int64_t location) const {
    const int64_t at = location * in_.score_stride[1] + labels_[slot] * in_.score_stride[2];
    const float score = dispatch(in_.score_dtype, [&](auto t) {
      return static_cast<float>(load(static_cast<const decltype(t)*>(image_.scores) + at));
    });
    return probability(in_, score);
  }

  struct Point { float x, y; };

  TaskAlignedInput in_;
  Power alpha_, beta_;
  int64_t topk_;
  Grids laid_;
  const std::vector<Grid>& grids_;
  std::vector<float> arrays_, top_metric_, top_overlap_, largest_metric_, largest_overlap_;
  std::vector<int32_t> best_slot_, top_location_, place_, slots_;  // place_: of each location in taken_, or −1
  std::vector<Point> first_;                                       // the lowest `topk` locations
  std::vector<Taken> taken_;
  TaskAlignedImage image_{};
  TaskAlignedTop top_{};
  const int64_t* labels_ = nullptr;
  const float* gt_boxes_ = nullptr;
};

}  // namespace

void task_aligned(const TaskAlignedInput& in, const AssignOutput& out, int64_t begin, int64_t end) {
  if (in.locations == 0) return;
  Assigner assigner(in);
  for (int64_t image = begin; image < end; ++image) assigner.run(image, out);
}

}  // namespace gfl::cpu
