// SPDX-License-Identifier: Apache-2.0
// Assignment with a dynamic k on the CPU, images [begin, end) of the caller's chunk.
//
// The locations inside a box are a rectangle of each grid, found by bisection; those of all boxes are the candidates,
// whose predictions are put together as a structure of arrays. The vector code in simd/dynamic_k.cpp goes over them
// once per box, for its largest overlaps and its least costs. Then every location that several boxes selected goes to
// the least cost. Scratch: O(locations + slots + k).
#include "dynamic_k.h"

#include <algorithm>
#include <vector>

#include "grids.h"
#include "isa.h"
#include "terms/dynamic_k.h"
#include "terms/scalar.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void dynamic_k_areas(const cpu::BoxArrays& boxes, int64_t count))
// Goes over the image's locations for a box.
GFL_DECLARE_PER_ISA(void dynamic_k_rank(const DynamicKInput& in, const cpu::DynamicKImage& image,
                                        const cpu::DynamicKObjects& objects, int64_t object, cpu::DynamicKTop& top))
// The box of the least cost at a candidate, the first if several are equal.
GFL_DECLARE_PER_ISA(cpu::DynamicKWinner dynamic_k_winner(const DynamicKInput& in, const cpu::DynamicKImage& image,
                                                         const cpu::DynamicKObjects& objects, int64_t place))
}  // namespace gfl

namespace gfl::cpu {
namespace {

void find_areas(const BoxArrays& boxes, int64_t count) { GFL_BY_ISA(dynamic_k_areas, boxes, count); }
void rank(const DynamicKInput& in, const DynamicKImage& image, const DynamicKObjects& objects, int64_t object,
          DynamicKTop& top) {
  GFL_BY_ISA(dynamic_k_rank, in, image, objects, object, top);
}
DynamicKWinner winner(const DynamicKInput& in, const DynamicKImage& image, const DynamicKObjects& objects,
                      int64_t place) {
  GFL_BY_ISA(dynamic_k_winner, in, image, objects, place);
}

// Memory for `count` boxes and the padding, in five arrays.
class Boxes {
 public:
  explicit Boxes(int64_t count) : pitch_(static_cast<size_t>(count + kDynamicKPadding)), memory_(5 * pitch_, 0.0f) {}

  BoxArrays arrays() {
    float* a = memory_.data();
    return {a, a + pitch_, a + 2 * pitch_, a + 3 * pitch_, a + 4 * pitch_};
  }
  void set(int64_t i, const float* box) {
    for (size_t c = 0; c < 4; ++c) memory_[c * pitch_ + static_cast<size_t>(i)] = box[c];
  }

 private:
  size_t pitch_;
  std::vector<float> memory_;
};

class Assigner {
 public:
  explicit Assigner(const DynamicKInput& in) : in_(in), laid_(in, 4), predicted_(in.locations), truth_(in.gts) {
    const size_t locations = static_cast<size_t>(in.locations), padded = locations + kDynamicKPadding;
    where_.resize(locations);
    for (const Grid& grid : laid_.grids) {
      for (int64_t i = 0; i < grid.width * grid.height; ++i) {
        where_[static_cast<size_t>(grid.first + i)] = {grid.x[i % grid.width], grid.y[i / grid.width], grid.stride_x,
                                                       grid.stride_y};
      }
    }
    inside_.resize(locations);
    floats_.assign(5 * padded, 0.0f);
    location_.resize(locations);
    times_.resize(locations);
    owner_.resize(locations);
    float* f = floats_.data();
    image_ = {predicted_.arrays(), f, f + padded, f + 2 * padded, f + 3 * padded, f + 4 * padded,
              location_.data(),    0, 0,          nullptr};
    const size_t k = static_cast<size_t>(std::min(in.topk, in.locations));
    overlap_.resize(k);
    cost_.resize(k);
    place_.resize(k);
    slots_.reserve(static_cast<size_t>(in.gts));
    labels_.reserve(static_cast<size_t>(in.gts));
  }

  void run(int64_t image, const AssignOutput& out) {
    int64_t *to_labels = out.labels + image * in_.locations, *to_matched = out.matched + image * in_.locations;
    float* to_iou = out.scores + image * in_.locations;
    std::fill_n(to_labels, in_.locations, int64_t{-1});
    std::fill_n(to_matched, in_.locations, int64_t{-1});
    std::fill_n(to_iou, in_.locations, 0.0f);
    find_objects(image);
    if (objects_.count == 0) return;
    find_candidates(image);
    if (image_.count == 0) return;

    taken_.clear();
    for (int64_t object = 0; object < objects_.count; ++object) select(object);
    for (const int32_t place : taken_) {
      DynamicKWinner got{owner_[place], 0.0f};
      if (times_[place] > 1 && place < image_.candidates) {
        got = winner(in_, image_, objects_, place);
      } else {
        // Outside all boxes every box costs the same.
        if (times_[place] > 1) got.object = 0;
        got.overlap = task_aligned_overlap(TaskAlignedOverlap::iou, box_at(objects_.boxes, got.object),
                                           box_at(image_.boxes, place));
      }
      const int32_t location = location_[static_cast<size_t>(place)];
      to_labels[location] = labels_[static_cast<size_t>(got.object)];
      to_matched[location] = slots_[static_cast<size_t>(got.object)];
      to_iou[location] = got.overlap;
    }
  }

 private:
  static RatedBox<float> box_at(const BoxArrays& b, int64_t i) {
    return {b.x1[i], b.y1[i], b.x2[i], b.y2[i], b.area[i], 0.0f};
  }

  void find_objects(int64_t image) {
    slots_.clear();
    labels_.clear();
    for (int64_t slot = 0; slot < in_.gts; ++slot) {
      const int64_t at = image * in_.gts + slot;
      if (!holds_box(in_, at)) continue;
      truth_.set(static_cast<int64_t>(slots_.size()), in_.gt_boxes + 4 * at);
      slots_.push_back(slot);
      labels_.push_back(in_.gt_labels[at]);
    }
    objects_ = {truth_.arrays(), labels_.data(), static_cast<int64_t>(slots_.size())};
    find_areas(objects_.boxes, objects_.count);
  }

  void find_candidates(int64_t image) {
    std::fill(inside_.begin(), inside_.end(), uint8_t{0});
    for (const int64_t slot : slots_) {
      const float* box = in_.gt_boxes + 4 * (image * in_.gts + slot);
      for (const Grid& grid : laid_.grids) {
        mark(rows_inside(grid, inside_box(box)));
        if (in_.cost != DynamicKCost::simota) continue;
        mark(rows_inside(grid, near_centre(box, in_.center_radius, grid.stride_x, grid.stride_y)));
      }
    }
    image_.count = 0;
    gather(image, 1);
    image_.candidates = image_.count;
    if (in_.cost == DynamicKCost::mmyolo) gather(image, 0);
    find_areas(image_.boxes, image_.count);
    std::fill_n(times_.begin(), image_.count, 0);
    const int64_t offset = image * in_.score_stride[0];
    image_.scores = dispatch(
        in_.score_dtype, [&](auto t) -> const void* { return static_cast<const decltype(t)*>(in_.scores) + offset; });
  }

  void mark(const LocationRows& rows) {
    for (int64_t y = 0; y < rows.height; ++y) {
      std::fill_n(inside_.begin() + rows.first + y * rows.pitch, rows.width, uint8_t{1});
    }
  }

  // Appends the locations whose mark is `wanted`.
  void gather(int64_t image, uint8_t wanted) {
    const float* boxes = in_.boxes + image * in_.locations * 4;
    for (int64_t i = 0; i < in_.locations; ++i) {
      if (inside_[static_cast<size_t>(i)] != wanted) continue;
      const int64_t place = image_.count++;
      const Location<float>& at = where_[static_cast<size_t>(i)];
      predicted_.set(place, boxes + 4 * i);
      image_.x[place] = at.x;
      image_.y[place] = at.y;
      image_.stride_x[place] = at.stride_x;
      image_.stride_y[place] = at.stride_y;
      image_.others[place] = -1.0f;
      image_.location[place] = static_cast<int32_t>(i);
    }
  }

  void select(int64_t object) {
    DynamicKTop top{overlap_.data(), 0, cost_.data(), place_.data(), 0, std::min(in_.topk, image_.count)};
    rank(in_, image_, objects_, object, top);
    for (int64_t place = image_.candidates; place < std::min(image_.candidates + top.capacity, image_.count); ++place) {
      insert_outside(top, static_cast<int32_t>(place));
    }
    float sum = 0.0f;
    for (int64_t i = 0; i < top.overlaps; ++i) sum = add_rn(sum, top.overlap[i]);
    const int64_t k = selected_count(sum, top.costs);
    for (int64_t i = 0; i < k; ++i) {
      const int32_t place = top.place[i];
      if (times_[place]++ == 0) taken_.push_back(place);
      owner_[place] = static_cast<int32_t>(object);
    }
  }

  // A location outside all boxes takes its place by cost, then by location.
  void insert_outside(DynamicKTop& top, int32_t place) {
    const auto behind = [&](int64_t e) {
      return top.cost[e] > kOutsideAll || (top.cost[e] == kOutsideAll && location_[top.place[e]] > location_[place]);
    };
    if (top.costs == top.capacity && !behind(top.costs - 1)) return;
    int64_t at = top.costs < top.capacity ? top.costs++ : top.capacity - 1;
    for (; at > 0 && behind(at - 1); --at) {
      top.cost[at] = top.cost[at - 1];
      top.place[at] = top.place[at - 1];
    }
    top.cost[at] = kOutsideAll;
    top.place[at] = place;
  }

  DynamicKInput in_;
  Grids laid_;
  Boxes predicted_, truth_;
  std::vector<Location<float>> where_;
  std::vector<uint8_t> inside_;
  std::vector<float> floats_, overlap_, cost_;
  std::vector<int32_t> location_, place_, times_, owner_, taken_;  // times_, owner_: by place
  std::vector<int64_t> slots_, labels_;                            // of the objects
  DynamicKImage image_{};
  DynamicKObjects objects_{};
};

}  // namespace

void dynamic_k(const DynamicKInput& in, const AssignOutput& out, int64_t begin, int64_t end) {
  if (in.locations == 0) return;
  Assigner assigner(in);
  for (int64_t image = begin; image < end; ++image) assigner.run(image, out);
}

}  // namespace gfl::cpu
