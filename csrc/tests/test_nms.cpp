// SPDX-License-Identifier: Apache-2.0
// NMS against a plain double loop over all pairs.
#include "gfl/select.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "box_layouts.h"
#include "terms/box.h"
#include "testing.h"

namespace {

using namespace gfl;
using namespace gfl::testing;

struct Case {
  const char* name;
  int64_t count, classes;  // classes: 0 for none
  double threshold;
  bool legacy;
};

struct Drawn {
  std::vector<double> boxes, scores;
  std::vector<int64_t> classes;
};

Drawn draw(const Case& c, Generator& g) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  Drawn d;
  for (int64_t i = 0; i < c.count; ++i) {
    const double x = g.uniform(-50, 50), y = g.uniform(-50, 50), w = g.uniform(0, 30), h = g.uniform(0, 30);
    d.boxes.insert(d.boxes.end(), {x, y, x + w, y + h});
    if (g.integer(0, 40) == 0) d.boxes.back() = y;  // no height
    if (g.integer(0, 100) == 0) d.boxes[d.boxes.size() - 4] = nan;
    if (g.integer(0, 100) == 0) d.boxes[d.boxes.size() - 2] = infinity;
    // Few different scores, so that ties are common; a NaN is the greatest.
    d.scores.push_back(g.integer(0, 50) == 0 ? nan : static_cast<double>(g.integer(-20, 20)) / 16);
    d.classes.push_back(g.integer(0, std::max<int64_t>(c.classes, 1)) * 1000000007 - 5);
  }
  return d;
}

// Indices of the kept boxes by falling score.
template <class T> std::vector<int64_t> oracle(const Case& c, const Drawn& d, const std::vector<int64_t>& order) {
  using A = acc_t<T>;
  const std::vector<T> raw = rounded<T>(d.boxes);
  const A offset = c.legacy ? 1 : 0;
  const auto box = [&](int64_t i) {
    const T* p = &raw[static_cast<size_t>(4 * i)];
    return Box<A>{load(p), load(p + 1), load(p + 2), load(p + 3)};
  };
  std::vector<int64_t> kept;
  for (const int64_t i : order) {
    bool keep = true;
    const Box<A> b = box(i);
    for (const int64_t j : kept) {
      if (c.classes > 0 && d.classes[static_cast<size_t>(i)] != d.classes[static_cast<size_t>(j)]) continue;
      const Box<A> k = box(j);
      const A width = std::max(std::min(b.x2, k.x2) - std::max(b.x1, k.x1) + offset, A(0));
      const A height = std::max(std::min(b.y2, k.y2) - std::max(b.y1, k.y1) + offset, A(0));
      const A area_b = (b.x2 - b.x1 + offset) * (b.y2 - b.y1 + offset);
      const A area_k = (k.x2 - k.x1 + offset) * (k.y2 - k.y1 + offset);
      const A inter = width * height;
      if (inter / (area_b + area_k - inter) > static_cast<A>(c.threshold)) keep = false;
    }
    if (keep) kept.push_back(i);
  }
  return kept;
}

template <class T> std::vector<int64_t> sorted(const std::vector<double>& scores) {
  const std::vector<double> s = widened(rounded<T>(scores));
  std::vector<int64_t> order(s.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = s[static_cast<size_t>(a)], y = s[static_cast<size_t>(b)];
    return x != x ? y == y : x > y;
  });
  return order;
}

// Boxes with a stride of their own: every second row, coordinates in planes.
template <class T> Buffer<T> spread(const std::vector<double>& boxes, int64_t count) {
  const std::vector<T> values = rounded<T>(boxes);
  std::vector<T> planes(static_cast<size_t>(8 * count));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      planes[static_cast<size_t>(2 * (j * count + i))] = values[static_cast<size_t>(4 * i + j)];
    }
  }
  return Buffer<T>(planes);
}

template <class T>
std::vector<uint8_t> run(const Case& c, const NmsInput& in, const Drawn& d, const std::vector<int64_t>& order) {
  const size_t n = static_cast<size_t>(c.count);
#if defined(GFL_TEST_CUDA)
  const Buffer<int64_t> device_order(order), classes(d.classes);
  Buffer<uint8_t> keep(n), workspace(cuda::nms_workspace_bytes(c.count, in.dtype));
  CHECK_CUDA(cuda::nms(in, c.classes > 0 ? classes.data() : nullptr, device_order.data(), workspace.data(), keep.data(),
                       nullptr));
  // By position there, by index here.
  const std::vector<uint8_t> flags = keep.read();
  if (c.classes > 0) {
    std::vector<int64_t> by_score, grouped(order.size());
    for (const int64_t i : order) by_score.push_back(d.classes[static_cast<size_t>(i)]);
    std::iota(grouped.begin(), grouped.end(), 0);
    std::stable_sort(grouped.begin(), grouped.end(), [&](int64_t a, int64_t b) {
      return by_score[static_cast<size_t>(a)] < by_score[static_cast<size_t>(b)];
    });
    std::vector<int64_t> labels;
    for (const int64_t i : grouped) labels.push_back(by_score[static_cast<size_t>(i)]);
    const Buffer<int64_t> device_grouped(grouped), device_labels(labels);
    Buffer<uint8_t> class_keep(n);
    Buffer<int32_t> too_large(1);
    CHECK_CUDA(cuda::nms_by_class(in, device_order.data(), device_grouped.data(), device_labels.data(),
                                  workspace.data(), too_large.data(), class_keep.data(), nullptr));
    CHECK(too_large.read()[0] == (c.count > 4096 ? 1 : 0), "%s: %d", c.name, too_large.read()[0]);
    CHECK(c.count > 4096 || class_keep.read() == flags, "%s dtype %d: classes and panels differ", c.name,
          static_cast<int>(in.dtype));
  }
  std::vector<uint8_t> by_index(n, 2);
  for (size_t i = 0; i < n; ++i) by_index[static_cast<size_t>(order[i])] = flags[i];
  return by_index;
#else
  std::vector<uint8_t> keep(n, 2);
  std::vector<int64_t> grouped = order, bounds(n + 1);
  int64_t met = c.count > 0 ? 1 : 0;
  bounds[0] = 0;
  if (n > 0) bounds[1] = c.count;
  if (c.classes > 0) met = cpu::group_by_class(d.classes.data(), order.data(), c.count, grouped.data(), bounds.data());
  for (int64_t s = 0; s < met; ++s) cpu::nms(in, grouped.data(), bounds.data(), keep.data(), s, s + 1);
  return keep;
#endif
}

template <class T> void check(const Case& c, DType dtype, const Drawn& d) {
  const std::vector<int64_t> order = sorted<T>(d.scores);
#if !defined(GFL_TEST_CUDA)
  const std::vector<T> scores = rounded<T>(d.scores);
  std::vector<int64_t> ours(order.size());
  cpu::order_by_score(scores.data(), dtype, 1, c.count, ours.data());
  CHECK(ours == order, "%s dtype %d: order", c.name, static_cast<int>(dtype));
#endif
  const std::vector<int64_t> want = oracle<T>(c, d, order);
  const Buffer<T> boxes(rounded<T>(d.boxes)), strided = spread<T>(d.boxes, c.count);
  for (const bool planes : {false, true}) {
    const int64_t stride = planes ? 2 : 4, step = planes ? 2 * c.count : 1;
    const T* data = planes ? strided.data() : boxes.data();
    const NmsInput in{data, dtype, stride, step, c.count, c.threshold, c.legacy};
    const std::vector<uint8_t> keep = run<T>(c, in, d, order);
    std::vector<int64_t> got;
    for (const int64_t i : order) {
      CHECK(keep[static_cast<size_t>(i)] <= 1, "%s: box %lld was not decided", c.name, static_cast<long long>(i));
      if (keep[static_cast<size_t>(i)] == 1) got.push_back(i);
    }
    CHECK(got == want, "%s dtype %d planes %d: %zu kept, expected %zu", c.name, static_cast<int>(dtype), planes,
          got.size(), want.size());
  }
}

#if !defined(GFL_TEST_CUDA)
// Enough boxes, most of them kept, that the CPU looks for neighbours in a grid.
void check_layouts(int64_t rounds, Generator& g) {
  for (int64_t round = 0; round < rounds; ++round) {
    for (int layout = 0; layout < kLayouts; ++layout) {
      for (const double threshold : {0.0, 0.05, 0.3, 0.6, 0.95, 1.0, 1.5}) {
        const bool legacy = g.integer(0, 3) == 0;
        const Case c{"layout", 1700, g.integer(0, 4) == 0 ? 1 : 0, threshold, legacy};
        Drawn d{draw_layout(layout, c.count, threshold, g), {}, std::vector<int64_t>(static_cast<size_t>(c.count))};
        for (int64_t i = 0; i < c.count; ++i) d.scores.push_back(static_cast<double>(g.integer(0, 512)) / 512);
        switch (g.integer(0, 6)) {
          case 0: check<double>(c, DType::f64, d); break;
          case 1: check<half_t>(c, DType::f16, d); break;
          case 2: check<bfloat16_t>(c, DType::bf16, d); break;
          default: check<float>(c, DType::f32, d);
        }
      }
    }
  }
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const Case cases[] = {
      {"empty", 0, 0, 0.5, false},
      {"one", 1, 3, 0.5, false},
      {"two", 2, 0, 0.5, false},
      {"under a word", 31, 0, 0.3, false},
      {"over a word", 33, 0, 0.3, false},
      {"over a tile", 65, 2, 0.3, false},
      {"classes", 300, 5, 0.4, false},
      {"legacy", 300, 5, 0.4, true},
      {"threshold 0", 200, 3, 0.0, false},
      {"threshold -1", 200, 3, -1.0, false},
      {"threshold 2", 200, 0, 2.0, false},
      {"a panel", 1024, 0, 0.3, false},
      {"over a panel", 1025, 4, 0.6, false},
      {"over a panel, threshold -1", 1100, 4, -1.0, false},
      {"over two panels", 2100, 0, 0.5, false},
      {"over two panels, classes", 2100, 4, 0.5, false},
      {"small classes", 390, 200, 0.3, false},
      {"a class of several tiles", 400, 1, 0.9, true},
      {"a class too large for a block", 4097, 1, 0.05, false},
  };
  Generator g(20);
  for (const Case& c : cases) {
    check<float>(c, DType::f32, draw(c, g));
    if (c.count > 2100) continue;
    check<double>(c, DType::f64, draw(c, g));
    if (c.count > 400) continue;
    check<half_t>(c, DType::f16, draw(c, g));
    check<bfloat16_t>(c, DType::bf16, draw(c, g));
  }
#if !defined(GFL_TEST_CUDA)
  check_layouts(rounds_of(argc, argv), g);
#else
  static_cast<void>(argc), static_cast<void>(argv);
#endif
  return result("nms");
}
