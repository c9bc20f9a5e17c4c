// SPDX-License-Identifier: Apache-2.0
// Soft-NMS against a plain loop that looks at every pair.
#include "gfl/select.h"

#include <algorithm>
#include <limits>
#include <map>

#include "box_layouts.h"
#include "testing.h"

namespace {

using namespace gfl;
using namespace gfl::testing;

struct Case {
  const char* name;
  int64_t count, classes;
  double threshold, sigma, min_score;
  bool gaussian;
};

template <class A> A overlap(const std::vector<A>& boxes, int64_t i, int64_t j) {
  const A *a = &boxes[static_cast<size_t>(4 * i)], *b = &boxes[static_cast<size_t>(4 * j)];
  const A width = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), A(0));
  const A height = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]), A(0));
  const A inter = width * height;
  return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter);
}

// Index to final score of the kept boxes.
template <class A>
std::map<int64_t, A> oracle(const Case& c, const std::vector<A>& boxes, std::vector<A> scores,
                            const std::vector<int64_t>& classes) {
  std::map<int64_t, A> left, taken;
  for (size_t i = 0; i < scores.size(); ++i) left[static_cast<int64_t>(i)] = scores[i];
  while (!left.empty()) {
    auto best = left.begin();
    for (auto at = left.begin(); at != left.end(); ++at) {
      const bool greater = at->second != at->second ? best->second == best->second : at->second > best->second;
      if (greater) best = at;
    }
    const int64_t b = best->first;
    taken[b] = best->second;
    left.erase(best);
    for (auto at = left.begin(); at != left.end();) {
      if (classes[static_cast<size_t>(at->first)] == classes[static_cast<size_t>(b)]) {
        const A iou = overlap(boxes, b, at->first);
        if (c.gaussian && iou == iou) {
          at->second *= static_cast<A>(std::exp(-(static_cast<double>(iou) * static_cast<double>(iou)) / c.sigma));
        } else if (!c.gaussian && iou >= static_cast<A>(c.threshold)) {
          at->second *= 1 - iou;
        }
      }
      if (at->second < static_cast<A>(c.min_score)) at = left.erase(at);
      else ++at;
    }
  }
  return taken;
}

template <class A, class T> std::vector<A> accumulated(const std::vector<T>& values) {
  std::vector<A> result;
  for (const T& v : values) result.push_back(static_cast<A>(load(&v)));
  return result;
}

std::vector<double> draw_boxes(int64_t count, Generator& g) {
  std::vector<double> drawn;
  for (int64_t i = 0; i < count; ++i) {
    const double x = g.uniform(0, 40), y = g.uniform(0, 40);
    drawn.insert(drawn.end(), {x, y, x + g.uniform(0, 20), y + g.uniform(0, 20)});
    if (g.integer(0, 30) == 0) drawn.back() = std::numeric_limits<double>::quiet_NaN();
  }
  return drawn;
}

template <class T, class S>
void check(const Case& c, DType dtype, DType score_dtype, const std::vector<double>& drawn, Generator& g) {
  using A = acc_t<T>;
  const size_t n = static_cast<size_t>(c.count);
  std::vector<double> drawn_scores;
  std::vector<int64_t> classes;
  for (size_t i = 0; i < n; ++i) {
    drawn_scores.push_back(g.integer(0, 30) == 0 ? std::numeric_limits<double>::quiet_NaN()
                                                 : static_cast<double>(g.integer(0, 40)) / 32);
    classes.push_back(g.integer(0, std::max<int64_t>(c.classes, 1)));
  }
  const Buffer<T> boxes(rounded<T>(drawn));
  const Buffer<S> scores(rounded<S>(drawn_scores));
  const SoftNmsInput in{boxes.data(), dtype,       4,       1,           scores.data(), score_dtype, 1,
                        c.count,      c.threshold, c.sigma, c.min_score, c.gaussian};
  std::vector<int64_t> order(n), grouped(n), bounds(n + 1), indices(n + 1);
  for (size_t i = 0; i < n; ++i) order[i] = static_cast<int64_t>(i);
  const int64_t met = cpu::group_by_class(classes.data(), order.data(), c.count, grouped.data(), bounds.data());
  Buffer<A> final_scores(n);
  Buffer<uint8_t> keep(n);
#if defined(GFL_TEST_CUDA)
  static_cast<void>(met);
  std::vector<int64_t> sorted_classes;
  for (const int64_t i : grouped) sorted_classes.push_back(classes[static_cast<size_t>(i)]);
  const Buffer<int64_t> device_grouped(grouped), labels(sorted_classes);
  Buffer<uint8_t> workspace(cuda::soft_nms_workspace_bytes(c.count, dtype));
  CHECK_CUDA(cuda::soft_nms(in, device_grouped.data(), c.classes > 1 ? labels.data() : nullptr, workspace.data(),
                            final_scores.data(), keep.data(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
#else
  for (int64_t s = 0; s < met; ++s) {
    cpu::soft_nms(in, grouped.data(), bounds.data(), final_scores.data(), keep.data(), s, s + 1);
  }
#endif
  // What is kept is ranked where the host can see it.
  const std::vector<A> final_of = final_scores.read();
  const std::vector<uint8_t> flags = keep.read();
  const std::vector<S> plain_scores = rounded<S>(drawn_scores);
  SoftNmsInput ranked = in;
  ranked.scores = plain_scores.data();
  std::vector<float> got(std::max<size_t>(n, 1));
  const int64_t kept = cpu::soft_nms_collect(ranked, final_of.data(), flags.data(), indices.data(), got.data());

  const std::map<int64_t, A> want = oracle<A>(c, accumulated<A>(boxes.read()), accumulated<A>(scores.read()), classes);
  CHECK(kept == static_cast<int64_t>(want.size()), "%s dtype %d: %lld kept, expected %zu", c.name,
        static_cast<int>(dtype), static_cast<long long>(kept), want.size());
  for (int64_t i = 0; i < kept; ++i) {
    const auto found = want.find(indices[static_cast<size_t>(i)]);
    CHECK(found != want.end(), "%s dtype %d: box %lld is kept", c.name, static_cast<int>(dtype),
          static_cast<long long>(indices[static_cast<size_t>(i)]));
    if (found == want.end()) continue;
    const float expected = static_cast<float>(found->second);
    CHECK(close(got[static_cast<size_t>(i)], expected, 0, 0), "%s: score %.9g, expected %.9g", c.name,
          static_cast<double>(got[static_cast<size_t>(i)]), static_cast<double>(expected));
    if (i > 0) {
      const float before = got[static_cast<size_t>(i - 1)], here = got[static_cast<size_t>(i)];
      const bool tie = before == here || (before != before && here != here);
      CHECK(before != before || before >= here, "%s: scores rise at %lld", c.name, static_cast<long long>(i));
      // fp64 scores are ordered before they are rounded.
      CHECK(!tie || dtype == DType::f64 || indices[static_cast<size_t>(i - 1)] < indices[static_cast<size_t>(i)],
            "%s: a tie at %lld is not by index", c.name, static_cast<long long>(i));
    }
  }
}

template <class T, class S> void check(const Case& c, DType dtype, DType score_dtype, Generator& g) {
  check<T, S>(c, dtype, score_dtype, draw_boxes(c.count, g), g);
}

#if !defined(GFL_TEST_CUDA)
// Enough boxes that the CPU looks for neighbours in a grid.
void check_layouts(int64_t rounds, Generator& g) {
  for (int64_t round = 0; round < rounds; ++round) {
    for (int layout = 0; layout < kLayouts; ++layout) {
      for (const double threshold : {-0.5, 0.0, 0.05, 0.3, 0.7}) {
        for (const bool gaussian : {false, true}) {
          const double sigma = std::exp2(g.uniform(-6, 3)), min_score = g.integer(0, 4) == 0 ? -1 : 0.05;
          const Case c{"layout", 620, 1, threshold, sigma, min_score, gaussian};
          const std::vector<double> drawn = draw_layout(layout, c.count, threshold, g);
          switch (g.integer(0, 6)) {
            case 0: check<double, double>(c, DType::f64, DType::f64, drawn, g); break;
            case 1: check<half_t, float>(c, DType::f16, DType::f32, drawn, g); break;
            case 2: check<bfloat16_t, float>(c, DType::bf16, DType::f32, drawn, g); break;
            default: check<float, float>(c, DType::f32, DType::f32, drawn, g);
          }
        }
      }
    }
  }
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const Case cases[] = {
      {"empty", 0, 1, 0.3, 0.5, 0.001, false},           {"one", 1, 1, 0.3, 0.5, 0.001, true},
      {"linear", 40, 1, 0.3, 0.5, 0.001, false},         {"gaussian", 40, 1, 0.3, 0.5, 0.001, true},
      {"classes", 120, 4, 0.3, 0.5, 0.05, false},        {"classes, gaussian", 120, 4, 0.3, 0.2, 0.05, true},
      {"threshold 0", 60, 2, 0.0, 0.5, 0.1, false},      {"a high minimum", 60, 2, 0.3, 0.5, 1.0, true},
      {"over a block", 515, 1, 0.2, 0.5, 1.1, false},    {"many classes", 200, 150, 0.3, 0.5, 0.3, true},
      {"many of a class", 2700, 1, 0.2, 0.5, 1.2, true},
  };
  Generator g(21);
  for (const Case& c : cases) {
    check<float, float>(c, DType::f32, DType::f32, g);
    check<double, double>(c, DType::f64, DType::f64, g);
    check<half_t, half_t>(c, DType::f16, DType::f16, g);
    check<bfloat16_t, bfloat16_t>(c, DType::bf16, DType::bf16, g);
  }
  // Scores of another dtype than the boxes'.
  const Case mixed{"mixed", 2700, 1, 0.2, 0.5, 1.2, false};
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
    for (const DType score_dtype : {DType::f32, DType::f64, DType::f16, DType::bf16}) {
      dispatch(dtype, [&](auto t) {
        dispatch(score_dtype, [&](auto s) { check<decltype(t), decltype(s)>(mixed, dtype, score_dtype, g); });
      });
    }
  }
#if defined(GFL_TEST_CUDA)
  static_cast<void>(argc), static_cast<void>(argv);
#else
  check_layouts(rounds_of(argc, argv), g);
  // The best of all is kept although every score is below the minimum.
  const float boxes[] = {0, 0, 1, 1, 5, 5, 6, 6, 0, 0, 1, 1}, scores[] = {0.1f, 0.3f, 0.3f};
  const SoftNmsInput in{boxes, DType::f32, 4, 1, scores, DType::f32, 1, 3, 0.3, 0.5, 0.9, false};
  const int64_t grouped[] = {0, 1, 2}, bounds[] = {0, 3};
  float final_scores[3], kept_scores[1];
  uint8_t keep[3];
  int64_t indices[1];
  cpu::soft_nms(in, grouped, bounds, final_scores, keep, 0, 1);
  CHECK(cpu::soft_nms_collect(in, final_scores, keep, indices, kept_scores) == 1, "one is kept");
  CHECK(indices[0] == 1 && kept_scores[0] == 0.3f, "it is box %lld", static_cast<long long>(indices[0]));
#endif
  return result("soft_nms");
}
