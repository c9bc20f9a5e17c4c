// SPDX-License-Identifier: Apache-2.0
// Losses of scores down to one number against their formulas as a loop in long double, the gradient against differences;
// and what a backward pass leaves alone and what it writes anew.
#include "gfl/score_loss.h"

#include <string>

#include "element_loss.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

enum class Layout { rows, padded, planar, sliced };  // class innermost, with a gap a row, location innermost, every second

struct Case {
  std::string name;
  int64_t images, locations, classes;
  ScoreLoss kind = ScoreLoss::quality;
  bool sparse = true, weighted = false, normed = true, activated = false;
  double exponent = 2;
  Layout layout = Layout::rows;
  bool turned = false;  // gradient and dense targets lie location innermost where the scores do not, and the other way round
};

long double term(const Case& c, double alpha, long double x, long double t) {
  const Bce b = bce(x, t, c.activated);
  const long double gamma = c.exponent, p = b.p;
  if (c.kind == ScoreLoss::quality) return std::pow(std::fabs(t - p), gamma) * b.value;
  if (c.kind == ScoreLoss::focal) {
    const long double balance = alpha * t + (1 - alpha) * (1 - t), miss = (1 - p) * t + p * (1 - t);
    return balance * std::pow(miss, gamma) * b.value;
  }
  if (t > 0) return (c.kind == ScoreLoss::varifocal ? t : 1) * b.value;
  return alpha * std::pow(std::fabs(p - t), gamma) * b.value;
}

void strides_of(const Case& c, bool turned, int64_t (&stride)[3], int64_t& size) {
  const int64_t gap = c.layout == Layout::padded ? 3 : 0, by = c.layout == Layout::sliced ? 2 : 1;
  const bool planar = (c.layout == Layout::planar) != turned;
  stride[1] = planar ? c.locations : by;
  stride[2] = planar ? 1 : by * (c.classes + gap);
  stride[0] = by * (c.classes + gap) * c.locations;
  size = stride[0] * c.images;
}

template <class T> void check(const Case& c, DType dtype, double epsilon, Generator& draw) {
  using A = acc_t<T>;
#if !defined(GFL_TEST_CUDA)
  // The CPU's launcher takes one image with classes innermost in target and gradient.
  if (c.images != 1 || (c.layout == Layout::planar && !c.sparse) || c.turned) return;
#endif
  const int64_t rows = c.images * c.locations, count = rows * c.classes;
  int64_t stride[3], beside[3], size;
  strides_of(c, false, stride, size);
  strides_of(c, c.turned, beside, size);
  const auto in_layout = [&](const int64_t (&by)[3], int64_t row, int64_t k) {
    return row / c.locations * by[0] + k * by[1] + row % c.locations * by[2];
  };
  const bool elementwise = c.kind != ScoreLoss::quality;
  if (elementwise && c.layout != Layout::rows) return;  // of these the CPU takes dense ones alone, and so does this test
  std::vector<double> pred_values(size), target_values(c.sparse ? rows : size), weight_values(rows);
  std::vector<int64_t> labels(rows);
  for (double& v : pred_values) v = c.activated ? draw.uniform(0.02, 0.98) : draw.normal(3);
  for (double& v : target_values) v = c.sparse || draw.integer(0, 3) == 0 ? draw.uniform(0.02, 0.98) : 0.0;
  for (double& v : weight_values) v = draw.integer(0, 4) == 0 ? 0.0 : draw.uniform(0.1, 3);
  for (int64_t row = 0; row < rows; ++row) {  // the second half has none: there are tiles without a class
    labels[row] = 2 * row <= rows && draw.integer(0, 2) == 0 ? draw.integer(-3, c.classes + 3) : c.classes;
  }
  const double alpha = draw.uniform(0.1, 0.9), factor = draw.uniform(0.5, 2), norm = draw.uniform(1, 40);

  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<A> target_rounded = rounded<A>(target_values), weight_rounded = rounded<A>(weight_values);
  const std::vector<double> x = widened(pred_rounded), t = widened(target_rounded), w = widened(weight_rounded);
  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), weight(weight_rounded), norms(rounded<A>({norm}));
  const Buffer<int64_t> label(labels);
  const ScoreLossInput in{pred.data(), dtype, c.images, c.classes, c.locations, {stride[0], stride[1], stride[2]},
                          c.sparse ? label.data() : nullptr, target.data(), {beside[0], beside[1], beside[2]},
                          c.weighted ? weight.data() : nullptr, c.kind, alpha, c.exponent, c.activated};

  // By the formula, and the derivative by differences.
  const double by = factor / (c.normed ? norm + kScoreNormEps : 1);
  long double total = 0;
  std::vector<double> want(size);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < c.classes; ++k) {
      const int64_t i = in_layout(stride, row, k), j = in_layout(beside, row, k);
      const double aim = c.sparse ? (labels[row] == k ? t[row] : 0.0) : t[j];
      const double row_weight = c.weighted ? w[row] : 1;
      total += row_weight * term(c, alpha, x[i], aim);
      want[j] = by * row_weight * difference([&](long double v) { return term(c, alpha, v, aim); }, x[i]);
    }
  }
  const double chain = sizeof(A) == 8 ? 1e-8 : 4e-5;  // a few dozen roundings in the accumulator, and sums of terms of one sign
  const auto same_gradient = [&](const std::vector<double>& got, double times, const char* what) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < c.classes; ++k) {
        const int64_t i = in_layout(beside, row, k);
        CHECK(close(got[i], times * want[i], epsilon + chain, std::fabs(times) * (chain + epsilon * 1e-4)),
              "%s, %s: [%lld] is %g, not %g", c.name.c_str(), what, static_cast<long long>(i), got[i], times * want[i]);
      }
    }
  };

#if defined(GFL_TEST_CUDA)
  CHECK(cuda::score_loss_fits(in), "%s", c.name.c_str());
  const ScoreLossScale scale{factor, c.normed ? norms.data() : nullptr};
  Buffer<double> workspace(static_cast<size_t>(cuda::score_loss_workspace(in)));
  Buffer<A> loss(1), alone(1), again(1);
  Buffer<T> grad(size), twice(size);
  CHECK_CUDA(cuda::score_loss_forward(in, scale, workspace.data(), loss.data(), grad.data(), beside, nullptr));
  CHECK_CUDA(cuda::score_loss_forward(in, scale, workspace.data(), alone.data(), nullptr, beside, nullptr));
  CHECK_CUDA(cuda::score_loss_forward(in, scale, workspace.data(), again.data(), twice.data(), beside, nullptr));
  const double got = widened(loss.read())[0];
  const std::vector<double> first = widened(grad.read());
  CHECK(close(got, by * static_cast<double>(total), chain, chain), "%s: loss %g, not %g", c.name.c_str(), got,
        by * static_cast<double>(total));
  same_gradient(first, 1, "beside the loss");
  CHECK(widened(alone.read())[0] == got && widened(again.read())[0] == got, "%s: the loss differs", c.name.c_str());
  const auto equal = [](const Buffer<T>& a, const Buffer<T>& b) {
    const std::vector<T> one = a.read(), other = b.read();
    return one.empty() || std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) == 0;
  };
  CHECK(equal(grad, twice), "%s: the gradient differs from run to run", c.name.c_str());

  // 1 arrives: what is there stays, which a pattern in its place shows. Anything else is computed anew.
  const std::vector<T> pattern = rounded<T>(std::vector<double>(size, 0.75));
  for (const double arriving : {1.0, 0.0, -2.5}) {
    const Buffer<A> one(rounded<A>({arriving}));
    Buffer<T> kept(pattern), computed(size);
    CHECK_CUDA(cuda::score_loss_backward(in, scale, one.data(), true, kept.data(), beside, nullptr));
    CHECK_CUDA(cuda::score_loss_backward(in, scale, one.data(), false, computed.data(), beside, nullptr));
    same_gradient(widened(computed.read()), arriving, "computed anew");
    if (arriving == 1.0) {
      CHECK(widened(kept.read()) == widened(pattern), "%s: what was grad_stored was written", c.name.c_str());
      CHECK(equal(computed, grad), "%s: both ways differ", c.name.c_str());
    } else {
      same_gradient(widened(kept.read()), arriving, "in place");
    }
  }
  const Buffer<A> nothing(rounded<A>({NAN}));
  Buffer<T> spoiled(pattern);
  CHECK_CUDA(cuda::score_loss_backward(in, scale, nothing.data(), true, spoiled.data(), beside, nullptr));
  const std::vector<double> nan = widened(spoiled.read());
  CHECK(count == 0 || nan[0] != nan[0], "%s: a NaN did not arrive", c.name.c_str());
#else
  Buffer<T> grad(count);
  double sum = 0, alone = 0;
  for (const auto& [begin, end] : {std::pair{rows / 2, rows}, std::pair{int64_t{0}, rows / 2}}) {
    sum += cpu::score_loss(in, by, grad.data(), begin, end);
    alone += cpu::score_loss(in, by, nullptr, begin, end);
  }
  CHECK(close(by * sum, by * static_cast<double>(total), chain, chain), "%s: loss %g, not %g", c.name.c_str(), by * sum,
        by * static_cast<double>(total));
  CHECK(sum == alone, "%s: the loss depends on the gradient beside it", c.name.c_str());
  const std::vector<double> dense = widened(grad.read());
  std::vector<double> got(size);
  for (int64_t i = 0; i < count; ++i) got[i / c.classes * stride[2] + i % c.classes * stride[1]] = dense[i];
  same_gradient(got, 1, "beside the loss");
#endif
}

}  // namespace

int main() {
  Generator draw(20080813);
  constexpr ScoreLoss quality = ScoreLoss::quality, focal = ScoreLoss::focal, varifocal = ScoreLoss::varifocal;
  const Case cases[] = {
      {"empty", 1, 0, 80},
      {"no classes", 1, 5, 0},
      {"one", 1, 1, 1},
      {"odd", 1, 7, 3},
      {"a tile less one", 1, 127, 20},
      {"over a tile", 1, 301, 16, quality, true, true},
      {"no norm", 1, 40, 16, quality, true, true, false},
      {"unaligned rows", 1, 150, 9, quality, true, true},
      {"padded", 1, 60, 8, quality, true, false, true, false, 2, Layout::padded},
      {"sliced", 1, 60, 8, quality, true, true, true, false, 2, Layout::sliced},
      {"planar", 1, 144, 8, quality, true, true, true, false, 2, Layout::planar},
      {"planar, odd", 1, 133, 5, quality, true, false, true, false, 2, Layout::planar},
      {"dense", 1, 140, 16, quality, false, true},
      {"dense, unaligned", 1, 37, 5, quality, false},
      {"dense images", 3, 50, 8, quality, false, true},
      {"dense planar images", 3, 52, 8, quality, false, true, true, false, 2, Layout::planar},
      {"planar, gradient turned", 2, 144, 8, quality, true, true, true, false, 2, Layout::planar, true},
      {"dense, turned", 2, 144, 16, quality, false, true, true, false, 2, Layout::rows, true},
      {"dense planar, turned, beta 3", 2, 40, 8, quality, false, true, true, false, 3, Layout::planar, true},
      {"beta 1.5", 1, 40, 8, quality, true, false, true, false, 1.5},
      {"activated", 1, 40, 8, quality, true, true, true, true},
      {"focal", 1, 140, 16, focal, false, true},
      {"focal gamma 1.5", 1, 30, 5, focal, false, false, false, false, 1.5},
      {"varifocal", 1, 140, 16, varifocal, false, true},
      {"varifocal unweighted", 1, 40, 8, ScoreLoss::varifocal_unweighted, false},
  };
  for (const Case& c : cases) {
    check<float>(c, DType::f32, 0, draw);
    check<double>(c, DType::f64, 0, draw);
    check<half_t>(c, DType::f16, 1e-3, draw);
    check<bfloat16_t>(c, DType::bf16, 8e-3, draw);
  }
  return result("score_loss");
}
