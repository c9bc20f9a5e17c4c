// SPDX-License-Identifier: Apache-2.0
// The grid of boxes against all pairs: whatever can suppress is found, once.
#define GFL_ISA portable
#include "cpu/simd/box_grid.h"

#include "box_layouts.h"

namespace {

using namespace gfl;
using namespace gfl::testing;
using namespace gfl::portable;

template <class T> void check(int layout, int64_t count, double threshold, bool legacy, Generator& g) {
  using A = acc_t<T>;
  const std::vector<T> raw = rounded<T>(draw_layout(layout, count, threshold, g));
  std::vector<Box<A>> boxes;
  for (int64_t i = 0; i < count; ++i) {
    const T* p = &raw[static_cast<size_t>(4 * i)];
    boxes.push_back({load(p), load(p + 1), load(p + 2), load(p + 3)});
  }
  const A t = static_cast<A>(threshold), offset = box_offset<A>(legacy);
  std::vector<unsigned char> scratch(static_cast<size_t>(BoxGrid<A>::bytes(count)));
  BoxGrid<A> grid(scratch.data(), count, Reach<A>(t, offset));
  const auto left_out = [](int64_t i) { return i % 11 == 10; };
  grid.build(count, [&](int64_t i) { return boxes[static_cast<size_t>(i)]; }, [&](int64_t i) { return !left_out(i); });
  std::vector<int> visits(static_cast<size_t>(count));
  for (const Box<A>& a : boxes) {
    std::fill(visits.begin(), visits.end(), 0);
    grid.near(a, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) ++visits[static_cast<size_t>(grid.index[k])];
    });
    for (int64_t i = 0; i < count; ++i) {
      const Box<A>& b = boxes[static_cast<size_t>(i)];
      const int found = visits[static_cast<size_t>(i)];
      const Overlap<A> overlap = box_overlap(a, box_area(a, offset), b, box_area(b, offset), offset);
      const A iou = overlap.intersection / overlap.union_area;
      const bool needed = overlap.intersection > 0 && iou >= t && iou != 0 && !left_out(i);
      CHECK(found <= (left_out(i) ? 0 : 1), "layout %d threshold %g: box %lld found %d times", layout, threshold,
            static_cast<long long>(i), found);
      CHECK(found == 1 || !needed, "layout %d threshold %g legacy %d: %.9g %.9g %.9g %.9g with %.9g %.9g %.9g %.9g",
            layout, threshold, legacy, double(a.x1), double(a.y1), double(a.x2), double(a.y2), double(b.x1),
            double(b.y1), double(b.x2), double(b.y2));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Generator g(31);
  const int64_t rounds = rounds_of(argc, argv);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int layout = 0; layout < kLayouts; ++layout) {
      for (const double threshold : {0.0, 1e-9, 0.05, 0.0625, 0.3, 0.5, 0.6, 0.75, 0.95, 0.999, 1.0, 2.0}) {
        for (const int64_t count : {1, 2, 40, 200}) {
          const bool legacy = g.integer(0, 3) == 0;
          check<float>(layout, count, threshold, legacy, g);
          if (count > 40) continue;
          check<double>(layout, count, threshold, legacy, g);
          check<half_t>(layout, count, threshold, legacy, g);
          check<bfloat16_t>(layout, count, threshold, legacy, g);
        }
      }
    }
    check<float>(1, 1500, 0.6, false, g);
    check<float>(0, 1500, 0.0, false, g);
  }
  return result("box_grid");
}
