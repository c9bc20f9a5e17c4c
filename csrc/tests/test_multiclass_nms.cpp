// SPDX-License-Identifier: Apache-2.0
// The candidates of multiclass NMS against a double loop.
#include "gfl/select.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "testing.h"

namespace {

using namespace gfl;
using namespace gfl::testing;

#if !defined(GFL_TEST_CUDA)
// The best candidates, by falling score and then in their order, against a stable sort of all of them.
template <class T, class S>
void check_cut(const MulticlassInput& in, int64_t most, const std::vector<double>& boxes,
               const std::vector<double>& scores, const std::vector<int64_t>& labels) {
  const MulticlassCut cut = cpu::multiclass_cut(in, most);
  const int64_t total = static_cast<int64_t>(scores.size());
  CHECK(cut.all == (cut.count == total), "%lld of %lld", static_cast<long long>(cut.count),
        static_cast<long long>(total));
  CHECK(cut.count >= std::min(most, total) && cut.count <= (cut.all ? 4 * most + 3 : most),
        "%lld candidates for %lld of %lld", static_cast<long long>(cut.count), static_cast<long long>(most),
        static_cast<long long>(total));
  std::vector<size_t> best(scores.size());
  std::iota(best.begin(), best.end(), size_t(0));
  std::stable_sort(best.begin(), best.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  best.resize(static_cast<size_t>(cut.count));
  std::sort(best.begin(), best.end());
  std::vector<double> want_boxes, want_scores;
  std::vector<int64_t> want_labels;
  for (const size_t i : best) {
    want_boxes.insert(want_boxes.end(), &boxes[4 * i], &boxes[4 * i] + 4);
    want_scores.push_back(scores[i]);
    want_labels.push_back(labels[i]);
  }
  std::vector<T> got_boxes(4 * best.size());
  std::vector<S> got_scores(best.size());
  std::vector<int64_t> got_labels(best.size());
  cpu::multiclass_gather(in, cut, got_boxes.data(), got_scores.data(), got_labels.data());
  CHECK(widened(got_boxes) == want_boxes && widened(got_scores) == want_scores && got_labels == want_labels,
        "the best %lld of %lld", static_cast<long long>(most), static_cast<long long>(total));
}
#endif

// Boxes in T, scores in S.
template <class T, class S = T>
void check(DType dtype, int64_t rows, int64_t classes, bool per_class, double threshold, bool planes, DType score_dtype,
           Generator& g, int64_t values = 10) {
  const int64_t columns = per_class ? 4 * classes : 4;
  std::vector<double> drawn, drawn_scores;
  for (int64_t i = 0; i < rows * columns; ++i) drawn.push_back(g.uniform(-100, 100));
  for (int64_t i = 0; i < rows * classes; ++i) {
    drawn_scores.push_back(g.integer(0, 9) == 0
                               ? std::numeric_limits<double>::quiet_NaN()
                               : static_cast<double>(g.integer(-values / 4, values)) / static_cast<double>(values));
  }
  const std::vector<T> boxes = rounded<T>(drawn);
  const std::vector<S> scores = rounded<S>(drawn_scores);
  const Buffer<T> given_boxes(boxes);
  const Buffer<S> given_scores(scores);
  // `planes`: the same memory read as the transpose of a matrix, columns first.
  const MulticlassInput in{given_boxes.data(),
                           dtype,
                           planes ? 1 : columns,
                           planes ? rows : 1,
                           per_class,
                           given_scores.data(),
                           score_dtype,
                           planes ? 1 : classes,
                           planes ? rows : 1,
                           rows,
                           classes,
                           threshold};
  std::vector<double> want_boxes, want_scores;
  std::vector<int64_t> want_labels;
  const std::vector<double> wide_boxes = widened(boxes), wide_scores = widened(scores);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < classes; ++c) {
      const double score = wide_scores[static_cast<size_t>(planes ? c * rows + i : i * classes + c)];
      if (!(score > static_cast<double>(static_cast<acc_t<S>>(threshold)))) continue;
      want_scores.push_back(score);
      want_labels.push_back(c);
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t column = (per_class ? 4 * c : 0) + j;
        want_boxes.push_back(wide_boxes[static_cast<size_t>(planes ? column * rows + i : i * columns + column)]);
      }
    }
  }
#if defined(GFL_TEST_CUDA)
  Buffer<int64_t> total(1), workspace(cuda::multiclass_workspace_bytes(in) / sizeof(int64_t));
  CHECK_CUDA(cuda::multiclass_count(in, workspace.data(), total.data(), nullptr));
  const int64_t count = total.read()[0];
#else
  const MulticlassCut all = cpu::multiclass_cut(in, rows * classes);
  CHECK(all.all, "a cut for as many as there are leaves some out");
  const int64_t count = all.count;
#endif
  CHECK(count == static_cast<int64_t>(want_scores.size()), "%lld candidates, expected %zu",
        static_cast<long long>(count), want_scores.size());
  Buffer<T> got_boxes(static_cast<size_t>(4 * count));
  Buffer<S> got_scores(static_cast<size_t>(count));
  Buffer<int64_t> labels(static_cast<size_t>(count));
#if defined(GFL_TEST_CUDA)
  CHECK_CUDA(
      cuda::multiclass_gather(in, workspace.data(), got_boxes.data(), got_scores.data(), labels.data(), nullptr));
#else
  cpu::multiclass_gather(in, all, got_boxes.data(), got_scores.data(), labels.data());
#endif
  CHECK(widened(got_boxes.read()) == want_boxes, "boxes, dtype %d per class %d planes %d", static_cast<int>(dtype),
        per_class, planes);
  CHECK(widened(got_scores.read()) == want_scores, "scores, dtype %d", static_cast<int>(dtype));
  CHECK(labels.read() == want_labels, "labels, dtype %d", static_cast<int>(dtype));
#if !defined(GFL_TEST_CUDA)
  for (const int64_t most : {1, 2, 7, 100, 900}) check_cut<T, S>(in, most, want_boxes, want_scores, want_labels);
#endif
}

}  // namespace

int main() {
  Generator g(22);
  for (const bool per_class : {false, true}) {
    for (const bool planes : {false, true}) {
      for (const double threshold : {0.3, 1.0, -1.0}) {
        for (const int64_t rows : {0, 1, 17}) {
          check<float>(DType::f32, rows, 3, per_class, threshold, planes, DType::f32, g);
          check<double>(DType::f64, rows, 1, per_class, threshold, planes, DType::f64, g);
          check<half_t>(DType::f16, rows, 5, per_class, threshold, planes, DType::f16, g);
          check<bfloat16_t>(DType::bf16, rows, 2, per_class, threshold, planes, DType::bf16, g);
        }
      }
    }
  }
  // Every dtype of boxes with every dtype of scores.
  const auto mixed = [&](auto box, DType dtype) {
    using T = decltype(box);
    for (const bool per_class : {false, true}) {
      for (const double threshold : {0.3, -1.0}) {
        check<T, float>(dtype, 139, 59, per_class, threshold, per_class, DType::f32, g);
        check<T, double>(dtype, 139, 59, per_class, threshold, per_class, DType::f64, g);
        check<T, half_t>(dtype, 139, 59, per_class, threshold, !per_class, DType::f16, g);
        check<T, bfloat16_t>(dtype, 139, 59, per_class, threshold, !per_class, DType::bf16, g);
      }
    }
  };
  mixed(float{}, DType::f32);
  mixed(double{}, DType::f64);
  mixed(half_t{}, DType::f16);
  mixed(bfloat16_t{}, DType::bf16);
  // Candidates of several blocks, and the last of them not whole.
  for (const double threshold : {0.85, -1.0}) {
    check<float>(DType::f32, 700, 20, false, threshold, false, DType::f32, g);
    check<half_t>(DType::f16, 139, 59, true, threshold, true, DType::f16, g);
    check<bfloat16_t>(DType::bf16, 139, 59, false, threshold, false, DType::bf16, g);
    check<double>(DType::f64, 139, 59, true, threshold, false, DType::f64, g);
  }
  // Scores of many values, of which the first digits do not tell the best; or of one value only.
  for (const int64_t values : {1, 4, 1000, 1 << 30}) {
    for (const double threshold : {-1.0, 0.0, 0.5}) {
      check<float>(DType::f32, 500, 20, false, threshold, false, DType::f32, g, values);
      check<float, double>(DType::f32, 500, 20, true, threshold, true, DType::f64, g, values);
      check<float, half_t>(DType::f32, 500, 20, false, threshold, true, DType::f16, g, values);
    }
  }
  return result("multiclass_nms");
}
