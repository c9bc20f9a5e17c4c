// SPDX-License-Identifier: Apache-2.0
// Task-aligned assignment against metrics of all pairs, sorted; its arithmetic against double.
#include "terms/task_aligned.h"

#include "assignment.h"

namespace {

using namespace gfl;
using gfl::testing::Assigned;
using gfl::testing::Generator;
using gfl::testing::Scene;

// Locations by falling value, ties by the lower index.
std::vector<size_t> ranking(const std::vector<float>& values) {
  return gfl::testing::order_of(values, std::greater<>());
}

// The definition for one image, over matrices [slots, locations].
void by_sorting(const TaskAlignedInput& in, const Scene& s, const std::vector<float>& scores, int64_t image,
                Assigned& r) {
  const size_t count = static_cast<size_t>(in.locations);
  const bool mmdet = in.variant == TaskAlignedVariant::mmdet;
  const Power alpha = power_of(in.alpha), beta = power_of(in.beta);
  struct Row {
    int64_t slot;
    std::vector<float> overlap, metric, own;
    std::vector<bool> inside, selected;
  };
  std::vector<Row> rows;
  for (int64_t slot = 0; slot < in.gts; ++slot) {
    if (!holds_box(in, image * in.gts + slot)) continue;
    const int64_t label = in.gt_labels[image * in.gts + slot];
    const float* b = in.gt_boxes + (image * in.gts + slot) * 4;
    const Inside inside = candidates_of(in, b);
    Row row{slot, {}, {}, {}, {}, std::vector<bool>(count)};
    for (size_t i = 0; i < count; ++i) {
      const size_t at = static_cast<size_t>(image) * count + i;
      const float* p = in.boxes + 4 * at;
      float overlap = task_aligned_overlap(in.overlap, rated_box(in.overlap, b[0], b[1], b[2], b[3]),
                                           rated_box(in.overlap, p[0], p[1], p[2], p[3]));
      row.inside.push_back(inside(s.points[4 * i], s.points[4 * i + 1]));
      if (in.variant == TaskAlignedVariant::ultralytics && !row.inside[i]) overlap = 0;
      const float score = scores[at * static_cast<size_t>(in.classes) + static_cast<size_t>(label)];
      row.overlap.push_back(overlap);
      row.metric.push_back(task_aligned_metric(alpha, beta, probability(in, score), overlap));
      row.own.push_back(mmdet || row.inside[i] ? row.metric[i] : 0);
    }
    const std::vector<size_t> order = ranking(row.own);
    for (size_t e = 0; e < std::min(count, static_cast<size_t>(in.topk)); ++e) {
      row.selected[order[e]] = row.inside[order[e]] && !(mmdet && row.metric[order[e]] == 0);
    }
    rows.push_back(row);
  }
  std::vector<Row*> got(count);
  for (size_t i = 0; i < count; ++i) {
    int times = 0;
    Row *only = nullptr, *best = rows.empty() ? nullptr : rows.data();
    if (mmdet) best = nullptr;
    for (Row& row : rows) {
      if (row.selected[i]) ++times, only = &row;
      if (mmdet && !row.selected[i]) continue;
      if (best == nullptr || row.overlap[i] > best->overlap[i]) best = &row;
    }
    got[i] = times == 0 ? nullptr : times == 1 ? only : best;
  }
  if (in.topk2 != in.topk) {
    for (Row& row : rows) {
      std::vector<float> own(count);
      for (size_t i = 0; i < count; ++i) own[i] = got[i] == &row ? row.metric[i] : 0;
      const std::vector<size_t> order = ranking(own);
      for (size_t e = static_cast<size_t>(in.topk2); e < count; ++e) {
        if (got[order[e]] == &row) got[order[e]] = nullptr;
      }
    }
  }
  for (size_t i = 0; i < count; ++i) {
    float score = 0;
    if (got[i] != nullptr) {
      float metric = 0, overlap = 0;
      for (size_t j = 0; j < count; ++j) {
        if (got[j] != got[i]) continue;
        metric = std::max(metric, got[j]->metric[j]);
        overlap = std::max(overlap, got[j]->overlap[j]);
      }
      score = normalised_metric(in, got[i]->metric[i], metric, overlap);
    }
    const int64_t slot = got[i] == nullptr ? -1 : got[i]->slot;
    r.add(slot < 0 ? -1 : in.gt_labels[image * in.gts + slot], slot, score);
  }
}

template <class T> void run(TaskAlignedInput in, const std::vector<T>& scores, const AssignOutput& out) {
#if defined(GFL_TEST_CUDA)
  const gfl::testing::PredictionsOnDevice<TaskAlignedInput, T> moved(in, scores, 2);
  gfl::testing::Buffer<uint64_t> workspace(cuda::task_aligned_workspace_bytes(in) / 8 + 1);
  CHECK_CUDA(cuda::task_aligned(in, out, workspace.data(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
#else
  in.scores = scores.data();
  for (int64_t b = 0; b < in.images; ++b) cpu::task_aligned(in, out, b, b + 1);
#endif
}

int64_t positives = 0, conflicts_of_nothing = 0;

template <class T> void compare(TaskAlignedInput in, const Scene& s, DType dtype, const char* name) {
  std::vector<double> values = s.scores;
  if (in.logits) {
    for (double& v : values) v = v * 9 - 6;
  }
  const auto definition = [&](const TaskAlignedInput& given, const std::vector<float>& scores, int64_t image,
                              Assigned& found) { by_sorting(given, s, scores, image, found); };
  const Assigned want = gfl::testing::compared<T>(in, values, dtype, name, definition, run<T>);
  positives += want.positives();
  for (size_t i = 0; i < want.matched.size(); ++i) conflicts_of_nothing += want.matched[i] >= 0 && want.values[i] == 0;
}

void arithmetic() {
  Generator draw(1);
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const float x = static_cast<float>((i % 2 == 0 ? 1 : -1) * std::exp(draw.uniform(-20, 20)));
    const double want = std::atan(static_cast<double>(x));
    const double ulp =
        std::nextafter(std::fabs(static_cast<float>(want)), INFINITY) - std::fabs(static_cast<float>(want));
    worst = std::max(worst, std::fabs(arc_tangent(x) - want) / ulp);
  }
  CHECK(worst < 2.8, "arc tangent errs by %g ulp", worst);
  CHECK(arc_tangent(INFINITY) == 1.5707964f && arc_tangent(0.0f) == 0 && std::isnan(arc_tangent(NAN)), "at the ends");
  for (const double exponent : {0.0, 0.5, 1.0, 1.5, 2.0, 6.0, 6.5, 32.0, 0.7, 2.3}) {
    for (const float x : {0.0f, 0.01f, 0.37f, 0.999f, 1.0f}) {
      const double want = std::pow(static_cast<double>(x), exponent);
      CHECK(gfl::testing::close(power(power_of(exponent), x), want, 64 * 6e-8, 1e-45), "%g^%g", x, exponent);
    }
  }
  for (int i = 0; i < 2000; ++i) {
    double b[8];
    for (int c = 0; c < 8; c += 2) {
      b[c] = static_cast<float>(draw.uniform(0, 60));
      b[c + 1] = static_cast<float>(draw.uniform(0, 60));
    }
    for (int c = 0; c < 8; c += 4) b[c + 2] += b[c] + 1, b[c + 3] += b[c + 1] + 1;
    for (double& v : b) v = static_cast<float>(v);
    const double w = std::max(std::min(b[2], b[6]) - std::max(b[0], b[4]), 0.0);
    const double h = std::max(std::min(b[3], b[7]) - std::max(b[1], b[5]), 0.0);
    const double iou = w * h / ((b[2] - b[0]) * (b[3] - b[1]) + (b[6] - b[4]) * (b[7] - b[5]) - w * h);
    const double cx = std::max(b[2], b[6]) - std::min(b[0], b[4]), cy = std::max(b[3], b[7]) - std::min(b[1], b[5]);
    const double dx = (b[4] + b[6] - b[0] - b[2]) / 2, dy = (b[5] + b[7] - b[1] - b[3]) / 2;
    const double angle = std::atan((b[2] - b[0]) / (b[3] - b[1])) - std::atan((b[6] - b[4]) / (b[7] - b[5]));
    const double v = 4 / (M_PI * M_PI) * angle * angle;
    const double ciou = iou - (dx * dx + dy * dy) / (cx * cx + cy * cy) - v * v / (1 - iou + v);
    float f[8];
    for (int c = 0; c < 8; ++c) f[c] = static_cast<float>(b[c]);
    for (const auto kind : {TaskAlignedOverlap::ciou, TaskAlignedOverlap::clipped_iou, TaskAlignedOverlap::iou}) {
      const float got =
          task_aligned_overlap(kind, rated_box(kind, f[0], f[1], f[2], f[3]), rated_box(kind, f[4], f[5], f[6], f[7]));
      const double want = kind == TaskAlignedOverlap::ciou ? std::max(ciou, 0.0) : iou;
      CHECK(gfl::testing::close(got, want, 1e-5, 2e-6), "overlap %d: %g, not %g", static_cast<int>(kind), got, want);
    }
  }
}

}  // namespace

int main() {
  arithmetic();
  Generator draw(20);
  const int64_t images = 2, classes = 3;
  for (const bool tied : {false, true}) {
    for (const int64_t gts : {3, 30}) {
      const Scene s = gfl::testing::drawn_scene(draw, images, std::max<int64_t>(gts, 4), classes, tied);
      std::vector<float> points;
      for (size_t i = 0; i < s.points.size(); ++i) {
        if (i % 4 < 2) points.push_back(s.points[i]);
      }
      for (const auto& [topk, topk2] :
           {std::pair<int64_t, int64_t>{10, 10}, {7, 1}, {1, 1}, {13, 4}, {40, 35}, {400, 400}}) {
        for (const auto variant :
             {TaskAlignedVariant::ultralytics, TaskAlignedVariant::yolov6, TaskAlignedVariant::mmdet}) {
          for (const bool grid : {true, false}) {
            TaskAlignedInput in{};
            s.enter(in, images, std::max<int64_t>(gts, 4), classes);
            in.points = grid ? nullptr : points.data();
            in.topk = topk;
            in.topk2 = topk2;
            in.alpha = variant == TaskAlignedVariant::ultralytics ? 0.5 : 1;
            in.beta = topk == 13 ? 2.3 : 6;
            in.min_side = variant == TaskAlignedVariant::ultralytics && !tied ? 16.0f : 0.0f;
            in.eps = 1e-9f;
            in.variant = variant;
            in.overlap = variant == TaskAlignedVariant::ultralytics || topk == 7 ? TaskAlignedOverlap::ciou
                         : variant == TaskAlignedVariant::yolov6                 ? TaskAlignedOverlap::clipped_iou
                                                                                 : TaskAlignedOverlap::iou;
            char name[80];
            std::snprintf(name, sizeof name, "variant %d topk %d,%d gts %d%s%s", static_cast<int>(variant),
                          static_cast<int>(topk), static_cast<int>(topk2), static_cast<int>(gts), tied ? " tied" : "",
                          grid ? "" : " points");
            compare<float>(in, s, DType::f32, name);
            if (topk == 10 && grid) {
              compare<double>(in, s, DType::f64, name);
              compare<half_t>(in, s, DType::f16, name);
              compare<bfloat16_t>(in, s, DType::bf16, name);
            }
            in.logits = true;
            compare<float>(in, s, DType::f32, name);
            if (gts == 3) {  // without boxes
              in.gts = 0;
              compare<float>(in, s, DType::f32, name);
            }
          }
        }
      }
    }
  }
  // More levels, locations and k than one turn of any loop takes, and exponents that no product gives.
  const Scene wide = gfl::testing::drawn_scene(draw, 18, 5, classes, false, true);
  for (const auto variant : {TaskAlignedVariant::ultralytics, TaskAlignedVariant::yolov6, TaskAlignedVariant::mmdet}) {
    TaskAlignedInput in{};
    wide.enter(in, 18, 5, classes);
    in.topk = 400;
    in.topk2 = 150;
    in.alpha = 0.7;
    in.beta = 2.3;
    in.min_side = variant == TaskAlignedVariant::ultralytics ? 16.0f : 0.0f;
    in.eps = 1e-9f;
    in.variant = variant;
    in.overlap = variant == TaskAlignedVariant::ultralytics ? TaskAlignedOverlap::ciou
                 : variant == TaskAlignedVariant::yolov6    ? TaskAlignedOverlap::clipped_iou
                                                            : TaskAlignedOverlap::iou;
    compare<float>(in, wide, DType::f32, "wide");
  }
  // 65 536 boxes and more.
  const int64_t many = 66000;
  const Scene crowd = gfl::testing::drawn_scene(draw, 1, many, classes, false);
  TaskAlignedInput in{};
  crowd.enter(in, 1, many, classes);
  in.topk = in.topk2 = 10;
  in.alpha = 0.5;
  in.beta = 6;
  in.min_side = 16.0f;
  in.eps = 1e-9f;
  in.variant = TaskAlignedVariant::ultralytics;
  in.overlap = TaskAlignedOverlap::ciou;
  compare<float>(in, crowd, DType::f32, "66000 boxes");
  CHECK(positives > 2000, "only %lld positives", static_cast<long long>(positives));
  CHECK(conflicts_of_nothing > 100, "only %lld of score 0", static_cast<long long>(conflicts_of_nothing));
  return gfl::testing::result("task_aligned");
}
