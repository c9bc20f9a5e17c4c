// SPDX-License-Identifier: Apache-2.0
// The losses of heads against plain loops in double, and their gradients against differences of those.
#include "gfl/head.h"

#include <limits>
#include <memory>

#include "gfl_loss_oracle.h"
#include "terms/gfl_loss.h"
#include "testing.h"

namespace {

using namespace gfl;
using gfl::testing::Buffer;
using gfl::testing::close;
using gfl::testing::Generator;
using gfl::testing::rounded;
using namespace gfl::testing::head;

// The launchers' losses before any norm; their gradients are in the maps that `gradients` names.
struct Got {
  Losses losses;
  int64_t positives;
  double weight;
};

// The launchers on the device under test.
#if defined(GFL_TEST_CUDA)
struct Launch {
  const HeadLossInput& in;
  Buffer<unsigned char> workspace;
  Buffer<HeadScales> scratch;
  explicit Launch(const HeadLossInput& input) : in(input), workspace(cuda::gfl_loss_workspace_bytes(in)), scratch(1) {}
  void forward(const HeadLossScalars& scalars, const HeadLossOutput& out) {
    CHECK_CUDA(cuda::gfl_loss_forward(in, scalars, workspace.data(), out, nullptr));
  }
  void both(const HeadLossScalars& scalars, const HeadLossOutput& out, HeadScales* scales,
            const HeadGradients* gradients) {
    CHECK_CUDA(cuda::gfl_loss_forward_and_gradient(in, scalars, workspace.data(), out, scales, gradients, nullptr));
  }
  void finish(const HeadScales* scales, const HeadLossGrads& grads, const HeadGradients* gradients) {
    CHECK_CUDA(cuda::gfl_loss_finish(in, scales, grads, gradients, nullptr));
  }
  void backward(const HeadLossScalars& scalars, const HeadLossGrads& grads, const HeadGradients* gradients) {
    CHECK_CUDA(cuda::gfl_loss_backward(in, scalars, grads, workspace.data(), scratch.data(), gradients, nullptr));
  }
  void norms(const HeadNorms& out) { CHECK_CUDA(cuda::head_loss_norms(in, workspace.data(), out, nullptr)); }
};
#else
struct Launch {
  const HeadLossInput& in;
  const ParallelFor parallel = [](int64_t count, int64_t chunk, const auto& body) { for_chunks(count, chunk, body); };
  explicit Launch(const HeadLossInput& input) : in(input) {}
  void forward(const HeadLossScalars& scalars, const HeadLossOutput& out) {
    cpu::gfl_loss_forward(in, scalars, out, parallel);
  }
  void both(const HeadLossScalars& scalars, const HeadLossOutput& out, HeadScales* scales,
            const HeadGradients* gradients) {
    cpu::gfl_loss_forward_and_gradient(in, scalars, out, scales, gradients, parallel);
  }
  void finish(const HeadScales* scales, const HeadLossGrads& grads, const HeadGradients* gradients) {
    cpu::gfl_loss_finish(in, scales, grads, gradients, parallel);
  }
  void backward(const HeadLossScalars& scalars, const HeadLossGrads& grads, const HeadGradients* gradients) {
    cpu::gfl_loss_backward(in, scalars, grads, gradients, parallel);
  }
  void norms(const HeadNorms& out) { cpu::head_loss_norms(in, out, parallel); }
};
#endif

template <class T> struct DeviceMaps {
  std::vector<std::unique_ptr<Buffer<T>>> maps;
  T* add(const std::vector<T>& values) {
    maps.push_back(std::make_unique<Buffer<T>>(values));
    return maps.back()->data();
  }
};

// Losses and gradients from one pass are those of two, and stay untouched if 1 arrives; otherwise they are computed
// anew in place. `of_cls`, `of_reg`: memory that `gradients` points into. `sums`: the losses before weights and norms.
template <class T, class R>
void check_one_pass(const HeadLossInput& in, const HeadScales& weights, const std::vector<HeadLevel>& levels,
                    const std::vector<HeadGradients>& gradients, const DeviceMaps<T>& of_cls,
                    const DeviceMaps<R>& of_reg, const std::vector<acc_t<T>>& sums, const char* name) {
  using A = acc_t<T>;
  const Buffer<A> one(std::vector<A>{1});
  const HeadLossScalars scalars{{weights.cls, weights.box, weights.dfl}, one.data(), nullptr};
  Launch launch(in);
  Buffer<HeadScales> scales(1);
  Buffer<A> losses(5);
  const HeadLossOutput out{losses.data(), losses.data() + 1, losses.data() + 2, losses.data() + 3, losses.data() + 4};
  using Bytes = std::vector<std::vector<unsigned char>>;
  const auto read = [&] {
    Bytes maps;
    const auto add = [&](const auto& map) {
      const auto values = map->read();
      const auto* raw = reinterpret_cast<const unsigned char*>(values.data());
      maps.emplace_back(raw, raw + values.size() * sizeof values[0]);
    };
    for (size_t l = 0; l < levels.size(); ++l) {
      add(of_cls.maps[l]);
      add(of_reg.maps[l]);
    }
    return maps;
  };
  const auto same = [&](const Bytes& got, const Bytes& want, const char* what) {
    for (size_t m = 0; m < want.size(); ++m) CHECK(got[m] == want[m], "%s, map %zu: %s", name, m, what);
  };
  const auto computed = [&](const std::vector<double>& arriving) {
    const Buffer<A> grads(rounded<A>(arriving));
    const HeadLossGrads of_losses{grads.data(), grads.data() + 1, grads.data() + 2};
    launch.backward(scalars, of_losses, gradients.data());
    return read();
  };
  const auto finished = [&](const std::vector<double>& arriving) {
    const Buffer<A> grads(rounded<A>(arriving));
    const HeadLossGrads of_losses{grads.data(), grads.data() + 1, grads.data() + 2};
    launch.finish(scales.data(), of_losses, gradients.data());
    return read();
  };
  const Bytes want = computed({1, 1, 1}), scaled = computed({-2, 0, 0.75});
  launch.both(scalars, out, scales.data(), gradients.data());
  same(read(), want, "the gradient computed in forward differs");
  const std::vector<A> got = losses.read();
  const double norm = std::max(static_cast<double>(sums[4]), 1.0);
  for (int i = 0; i < 3; ++i) {
    const double weight = i == 0 ? weights.cls : (i == 1 ? weights.box : weights.dfl) / norm;
    CHECK(close(got[i], weight * static_cast<double>(sums[i]), 1e-6, 1e-30), "%s: loss %d with the gradient", name, i);
  }
  CHECK(got[3] == sums[3] && got[4] == sums[4], "%s: counts with the gradient", name);
  same(finished({-2, 0, 0.75}), scaled, "not rescaled by what arrives");
  same(finished({1, 1, 1}), scaled, "written although 1 arrives");  // the maps still hold those of before
  same(finished({1, 1, 1.5}), computed({1, 1, 1.5}), "not rescaled by one of three");
}

template <class T, class R>
Got run(HeadLossInput in, const std::vector<acc_t<T>>& boxes, const std::vector<acc_t<T>>& scores,
        const HeadScales& scales, std::vector<HeadLevel> levels, std::vector<HeadGradients> gradients,
        const std::vector<Map<T>>& cls, const std::vector<Map<R>>& reg, std::vector<Map<T>>& grad_cls,
        std::vector<Map<R>>& grad_reg, const char* name) {
  using A = acc_t<T>;
  DeviceMaps<T> inputs, cls_out;
  DeviceMaps<R> distributions, reg_out;
  for (size_t l = 0; l < levels.size(); ++l) {
    levels[l].cls = inputs.add(cls[l].data);
    levels[l].reg = distributions.add(reg[l].data);
    // NaN, so that an element that is not written shows.
    gradients[l].cls = cls_out.add(std::vector<T>(grad_cls[l].data.size(), rounded<T>({NAN})[0]));
    gradients[l].reg = reg_out.add(std::vector<R>(grad_reg[l].data.size(), rounded<R>({NAN})[0]));
  }
  const size_t locations = static_cast<size_t>(in.images * in.locations);
  const Buffer<int64_t> labels(std::vector<int64_t>(in.labels, in.labels + locations));
  const Buffer<int64_t> matched(std::vector<int64_t>(in.matched, in.matched + locations));
  const Buffer<A> device_boxes(boxes), device_scores(scores), one(std::vector<A>{1});
  const Buffer<A> grads(
      std::vector<A>{static_cast<A>(scales.cls), static_cast<A>(scales.box), static_cast<A>(scales.dfl)});
  in.levels = levels.data();
  in.labels = labels.data();
  in.matched = matched.data();
  in.gt_boxes = device_boxes.data();
  in.scores = device_scores.data();
  const bool scored = in.kind != HeadLossKind::gfl;
  Launch launch(in);
  Buffer<A> out(5), again(5);
  const auto output = [](Buffer<A>& to) {
    return HeadLossOutput{to.data(), to.data() + 1, to.data() + 2, to.data() + 3, to.data() + 4};
  };
  const HeadLossScalars plain{{1, 1, 1}, one.data(), one.data()}, normed{{0.5, 2, 0.25}, nullptr, nullptr};
  launch.forward(plain, output(out));
  launch.forward(normed, output(again));
  const HeadLossGrads grad_losses{grads.data(), grads.data() + 1, grads.data() + 2};
  launch.backward(plain, grad_losses, gradients.data());
  for (size_t l = 0; l < levels.size(); ++l) {
    grad_cls[l].data = cls_out.maps[l]->read();
    grad_reg[l].data = reg_out.maps[l]->read();
  }
  // The default norms scale losses and gradients.
  const std::vector<A> sums = out.read(), losses = again.read();
  double norm = 0;
  for (int64_t b = 0; b < in.images; ++b) {
    int64_t positives = 0;
    const std::vector<int64_t> all = labels.read();
    for (int64_t i = b * in.locations; i < (b + 1) * in.locations; ++i) {
      positives += all[static_cast<size_t>(i)] >= 0 && all[static_cast<size_t>(i)] < in.classes;
    }
    norm += static_cast<double>(std::max<int64_t>(positives, 1));
  }
  const double weight = std::max(static_cast<double>(sums[4]), 1.0);
  if (scored) norm = weight;
  CHECK(close(losses[0], 0.5 * sums[0] / norm, 1e-6, 0), "%s: cls %g of %g", name, double(losses[0]), double(sums[0]));
  CHECK(close(losses[1], 2 * sums[1] / weight, 1e-6, 0), "%s: box %g of %g", name, double(losses[1]), double(sums[1]));
  CHECK(close(losses[2], 0.25 * sums[2] / weight, 1e-6, 0), "%s: dfl %g of %g", name, double(losses[2]),
        double(sums[2]));
  CHECK(losses[3] == sums[3] && losses[4] == sums[4], "%s: the norms depend on the norms", name);
  // The norms alone, without distributions and boxes.
  for (HeadLevel& level : levels) level.reg = nullptr;
  HeadLossInput classes_only = in;
  classes_only.gt_boxes = nullptr;
  classes_only.gts = std::numeric_limits<int64_t>::max();
  if (!scored) {
    Buffer<A> norms(2);
    Launch(classes_only).norms({norms.data(), norms.data() + 1});
    CHECK(norms.read()[0] == static_cast<A>(norm), "%s: a norm of %g, not %g", name, double(norms.read()[0]), norm);
    CHECK(norms.read()[1] == sums[4], "%s: weights of %g alone, not %g", name, double(norms.read()[1]),
          double(sums[4]));
  }
  for (size_t l = 0; l < levels.size(); ++l) levels[l].reg = distributions.maps[l]->data();
  std::vector<HeadGradients> alone = gradients;
  for (HeadGradients& g : alone) g.cls = nullptr;
  const HeadLossScalars scaled{{1, weight, weight}, one.data(), nullptr};
  launch.backward(scaled, grad_losses, alone.data());
  for (size_t l = 0; l < levels.size(); ++l) {
    const std::vector<R> repeated = reg_out.maps[l]->read();
    for (size_t i = 0; i < repeated.size(); ++i) {
      const double first = static_cast<double>(load(&grad_reg[l].data[i])),
                   second = static_cast<double>(load(&repeated[i]));
      CHECK(close(second, first, 1e-2, 1e-6), "%s: gradient %g, alone %g", name, first, second);
    }
  }
  check_one_pass<T, R>(in, scales, levels, gradients, cls_out, reg_out, sums, name);
  return {{double(sums[0]), double(sums[1]), double(sums[2])}, static_cast<int64_t>(sums[3]), double(sums[4])};
}

// The gradients' maps have the layout of the others, or the other one if `turned`; all have `gap` unused columns.
// R: the dtype of the distributions.
template <class T, class R = T>
void check(Case c, DType dtype, double tolerance, const char* name, bool turned = true, int64_t gap = 0,
           DType reg_dtype = DType::f64) {
  using A = acc_t<T>;
  if (std::is_same_v<T, R>) reg_dtype = dtype;
  std::vector<Map<T>> cls, grad_cls;
  std::vector<Map<R>> reg, grad_reg;
  std::vector<HeadLevel> levels;
  std::vector<HeadGradients> gradients;
  const int64_t sides = 4 * (c.reg_max + 1);
  for (size_t l = 0; l < c.sizes.size(); ++l) {
    const auto [h, w] = c.sizes[l];
    cls.emplace_back(c.cls[l], c.images, c.classes, h, w, c.channels_last, gap);
    reg.emplace_back(c.reg[l], c.images, sides, h, w, c.channels_last, gap);
    grad_cls.emplace_back(std::vector<double>(c.cls[l].size(), NAN), c.images, c.classes, h, w,
                          c.channels_last != turned, gap);
    grad_reg.emplace_back(std::vector<double>(c.reg[l].size(), 0), c.images, sides, h, w, c.channels_last, gap);
    c.cls[l] = cls[l].held(c.images, c.classes, h, w);
    c.reg[l] = reg[l].held(c.images, sides, h, w);
  }
  for (size_t l = 0; l < c.sizes.size(); ++l) {
    const auto [h, w] = c.sizes[l];
    levels.push_back({cls[l].data.data(), reg[l].data.data(), h, w, {}, {}, c.stride(l), c.offset()});
    gradients.push_back({grad_cls[l].data.data(), grad_reg[l].data.data(), {}, {}});
    std::copy_n(cls[l].stride, 4, levels[l].cls_stride);
    std::copy_n(reg[l].stride, 4, levels[l].reg_stride);
    std::copy_n(grad_cls[l].stride, 4, gradients[l].cls_stride);
    std::copy_n(grad_reg[l].stride, 4, gradients[l].reg_stride);
  }
  std::vector<A> boxes;
  for (double& v : c.boxes) boxes.push_back(static_cast<A>(v)), v = static_cast<double>(boxes.back());
  const std::vector<A> scores = rounded<A>(c.scores);
  for (size_t i = 0; i < scores.size(); ++i) c.scores[i] = static_cast<double>(scores[i]);
  const HeadLossInput in{levels.data(),
                         static_cast<int64_t>(levels.size()),
                         dtype,
                         reg_dtype,
                         c.images,
                         c.classes,
                         c.reg_max,
                         c.locations(),
                         c.labels.data(),
                         c.matched.data(),
                         boxes.data(),
                         c.gts,
                         c.beta,
                         c.legacy,
                         c.kind,
                         nullptr,
                         static_cast<double>(c.sizes[0].first) * c.stride(0),
                         static_cast<double>(c.sizes[0].second) * c.stride(0)};

  const HeadScales scales{0.7, -1.3, 2.1};
  const Got got = run<T, R>(in, boxes, scores, scales, levels, gradients, cls, reg, grad_cls, grad_reg, name);
  std::vector<HeadTerms> frozen;
  const Losses want = by_loops(c, frozen);
  double weight = 0;
  for (const HeadTerms& t : frozen) weight += t.weight;
  CHECK(static_cast<int64_t>(frozen.size()) == got.positives, "%s: %lld positives, not %zu", name,
        static_cast<long long>(got.positives), frozen.size());
  CHECK(close(got.losses.cls, want.cls, tolerance, 0), "%s: cls %.9g, not %.9g", name, got.losses.cls, want.cls);
  CHECK(close(got.losses.box, want.box, tolerance, 0), "%s: box %.9g, not %.9g", name, got.losses.box, want.box);
  CHECK(close(got.losses.dfl, want.dfl, tolerance, 0), "%s: dfl %.9g, not %.9g", name, got.losses.dfl, want.dfl);
  CHECK(close(got.weight, weight, tolerance, 0), "%s: weights of %.9g, not %.9g", name, got.weight, weight);
  std::vector<HeadPositive> positives;
  int64_t location = 0;
  for (int64_t b = 0; b < c.images; ++b) {
    for (size_t l = 0; l < c.sizes.size(); ++l) {
      const int64_t width = c.sizes[l].second;
      for (int64_t i = 0; i < c.sizes[l].first * width; ++i, ++location) {
        const int64_t label = in.labels[location], slot = in.matched[location];
        if (!is_positive(in, label, slot)) continue;
        positives.push_back({b, static_cast<int64_t>(l), i / width, i % width, location, label, slot});
      }
    }
  }

  // Every element has been written, and those that are looked at are right.
  const auto written = [&](const std::vector<double>& values) {
    for (const double v : values) CHECK(v == v, "%s: an element of the gradient was not written", name);
  };
  for (size_t l = 0; l < c.sizes.size(); ++l) {
    const auto [h, w] = c.sizes[l];
    written(grad_cls[l].held(c.images, c.classes, h, w));
    written(grad_reg[l].held(c.images, sides, h, w));
  }
  Generator pick(7);
  const auto difference = [&](double& value) {
    const double kept = value, step = 1e-5;
    value = kept + step;
    const Losses up = by_loops(c, frozen);
    value = kept - step;
    const Losses down = by_loops(c, frozen);
    value = kept;
    const Losses change{up.cls - down.cls, up.box - down.box, up.dfl - down.dfl};
    return (scales.cls * change.cls + scales.box * change.box + scales.dfl * change.dfl) / 2 / step;
  };
  const auto look = [&](const HeadPositive& p, bool distribution, int64_t channel) {
    const size_t l = static_cast<size_t>(p.level);
    const auto [h, w] = c.sizes[l];
    std::vector<double>& values = distribution ? c.reg[l] : c.cls[l];
    const int64_t channels = distribution ? sides : c.classes;
    const int64_t plane = p.image * channels + channel;
    const double slope = difference(values[static_cast<size_t>((plane * h + p.row) * w + p.column)]);
    const auto in_map = [&](const auto& map) {
      return static_cast<double>(load(&map.data[map.at(p.image, channel, p.row, p.column)]));
    };
    const double found = distribution ? in_map(grad_reg[l]) : in_map(grad_cls[l]);
    CHECK(close(found, slope, 10 * tolerance, 1e-6), "%s: %s gradient of channel %lld is %.9g, not %.9g", name,
          distribution ? "distribution" : "class", static_cast<long long>(channel), found, slope);
  };
  for (const HeadPositive& p : positives) {
    if (pick.integer(0, 4) == 0) look(p, true, pick.integer(0, sides));
    if (pick.integer(0, 4) == 0) look(p, false, pick.integer(0, 2) == 0 ? p.label : pick.integer(0, c.classes));
  }
  for (int i = 0; i < 12; ++i) {  // anywhere, most of it background
    const int64_t l = pick.integer(0, static_cast<int64_t>(c.sizes.size()));
    const auto [h, w] = c.sizes[static_cast<size_t>(l)];
    if (h * w == 0) continue;
    const HeadPositive p{pick.integer(0, c.images), l, pick.integer(0, h), pick.integer(0, w), 0, 0, 0};
    look(p, false, pick.integer(0, c.classes));
    look(p, true, pick.integer(0, sides));
  }
}

void check_every_dtype(const Case& c) {  // half types round a gradient to 2^-11 and 2^-8
  check<double>(c, DType::f64, 1e-7, "f64");
  check<float>(c, DType::f32, 1e-5, "f32");
  check<half_t>(c, DType::f16, 1e-4, "f16");
  check<bfloat16_t>(c, DType::bf16, 1e-3, "bf16");
}

}  // namespace

int main() {
  Generator draw(4);
  for (const bool channels_last : {false, true}) {
    for (const bool legacy : {false, true}) {
      const double beta = channels_last == legacy ? 2.0 : 1.5;
      const int64_t classes = channels_last ? 7 : 131;
      const Case c = draw_case(draw, {{9, 8}, {3, 5}, {1, 1}}, classes, 16, beta, legacy, channels_last);
      check_every_dtype(c);
    }
  }
  check<float>(draw_case(draw, {{1, 70}}, 1, 1, 2.0, false, true), DType::f32, 1e-5, "one class");
  check<float>(draw_case(draw, {{13, 21}, {1, 1}, {0, 4}}, 3, 7, 2.0, false, false), DType::f32, 1e-5, "over a block");
  for (const bool channels_last : {false, true}) {  // shapes that allow vector accesses
    const Case c = draw_case(draw, {{12, 16}, {4, 6}, {2, 3}}, 16, 7, 2.0, false, channels_last);
    check<float>(c, DType::f32, 1e-5, "aligned f32", false);
    check<bfloat16_t>(c, DType::bf16, 1e-3, "aligned bf16", false);
    // As many classes as a thread has accesses in flight.
    for (const Case& wide : {draw_case(draw, {{16, 16}}, 72, 3, 2.0, false, channels_last),
                             draw_scored(draw, HeadLossKind::yolo, {{16, 16}}, 72, 4, channels_last),
                             draw_scored(draw, HeadLossKind::rtmdet, {{16, 16}}, 72, 1, channels_last)}) {
      check<float>(wide, DType::f32, 1e-5, "many classes f32", false);
      check<half_t>(wide, DType::f16, 1e-4, "many classes f16", false);
      check<bfloat16_t>(wide, DType::bf16, 1e-3, "many classes bf16", false);
    }
    constexpr HeadLossKind yolo = HeadLossKind::yolo, rtmdet = HeadLossKind::rtmdet;
    for (const auto& [kind, bins, beta] : {std::tuple{yolo, 16, 2.0}, std::tuple{yolo, 1, 2.0},
                                           std::tuple{rtmdet, 1, 2.0}, std::tuple{rtmdet, 1, 1.5}}) {
      const int64_t classes = channels_last ? 7 : 131;
      const Case c = draw_scored(draw, kind, {{9, 8}, {3, 5}, {1, 1}}, classes, bins, channels_last, beta);
      check_every_dtype(c);
    }
    const Case aligned = draw_scored(draw, yolo, {{12, 16}, {4, 6}, {2, 3}}, 16, 8, channels_last);
    check<float>(aligned, DType::f32, 1e-5, "aligned YOLO f32", false);
    check<bfloat16_t>(aligned, DType::bf16, 1e-3, "aligned YOLO bf16", false);
  }
  const auto check_apart = [gap = 4](const Case& c) {  // maps with a gap, distributions of another dtype
    check<float, half_t>(c, DType::f32, 1e-4, "f32, f16", false, gap, DType::f16);
    check<float, bfloat16_t>(c, DType::f32, 1e-3, "f32, bf16", false, gap, DType::bf16);
    check<half_t, bfloat16_t>(c, DType::f16, 1e-3, "f16, bf16", true, gap, DType::bf16);
    check<half_t, float>(c, DType::f16, 1e-4, "f16, f32", false, gap, DType::f32);
    check<bfloat16_t, half_t>(c, DType::bf16, 1e-3, "bf16, f16", true, gap, DType::f16);
    check<bfloat16_t, float>(c, DType::bf16, 1e-3, "bf16, f32", false, gap, DType::f32);
    check<double>(c, DType::f64, 1e-7, "f64 with a gap", false, gap);
  };
  for (const bool channels_last : {false, true}) {
    check_apart(draw_case(draw, {{5, 12}, {3, 8}}, 8, 7, 2.0, false, channels_last));
    check_apart(draw_case(draw, {{5, 12}, {3, 8}}, 8, 7, 1.5, false, channels_last));
    check_apart(draw_scored(draw, HeadLossKind::yolo, {{5, 12}, {3, 8}}, 8, 8, channels_last));
    check_apart(draw_scored(draw, HeadLossKind::rtmdet, {{5, 12}, {3, 8}}, 8, 1, channels_last));
    check_apart(draw_scored(draw, HeadLossKind::rtmdet, {{5, 12}, {3, 8}}, 8, 1, channels_last, 1.5));
  }
  // Logits where exponentials and powers are subnormal in double.
  for (Case far : {draw_case(draw, {{5, 7}}, 5, 3, 1.5, false, false),
                   draw_scored(draw, HeadLossKind::rtmdet, {{5, 7}}, 5, 1, false, 1.5)}) {
    for (size_t i = 0; i < far.cls[0].size(); i += 3) far.cls[0][i] = i == 9 ? 720 : i % 2 == 0 ? -720 : -460;
    check<double>(far, DType::f64, 1e-7, "far from 0, f64");
    check<float>(far, DType::f32, 1e-5, "far from 0, f32");
  }
  // More tiles than four turns of a warp over their sums.
  const Case tiles = draw_case(draw, {{97, 127}}, 1, 1, 2.0, false, false, 1, 0.002);
  check<float>(tiles, DType::f32, 1e-5, "many tiles f32");
  check<double>(tiles, DType::f64, 1e-7, "many tiles f64");
  return gfl::testing::result("gfl_loss");
}
