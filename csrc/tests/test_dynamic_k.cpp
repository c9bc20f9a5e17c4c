// SPDX-License-Identifier: Apache-2.0
// Assignment with a dynamic k against costs of all pairs, sorted; its arithmetic against double.
#include "terms/dynamic_k.h"

#include "assignment.h"

namespace {

using namespace gfl;
using gfl::testing::Assigned;
using gfl::testing::Generator;
using gfl::testing::Scene;

// The first `count` indices by rising value, ties by the lower index.
std::vector<size_t> cheapest(const std::vector<float>& values, size_t count) {
  std::vector<size_t> order = gfl::testing::order_of(values, std::less<>());
  order.resize(std::min(order.size(), count));
  return order;
}

float background_of(const DynamicKInput& in, const float* scores) {
  float lanes[16] = {};
  for (int64_t c = 0; c < in.classes; ++c) {
    lanes[c % 16] += background_cost(in.cost, prepared_score(in.cost, scores[c]));
  }
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// The definition for one image, over matrices [slots, locations].
void by_sorting(const DynamicKInput& in, const Scene& s, const std::vector<float>& scores, int64_t image, Assigned& r) {
  const size_t count = static_cast<size_t>(in.locations);
  std::vector<int64_t> slots;
  std::vector<bool> candidate(count);
  for (int64_t slot = 0; slot < in.gts; ++slot) {
    if (!holds_box(in, image * in.gts + slot)) continue;
    slots.push_back(slot);
    const float* b = in.gt_boxes + (image * in.gts + slot) * 4;
    for (size_t i = 0; i < count; ++i) {
      const float* p = s.points.data() + 4 * i;
      candidate[i] = candidate[i] || inside_box(b)(p[0], p[1]) ||
                     (in.cost == DynamicKCost::simota && near_centre(b, in.center_radius, p[2], p[3])(p[0], p[1]));
    }
  }
  std::vector<size_t> places;
  for (size_t i = 0; i < count; ++i) {
    if (candidate[i] || in.cost == DynamicKCost::mmyolo) places.push_back(i);
  }
  std::vector<std::vector<float>> cost, overlap;
  std::vector<int> times(count);
  std::vector<size_t> owner(count);
  for (const int64_t slot : slots) {
    const float* b = in.gt_boxes + (image * in.gts + slot) * 4;
    const int64_t label = in.gt_labels[image * in.gts + slot];
    const auto kind = TaskAlignedOverlap::iou;
    cost.emplace_back();
    overlap.emplace_back();
    for (const size_t i : places) {
      const size_t at = static_cast<size_t>(image) * count + i;
      const float *p = in.boxes + 4 * at, *where = s.points.data() + 4 * i;
      const float* classes = scores.data() + at * static_cast<size_t>(in.classes);
      const PairCost<float> pair =
          pair_cost(in, rated_box(kind, b[0], b[1], b[2], b[3]), rated_box(kind, p[0], p[1], p[2], p[3]),
                    Location<float>{where[0], where[1], where[2], where[3]});
      const float whole = whole_cost(in, pair, prepared_score(in.cost, classes[label]), background_of(in, classes));
      CHECK(!(whole < pair.bound()), "a cost of %g under its bound %g", whole, pair.bound());
      overlap.back().push_back(pair.overlap);
      cost.back().push_back(candidate[i] ? whole : kOutsideAll);
    }
    std::vector<float> largest = overlap.back();
    std::sort(largest.begin(), largest.end(), std::greater<float>());
    largest.resize(std::min(largest.size(), static_cast<size_t>(in.topk)));
    float sum = 0;
    for (const float v : largest) sum += v;
    const size_t k = std::min(std::max<size_t>(static_cast<size_t>(sum), 1), largest.size());
    for (const size_t place : cheapest(cost.back(), k)) {
      ++times[place];
      owner[place] = cost.size() - 1;
    }
  }
  Assigned found;
  found.labels.assign(count, -1);
  found.matched.assign(count, -1);
  found.values.assign(count, 0.0f);
  for (size_t place = 0; place < places.size(); ++place) {
    if (times[place] == 0) continue;
    if (times[place] > 1) {
      owner[place] = 0;
      for (size_t other = 1; other < slots.size(); ++other) {
        if (cost[other][place] < cost[owner[place]][place]) owner[place] = other;
      }
    }
    found.matched[places[place]] = slots[owner[place]];
    found.labels[places[place]] = in.gt_labels[image * in.gts + slots[owner[place]]];
    found.values[places[place]] = overlap[owner[place]][place];
  }
  for (size_t i = 0; i < count; ++i) r.add(found.labels[i], found.matched[i], found.values[i]);
}

template <class T> void run(DynamicKInput in, const std::vector<T>& scores, const AssignOutput& out) {
#if defined(GFL_TEST_CUDA)
  const gfl::testing::PredictionsOnDevice<DynamicKInput, T> moved(in, scores, 4);
  CHECK_CUDA(cuda::dynamic_k(in, out, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
#else
  in.scores = scores.data();
  for (int64_t b = 0; b < in.images; ++b) cpu::dynamic_k(in, out, b, b + 1);
#endif
}

int64_t positives = 0;

template <class T> void compare(DynamicKInput in, const Scene& s, DType dtype, const char* name) {
  std::vector<double> values = s.scores;
  if (!takes_probabilities(in.cost)) {
    for (double& v : values) v = v * 9 - 6;
  }
  const auto definition = [&](const DynamicKInput& given, const std::vector<float>& scores, int64_t image,
                              Assigned& want) { by_sorting(given, s, scores, image, want); };
  positives += gfl::testing::compared<T>(in, values, dtype, name, definition, run<T>).positives();
}

void arithmetic() {
  Generator draw(1);
  for (int i = 0; i < 100000; ++i) {
    const float x = static_cast<float>(draw.uniform(-86, 0)), y = static_cast<float>(draw.uniform(-36.9, 37.9));
    const float u = static_cast<float>(draw.uniform(-0.999, 1)), v = static_cast<float>(std::exp(draw.uniform(-80, 1)));
    CHECK(gfl::testing::close(exponential(x), std::exp(static_cast<double>(x)), 2 * 1.2e-7, 0), "e^%g", x);
    CHECK(gfl::testing::close(power_of_ten(y), std::pow(10.0, static_cast<double>(y)), 4 * 1.2e-7, 0), "10^%g", y);
    CHECK(gfl::testing::close(logarithm(v), std::log(static_cast<double>(v)), 2 * 1.2e-7, 0), "log %g", v);
    CHECK(gfl::testing::close(logarithm_of_sum(u, 1.0f + u), std::log(1.0 + static_cast<double>(u)), 2 * 1.2e-7, 6e-8),
          "log(1 + %g)", u);
    const float logit = static_cast<float>(draw.uniform(-20, 20)), iou = static_cast<float>(draw.uniform());
    const double d = logit, p = 1 / (1 + std::exp(-d));
    const double loss = std::max(d, 0.0) - d * iou + std::log1p(std::exp(-std::fabs(d)));
    CHECK(
        gfl::testing::close(foreground_cost(DynamicKCost::mmdet, logit, iou), loss * (iou - p) * (iou - p), 2e-6, 2e-6),
        "class cost of %g, %g", logit, iou);
    const double all = (std::max(d, 0.0) + std::log1p(std::exp(-std::fabs(d)))) * p * p;
    CHECK(gfl::testing::close(background_cost(DynamicKCost::mmdet, logit), all, 2e-6, 1e-7), "of background, %g",
          logit);
  }
  CHECK(exponential(-88.0f) == 0 && power_of_ten(-40.0f) == 0 && power_of_ten(39.0f) == INFINITY, "at the ends");
  CHECK(logarithm(0.0f) == -100 && logarithm(1.0f) == 0 && std::isnan(logarithm(NAN)), "logarithm at the ends");
  CHECK(std::isnan(power_of_ten(NAN)), "10^NaN");
  for (const auto cost : {DynamicKCost::mmdet, DynamicKCost::nanodet, DynamicKCost::simota}) {
    CHECK(background_cost(cost, takes_probabilities(cost) ? 0.0f : -INFINITY) == 0, "no class costs nothing");
  }
}

}  // namespace

int main() {
  arithmetic();
  Generator draw(20);
  const int64_t images = 2, classes = 19;
  for (const bool tied : {false, true}) {
    for (const int64_t gts : {4, 30}) {
      const Scene s = gfl::testing::drawn_scene(draw, images, gts, classes, tied);
      for (const int64_t topk : {1, 13, 40, 400}) {
        for (const auto cost :
             {DynamicKCost::mmdet, DynamicKCost::mmyolo, DynamicKCost::nanodet, DynamicKCost::simota}) {
          for (const bool grid : {true, false}) {
            DynamicKInput in{};
            s.enter(in, images, gts, classes);
            in.points = grid ? nullptr : s.points.data();
            in.topk = topk;
            in.iou_weight = 3.0f;
            in.cls_weight = topk == 13 ? 1.0f : 0.7f;
            in.center_radius = cost == DynamicKCost::simota ? 1.5f : 3.0f;
            in.cost = cost;
            char name[80];
            std::snprintf(name, sizeof name, "cost %d topk %d gts %d%s%s", static_cast<int>(cost),
                          static_cast<int>(topk), static_cast<int>(gts), tied ? " tied" : "", grid ? "" : " points");
            compare<float>(in, s, DType::f32, name);
            if (topk == 13 && grid) {
              compare<double>(in, s, DType::f64, name);
              compare<half_t>(in, s, DType::f16, name);
              compare<bfloat16_t>(in, s, DType::bf16, name);
            }
            if (gts == 4 && topk == 13) {  // without boxes, and with one that may contain no location
              in.gts = 0;
              compare<float>(in, s, DType::f32, name);
              in.gts = 1;
              compare<float>(in, s, DType::f32, name);
            }
          }
        }
      }
    }
  }
#if defined(GFL_CUDA_ON_HOST)
  const int64_t many = 3000;  // a CPU that takes the place of a GPU's threads would need minutes for more
#else
  const int64_t many = 66000;  // beyond 16 bits
#endif
  const Scene crowd = gfl::testing::drawn_scene(draw, 1, many, classes, false);
  DynamicKInput in{};
  crowd.enter(in, 1, many, classes);
  in.topk = 13;
  in.iou_weight = in.center_radius = 3.0f;
  in.cls_weight = 1.0f;
  in.cost = DynamicKCost::mmdet;
  compare<float>(in, crowd, DType::f32, "many boxes");
  CHECK(positives > 2000, "only %lld positives", static_cast<long long>(positives));
  return gfl::testing::result("dynamic_k");
}
