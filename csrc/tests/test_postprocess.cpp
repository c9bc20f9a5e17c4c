// SPDX-License-Identifier: Apache-2.0
// Post-processing against plain loops: every candidate listed, sorted and compared with every box kept before it.
#include "gfl/select.h"

#include <algorithm>
#include <limits>

#include "gfl/parallel.h"
#include "terms/ranking.h"
#include "testing.h"

namespace {

using gfl::DType;
using gfl::testing::Buffer;
using gfl::testing::Generator;

enum Layout { kNchw, kNhwc, kGaps, kTransposed };

// A map [B, C, H, W] in one of several layouts, and its values as the kernel sees them.
template <class T> struct Map {
  Map(int64_t batch, int64_t channels, int64_t height, int64_t width, Layout layout)
      : sizes{batch, channels, height, width} {
    if (layout == kNhwc) fill_strides({0, 2, 3, 1}, 0);
    else if (layout == kGaps) fill_strides({0, 1, 2, 3}, 3);
    else if (layout == kTransposed) fill_strides({0, 1, 3, 2}, 0);
    else fill_strides({0, 1, 2, 3}, 0);
  }
  void fill_strides(std::vector<int> order, int64_t gap) {
    int64_t step = 1;
    for (int i = 3; i >= 0; --i) {
      strides[order[i]] = step;
      step = step * std::max<int64_t>(sizes[order[i]], 1) + gap;
    }
    values.assign(static_cast<size_t>(step), std::numeric_limits<double>::quiet_NaN());
  }
  double& at(int64_t b, int64_t c, int64_t y, int64_t x) {
    return values[static_cast<size_t>(b * strides[0] + c * strides[1] + y * strides[2] + x * strides[3])];
  }
  float read(int64_t b, int64_t c, int64_t y, int64_t x) {
    T element;
    gfl::store(&element, static_cast<gfl::acc_t<T>>(at(b, c, y, x)));
    return static_cast<float>(gfl::load(&element));
  }

  int64_t sizes[4], strides[4];
  std::vector<double> values;
};

struct Detection {
  float box[4], score;
  int64_t label, location;
};

struct Found {
  float value;
  int64_t level, location, label;
  float box[4];
};

float iou(const float* a, const float* b, float offset) {
  const float w = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]) + offset, 0.0f);
  const float h = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]) + offset, 0.0f);
  const float area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset);
  const float area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset);
  return w * h / (area_a + area_b - w * h);
}

template <class T> struct Case {
  gfl::PostprocessInput in{};
  std::vector<Map<T>> cls, reg;
  std::vector<float> sizes, factors;
  double box_tolerance = 0;

  std::vector<Detection> oracle(int64_t image) {
    const float threshold = gfl::ranking_threshold(in.score_threshold, in.activated);
    const float shrink = in.legacy ? 1.0f : 0.0f;
    const float limit[2] = {sizes[image * 2 + 1] - shrink, sizes[image * 2] - shrink};
    std::vector<Found> found;
    for (int l = 0; l < in.levels; ++l) {
      const int64_t width = in.level[l].width, locations = width * in.level[l].height;
      std::vector<Found> here;
      std::vector<float> best(static_cast<size_t>(locations), -std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < locations; ++i) {
        for (int64_t c = 0; c < in.classes; ++c) {
          const float x = cls[l].read(image, c, i / width, i % width);
          if (!(x > threshold)) continue;
          best[i] = std::max(best[i], x);
          here.push_back({x, l, i, c, {}});
        }
      }
      if (in.nms_pre > 0 && in.anchor_topk) {
        here.erase(std::remove_if(here.begin(), here.end(),
                                  [&](const Found& f) {
                                    int64_t before = 0;
                                    const float mine = best[f.location];
                                    for (int64_t i = 0; i < locations; ++i) {
                                      before += best[i] > mine || (best[i] == mine && i < f.location);
                                    }
                                    return before >= in.nms_pre;
                                  }),
                   here.end());
      }
      std::stable_sort(here.begin(), here.end(), [](const Found& a, const Found& b) { return a.value > b.value; });
      if (in.nms_pre > 0 && !in.anchor_topk && static_cast<int64_t>(here.size()) > in.nms_pre) here.resize(in.nms_pre);
      found.insert(found.end(), here.begin(), here.end());
    }
    std::stable_sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return a.value > b.value; });
    std::vector<Found> kept;
    for (Found& f : found) {
      const gfl::PostprocessLevel& level = in.level[f.level];
      const int64_t cell[2] = {f.location % level.width, f.location / level.width};
      for (int side = 0; side < 4; ++side) {
        const float s = static_cast<float>(level.stride);
        const float at = static_cast<float>(cell[side % 2]), offset = static_cast<float>(level.center_offset);
        const float centre = in.legacy ? at * s + (s - 1) / 2 : (at + offset) * s;
        double sum = 0, weighted = 0;
        for (int j = 0; j <= in.reg_max; ++j) {
          const double e = std::exp(double(reg[f.level].read(image, side * (in.reg_max + 1) + j, cell[1], cell[0])));
          sum += e;
          weighted += j * e;
        }
        const float distance = static_cast<float>(weighted / sum) * s;
        f.box[side] = std::min(std::max(side < 2 ? centre - distance : centre + distance, 0.0f), limit[side % 2]);
      }
      if (!(f.box[2] - f.box[0] > 0 && f.box[3] - f.box[1] > 0)) continue;
      bool suppressed = static_cast<int64_t>(kept.size()) >= in.max_detections;
      for (size_t i = 0; i < kept.size() && in.iou_threshold < 1 && !suppressed; ++i) {
        const Found& k = kept[i];
        suppressed |= k.label == f.label && iou(k.box, f.box, shrink) > static_cast<float>(in.iou_threshold);
      }
      if (!suppressed) kept.push_back(f);
    }
    std::vector<Detection> result;
    for (const Found& f : kept) {
      Detection d{
          {}, in.activated ? f.value : static_cast<float>(1 / (1 + std::exp(-double(f.value)))), f.label, f.location};
      for (int64_t l = 0; l < f.level; ++l) d.location += in.level[l].height * in.level[l].width;
      for (int side = 0; side < 4; ++side) {
        d.box[side] = f.box[side] / (factors.empty() ? 1.0f : factors[image * 2 + side % 2]);
      }
      result.push_back(d);
    }
    return result;
  }

  void check(const char* name) {
    std::vector<std::vector<T>> elements;
    for (auto* maps : {&cls, &reg}) {
      for (Map<T>& map : *maps) elements.push_back(gfl::testing::rounded<T>(map.values));
    }
    std::vector<Buffer<T>*> buffers;
    for (const auto& e : elements) buffers.push_back(new Buffer<T>(e));
    for (int l = 0; l < in.levels; ++l) {
      in.level[l].cls = buffers[l]->data();
      in.level[l].reg = buffers[in.levels + l]->data();
      std::copy(cls[l].strides, cls[l].strides + 4, in.level[l].cls_stride);
      std::copy(reg[l].strides, reg[l].strides + 4, in.level[l].reg_stride);
    }
    const Buffer<float> size_buffer(sizes), factor_buffer(factors);
    in.image_sizes = size_buffer.data();
    in.scale_factors = factors.empty() ? nullptr : factor_buffer.data();
    const size_t slots = static_cast<size_t>(in.batch * in.max_detections);
    Buffer<float> boxes(slots * 4), scores(slots);
    Buffer<int64_t> labels(slots), locations(slots);
    Buffer<int32_t> count(static_cast<size_t>(in.batch));
    const gfl::PostprocessOutput out{boxes.data(), scores.data(), labels.data(), count.data(), locations.data()};
#if defined(GFL_TEST_CUDA)
    Buffer<unsigned char> workspace(gfl::cuda::postprocess_workspace_bytes(in));
    CHECK_CUDA(gfl::cuda::postprocess(in, out, workspace.data(), nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
#else
    gfl::for_chunks(in.batch, 1, [&](int64_t begin, int64_t end) { gfl::cpu::postprocess(in, out, begin, end); });
#endif
    for (Buffer<T>* buffer : buffers) delete buffer;

    const auto got_boxes = boxes.read(), got_scores = scores.read();
    const auto got_labels = labels.read(), got_locations = locations.read();
    const auto got_count = count.read();
    for (int64_t b = 0; b < in.batch; ++b) {
      const std::vector<Detection> want = oracle(b);
      CHECK(got_count[b] == static_cast<int32_t>(want.size()), "%s image %d: %d boxes, not %d", name, int(b),
            got_count[b], int(want.size()));
      for (int64_t k = 0; k < in.max_detections; ++k) {
        const size_t slot = static_cast<size_t>(b * in.max_detections + k);
        const Detection w = k < static_cast<int64_t>(want.size()) ? want[k] : Detection{{}, 0, -1, -1};
        CHECK(got_labels[slot] == w.label, "%s image %d slot %d: label %d, not %d", name, int(b), int(k),
              int(got_labels[slot]), int(w.label));
        CHECK(got_locations[slot] == w.location, "%s image %d slot %d: location %d, not %d", name, int(b), int(k),
              int(got_locations[slot]), int(w.location));
        // One exponential, one sum and one division from the value in double; what is subnormal may come out as 0.
        CHECK(gfl::testing::close(got_scores[slot], w.score, 4e-7, 1e-37), "%s image %d slot %d: score %.9g, not %.9g",
              name, int(b), int(k), got_scores[slot], w.score);
        for (int side = 0; side < 4; ++side) {
          CHECK(gfl::testing::close(got_boxes[slot * 4 + side], w.box[side], 0, box_tolerance),
                "%s image %d slot %d side %d: %.9g, not %.9g", name, int(b), int(k), side, got_boxes[slot * 4 + side],
                w.box[side]);
        }
      }
    }
  }
};

template <class T> DType dtype_of() {
  if (std::is_same<T, double>::value) return DType::f64;
  if (std::is_same<T, gfl::half_t>::value) return DType::f16;
  if (std::is_same<T, gfl::bfloat16_t>::value) return DType::bf16;
  return DType::f32;
}

template <class T> void random_case(Generator& draw, const char* name) {
  Case<T> c;
  gfl::PostprocessInput& in = c.in;
  in.levels = static_cast<int>(draw.integer(0, 8) == 0 ? 8 : draw.integer(1, 4));
  in.cls_dtype = in.reg_dtype = dtype_of<T>();
  in.batch = draw.integer(1, 4);
  in.classes = draw.integer(1, 2) == 1 ? draw.integer(1, 90) : 1;
  in.reg_max = static_cast<int>(draw.integer(0, 16) == 0 ? 128 : draw.integer(1, 17));
  in.activated = draw.integer(0, 4) == 0;
  in.legacy = draw.integer(0, 3) == 0;
  in.anchor_topk = draw.integer(0, 2) == 0;
  in.nms_pre = draw.integer(0, 4) == 0 ? -1 : draw.integer(1, 60);
  in.score_threshold = draw.integer(0, 8) == 0 ? 0.0 : draw.uniform(0.05, 0.9);
  in.iou_threshold = draw.uniform(0.1, 0.9);
  in.max_detections = draw.integer(1, 40);
  for (int l = 0; l < in.levels; ++l) {
    const int64_t height = draw.integer(0, 8), width = draw.integer(1, 12);
    in.level[l].height = height;
    in.level[l].width = width;
    in.level[l].stride = 8 << l;
    in.level[l].center_offset = draw.integer(0, 3) * 0.5;
    c.cls.emplace_back(in.batch, in.classes, height, width, static_cast<Layout>(draw.integer(0, 4)));
    c.reg.emplace_back(in.batch, 4 * (in.reg_max + 1), height, width, static_cast<Layout>(draw.integer(0, 4)));
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) {
          for (int64_t k = 0; k < in.classes; ++k) {
            // Coarse values, so that ties are many; some special ones.
            double value = std::round(draw.normal(3) * 4) / 4;
            if (draw.integer(0, 40) == 0) value = std::numeric_limits<double>::quiet_NaN();
            if (draw.integer(0, 40) == 0) value = draw.integer(0, 2) * 2e9 - 1e9;
            c.cls[l].at(b, k, y, x) = in.activated ? 1 / (1 + std::exp(-value)) : value;
          }
          // Half of the mass in each of two bins: the softmax is exact, and so is every box.
          for (int64_t k = 0; k < 4 * (in.reg_max + 1); ++k) c.reg[l].at(b, k, y, x) = -200;
          for (int side = 0; side < 8; ++side) {
            c.reg[l].at(b, side / 2 * (in.reg_max + 1) + draw.integer(0, in.reg_max + 1), y, x) = 0;
          }
        }
      }
    }
  }
  for (int64_t b = 0; b < in.batch; ++b) {
    c.sizes.push_back(static_cast<float>(draw.integer(20, 90)));
    c.sizes.push_back(static_cast<float>(draw.integer(20, 90)));
    if (draw.integer(0, 2) == 1 || !c.factors.empty() || b > 0) continue;
    for (int64_t i = 0; i < in.batch * 2; ++i) c.factors.push_back(static_cast<float>(draw.uniform(0.5, 2)));
  }
  c.check(name);
}

// As PTX every instruction takes long: not for tens of thousands of boxes in one image.
#if defined(GFL_TEST_PTX)
constexpr int64_t kMostKept = 200;
#else
constexpr int64_t kMostKept = 65536;
#endif

// All 65536 bit patterns of a 16-bit type as scores: exactly those above the threshold come out, in order.
template <class T> void every_pattern(double score_threshold, const char* name) {
  Case<T> c;
  gfl::PostprocessInput& in = c.in;
  in.levels = 1;
  in.cls_dtype = in.reg_dtype = dtype_of<T>();
  in.batch = 1;
  in.classes = 256;
  in.reg_max = 1;
  in.score_threshold = score_threshold;
  in.iou_threshold = 1;
  in.max_detections = kMostKept;
  in.level[0].height = in.level[0].width = 16;
  in.level[0].stride = 8;
  c.cls.emplace_back(1, 256, 16, 16, kNchw);
  c.reg.emplace_back(1, 8, 16, 16, kNchw);
  c.sizes = {1000, 1000};
  std::fill(c.reg[0].values.begin(), c.reg[0].values.end(), 0.0);
  for (int pattern = 0; pattern < 65536; ++pattern) {
    const uint16_t bits = static_cast<uint16_t>(pattern);
    T element;
    std::memcpy(&element, &bits, 2);
    c.cls[0].at(0, pattern / 256, pattern % 256 / 16, pattern % 16) = gfl::load(&element);
  }
  c.check(name);
}

// More candidates in a level than any kernel sets room aside for, and more than it sorts at a time.
template <class T = float>
void crowd(Generator& draw, int64_t classes, int64_t nms_pre, bool anchor_topk, Layout layout, const char* name,
           int64_t height = 8, int64_t width = 10) {
  Case<T> c;
  gfl::PostprocessInput& in = c.in;
  in.levels = 2;
  in.cls_dtype = in.reg_dtype = dtype_of<T>();
  in.batch = 2;
  in.classes = classes;
  in.reg_max = 3;
  in.nms_pre = nms_pre;
  in.anchor_topk = anchor_topk;
  in.iou_threshold = 0.3;
  in.max_detections = 300;
  c.sizes = {90, 120, 100, 80};
  for (int l = 0; l < in.levels; ++l) {
    in.level[l].height = l == 0 ? height : 2;
    in.level[l].width = l == 0 ? width : 3;
    in.level[l].stride = 8 << l;
    c.cls.emplace_back(in.batch, classes, in.level[l].height, in.level[l].width, layout);
    c.reg.emplace_back(in.batch, 16, in.level[l].height, in.level[l].width, layout);
    for (double& v : c.cls[l].values) v = std::round(draw.normal(3) * 64) / 64;
    // One bin holds everything: the softmax is exact.
    for (int64_t b = 0; b < in.batch; ++b) {
      for (int64_t y = 0; y < in.level[l].height; ++y) {
        for (int64_t x = 0; x < in.level[l].width; ++x) {
          for (int64_t k = 0; k < 16; ++k) c.reg[l].at(b, k, y, x) = -200;
          for (int side = 0; side < 4; ++side) c.reg[l].at(b, side * 4 + draw.integer(0, 4), y, x) = 0;
        }
      }
    }
  }
  c.check(name);
}

// Smooth distributions, far from the ends and at them, all of them kept.
template <class T> void smooth(Generator& draw, const char* name, int64_t max_detections = 24) {
  Case<T> c;
  gfl::PostprocessInput& in = c.in;
  in.levels = 1;
  in.cls_dtype = in.reg_dtype = dtype_of<T>();
  in.batch = in.classes = 1;
  in.reg_max = static_cast<int>(draw.integer(1, 129));
  in.iou_threshold = 1;
  in.max_detections = max_detections;
  in.level[0].height = 4;
  in.level[0].width = 5;
  in.level[0].stride = 8;
  c.cls.emplace_back(1, 1, 4, 5, kNchw);
  c.reg.emplace_back(1, 4 * (in.reg_max + 1), 4, 5, static_cast<Layout>(draw.integer(0, 4)));
  c.sizes = {1e9f, 1e9f};
  for (int64_t i = 0; i < 20; ++i) {
    c.cls[0].at(0, 0, i / 5, i % 5) = static_cast<double>(i) / 8;
    const double scale = draw.uniform(0, 6);
    for (int64_t k = 0; k < 4 * (in.reg_max + 1); ++k) c.reg[0].at(0, k, i / 5, i % 5) = draw.normal(scale);
  }
  c.box_tolerance = 2e-3;  // distances up to 1024 pixels, good to a few ulp
  c.check(name);
}

void ranks() {
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> rising = {-infinity, -3e38f, -1.5f, -1e-40f, 0.0f, 1e-45f, 0.5f, 1.0f, 3e38f, infinity};
  for (size_t i = 0; i < rising.size(); ++i) {
    CHECK(gfl::value_of(gfl::rank_of(rising[i])) == rising[i], "%g", rising[i]);
    CHECK(gfl::rank_of(rising[i]) > 0, "%g", rising[i]);
    if (i > 0) CHECK(gfl::rank_of(rising[i - 1]) < gfl::rank_of(rising[i]), "%g %g", rising[i - 1], rising[i]);
  }
  CHECK(gfl::rank_of(-0.0f) == gfl::rank_of(0.0f), "the two zeros");
  CHECK(gfl::ranking_key(7, 3) > gfl::ranking_key(7, 4), "lower index first");
  CHECK(gfl::index_in(gfl::ranking_key(7, 0xffffffffu)) == 0xffffffffu, "last index");
  CHECK(gfl::ranking_threshold(0, false) == -infinity && gfl::ranking_threshold(1, false) == infinity, "bounds");
  const float logit = gfl::ranking_threshold(0.05, false);
  CHECK(logit == -2.94443898f, "logit of 0.05: %.9g", logit);
}

#if defined(GFL_TEST_CUDA)
// On the host layer a barrier takes long.
constexpr int kRandomCases = 24;
const std::vector<double> kThresholds = {0.0, 0.5, 1.0};
#else
constexpr int kRandomCases = 60;
const std::vector<double> kThresholds = {0.0, 1e-9, 0.05, 0.5, 0.9, 1.0};
#endif

}  // namespace

int main() {
  ranks();
  Generator draw(20260);
  for (int i = 0; i < kRandomCases; ++i) {
    random_case<float>(draw, "fp32");
    random_case<gfl::half_t>(draw, "fp16");
    random_case<gfl::bfloat16_t>(draw, "bf16");
    random_case<double>(draw, "fp64");
  }
  for (int i = 0; i < kRandomCases / 6; ++i) {
    smooth<float>(draw, "smooth");
    smooth<gfl::bfloat16_t>(draw, "smooth, bf16");
    smooth<double>(draw, "smooth, fp64");
  }
  for (const int64_t nms_pre : {-1, 300, 17000}) {
    crowd(draw, 250, nms_pre, false, kNchw, "crowd");
    crowd(draw, 256, nms_pre, false, kNhwc, "crowd, channels last");
    crowd(draw, 256, nms_pre / 300, true, kNchw, "crowd, by location");
  }
  crowd(draw, 1203, 1000, false, kNchw, "1203 classes");
  for (const bool anchor_topk : {false, true}) {
    const int64_t nms_pre = anchor_topk ? 57 : 300;
    crowd(draw, 1, nms_pre, anchor_topk, kNchw, "many locations", 70, 80);
    for (const Layout layout : {kNchw, kNhwc}) {
      crowd<gfl::half_t>(draw, 256, nms_pre, anchor_topk, layout, "crowd, fp16");
      crowd<gfl::bfloat16_t>(draw, 256, nms_pre, anchor_topk, layout, "crowd, bf16");
    }
    crowd<double>(draw, 250, nms_pre, anchor_topk, kNchw, "crowd, fp64");
  }
  smooth<float>(draw, "many empty slots", 9000);
  for (const double threshold : kThresholds) {
    every_pattern<gfl::half_t>(threshold, "every fp16");
    every_pattern<gfl::bfloat16_t>(threshold, "every bf16");
  }
  return gfl::testing::result("postprocess");
}
