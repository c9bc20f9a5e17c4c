// SPDX-License-Identifier: Apache-2.0
// Losses of class scores against their formulas as loops in long double, derivatives against differences of those, in
// every form: rows, elements, and down to one number. Every loss of terms/score.h needs an oracle in
// score_oracle.h.
#include "gfl/score.h"

#include <cmath>
#include <string>
#include <utility>

#include "score_oracle.h"
#include "terms/score.h"
#include "testing.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

// Chains of a few dozen roundings in the accumulator, and sums of terms of one sign.
template <class T> constexpr double kChain = sizeof(acc_t<T>) == 8 ? 1e-8 : 4e-5;
// A 16-bit gradient's own rounding; its subnormal step is 1e-4 of that.
template <class T> bool close_gradient(double got, double want, double epsilon, double scale = 1) {
  return close(got, want, epsilon + kChain<T>, scale * (kChain<T> + epsilon * 1e-4));
}

ScoreInput input(const Oracle& o, const std::vector<double>& params, const void* pred, DType dtype, const void* target,
                 bool activated) {
  ScoreInput in{};
  in.loss = o.loss;
  in.pred = pred;
  in.dtype = dtype;
  in.images = 1;
  in.target = target;
  std::copy(params.begin(), params.end(), in.params);
  in.activated = activated;
  return in;
}

// --- rows and elements ---------------------------------------------------------------------------------------------

// All of the rows or elements, on the CPU in two chunks.
void run(const ScoreInput& in, bool rows, const void* grad, int64_t stride, void* loss, void* grad_pred,
         void* grad_target) {
#if defined(GFL_TEST_CUDA)
  CHECK_CUDA(rows ? cuda::score_rows(in, grad, loss, grad_pred, grad_target, nullptr)
                  : cuda::score_elements(in, grad, stride, loss, grad_pred, grad_target, nullptr));
#else
  const int64_t half = in.locations / 2;
  for (const auto& [begin, end] : {std::pair{half, in.locations}, std::pair{int64_t{0}, half}}) {
    if (rows) cpu::score_rows(in, grad, loss, grad_pred, grad_target, begin, end);
    else cpu::score_elements(in, grad, stride, loss, grad_pred, grad_target, begin, end);
  }
#endif
}

struct Case {
  std::string name;
  int64_t rows, classes;
  bool activated = false, dense = false, transposed = false, broadcast = false, far = false;
};

template <class T>
void check(const Oracle& o, const std::vector<double>& params, const Case& c, bool rows, DType dtype, double epsilon,
           Generator& draw) {
  using A = acc_t<T>;
  const int64_t count = c.rows * c.classes;
  std::vector<double> pred_values(count), target_values(c.dense ? count : c.rows),
      grad_values(c.broadcast ? 1 : c.rows);
  std::vector<int64_t> labels(c.rows);
  for (double& v : pred_values) {
    v = c.far ? far_logit(draw) : c.activated ? draw.uniform(0.02, 0.98) : draw.normal(3);
  }
  const double negative = o.negative * (c.far ? 50 : 1);  // a power bends where the score of a negative is 0
  for (double& v : target_values) v = rows || draw.integer(0, 3) == 0 ? draw.uniform(0.05, 0.99) : negative;
  for (double& v : grad_values) v = draw.normal(2);
  for (int64_t& l : labels) l = draw.integer(-2, c.classes + 3);
  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<double> x = widened(pred_rounded);
  for (int64_t i = 0; i < (c.dense ? count : c.rows); ++i) {
    const int64_t k = c.dense ? 0 : labels[i], at = c.dense ? i : c.transposed ? k * c.rows + i : i * c.classes + k;
    if (c.dense || (k >= 0 && k < c.classes)) target_values[i] = apart(target_values[i], x[at], c.activated, draw);
  }
  const std::vector<A> target_rounded = rounded<A>(target_values), grad_rounded = rounded<A>(grad_values);
  const std::vector<double> t = widened(target_rounded), g = widened(grad_rounded);

  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), grad(grad_rounded);
  const Buffer<int64_t> label(labels);
  ScoreInput in = input(o, params, pred.data(), dtype, target.data(), c.activated);
  in.classes = c.classes;
  in.locations = c.rows;
  in.stride[1] = c.transposed ? c.rows : 1;
  in.stride[2] = c.transposed ? 1 : c.classes;
  in.label = c.dense ? nullptr : label.data();

  Buffer<A> loss(c.rows), again(c.rows), grad_target(t.size()), target_alone(t.size());
  Buffer<T> grad_pred(count), alone(count);
  const int64_t stride = c.broadcast ? 0 : 1;
  run(in, rows, nullptr, 0, loss.data(), nullptr, nullptr);
  run(in, rows, nullptr, 0, again.data(), nullptr, nullptr);
  run(in, rows, grad.data(), stride, nullptr, grad_pred.data(), grad_target.data());
  run(in, rows, grad.data(), stride, nullptr, alone.data(), nullptr);
  run(in, rows, grad.data(), stride, nullptr, nullptr, target_alone.data());
  const std::vector<double> got = widened(loss.read()), got_pred = widened(grad_pred.read());
  const std::vector<double> got_target = widened(grad_target.read());
  const std::string name = std::string(o.loss) + ", " + c.name;

  for (int64_t row = 0; row < c.rows; ++row) {
    double sum = 0, of_score = 0;
    const double scale = g[c.broadcast ? 0 : row];
    for (int64_t k = 0; k < c.classes; ++k) {
      const size_t i = row * c.classes + k;
      const double score = c.dense ? t[i] : labels[row] == k ? t[row] : 0.0;
      const Wanted want = wanted(o, params, x[row * in.stride[2] + k * in.stride[1]], score, c.activated);
      sum += want.value;
      CHECK(close_gradient<T>(got_pred[i], scale * want.by_pred, epsilon), "%s: grad_pred[%zu] %g, not %g",
            name.c_str(), i, got_pred[i], scale * want.by_pred);
      if (c.dense) {
        CHECK(close(got_target[i], scale * want.by_target, kChain<T>, kChain<T>), "%s: grad_target[%zu] %g, not %g",
              name.c_str(), i, got_target[i], scale * want.by_target);
      } else if (labels[row] == k) {
        of_score = scale * want.by_target;
      }
    }
    CHECK(close(got[row], sum, kChain<T>, kChain<T>), "%s: loss[%lld] %g, not %g", name.c_str(),
          static_cast<long long>(row), got[row], sum);
    if (!c.dense) {
      CHECK(close(got_target[row], of_score, kChain<T>, kChain<T>), "%s: grad_target[%lld] %g, not %g", name.c_str(),
            static_cast<long long>(row), got_target[row], of_score);
    }
  }
  // Only what is wanted is written, and a second run has the same bits.
  CHECK(widened(again.read()) == got, "%s: forward differs from run to run", name.c_str());
  CHECK(widened(alone.read()) == got_pred, "%s: grad_pred depends on grad_target", name.c_str());
  CHECK(widened(target_alone.read()) == got_target, "%s: grad_target depends on grad_pred", name.c_str());
}

const Case kRowCases[] = {
    {"empty", 0, 80},
    {"one", 1, 1},
    {"odd", 7, 3},
    {"over a warp", 3, 33},
    {"over a block", 9, 80},
    {"activated", 9, 5, true},
    {"dense", 9, 37, false, true},
    {"transposed", 9, 37, false, false, true},
    {"no classes", 5, 0},
    {"runs of 16 bytes", 70, 16},
    {"many runs", 5, 400},
    {"dense runs", 33, 24, false, true},
    {"many dense runs", 5, 1040, false, true},
    {"many runs, many rows", 70, 1040},
    {"over a block, transposed", 300, 8, false, false, true},
    {"far from 0", 9, 37, false, false, false, false, true},
};
const Case kElementCases[] = {
    {"empty", 0, 1, false, true},
    {"one", 1, 1, false, true},
    {"odd", 37, 1, false, true},
    {"over a block", 257, 1, false, true},
    {"activated", 37, 1, true, true},
    {"one gradient", 37, 1, false, true, false, true},
    {"two blocks", 600, 1, false, true, false, true},
    {"turns of the grid", 2700, 1, false, true},
    {"turns of the grid, activated", 2700, 1, true, true},
    {"far from 0", 257, 1, false, true, false, false, true},
};

// --- down to one number ----------------------------------------------------------------------------------------------

// Class innermost, with a gap per row, location innermost, every second.
enum class Layout { rows, padded, planar, sliced };

// `turned`: gradient and dense targets lie location innermost where the scores do not, and the other way round.
struct ReducedCase {
  std::string name;
  int64_t images, locations, classes;
  bool sparse = true, weighted = false, normed = true, activated = false;
  Layout layout = Layout::rows;
  bool turned = false, far = false;
};

void strides_of(const ReducedCase& c, bool turned, int64_t (&stride)[3], int64_t& size) {
  const int64_t gap = c.layout == Layout::padded ? 3 : 0, by = c.layout == Layout::sliced ? 2 : 1;
  const bool planar = (c.layout == Layout::planar) != turned;
  stride[1] = planar ? c.locations : by;
  stride[2] = planar ? 1 : by * (c.classes + gap);
  stride[0] = by * (c.classes + gap) * c.locations;
  size = stride[0] * c.images;
}

template <class T>
void check_reduced(const Oracle& o, const std::vector<double>& params, const ReducedCase& c, DType dtype,
                   double epsilon, Generator& draw) {
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
  std::vector<double> pred_values(size), target_values(c.sparse ? rows : size), weight_values(rows);
  std::vector<int64_t> labels(rows);
  for (double& v : pred_values) {
    v = c.far ? far_logit(draw) : c.activated ? draw.uniform(0.02, 0.98) : draw.normal(3);
  }
  for (double& v : target_values) v = c.sparse || draw.integer(0, 3) == 0 ? draw.uniform(0.02, 0.98) : 0.0;
  for (double& v : weight_values) v = draw.integer(0, 4) == 0 ? 0.0 : draw.uniform(0.1, 3);
  for (int64_t row = 0; row < rows; ++row) {  // the second half has none: there are tiles without a class
    labels[row] = 2 * row <= rows && draw.integer(0, 2) == 0 ? draw.integer(-3, c.classes + 3) : c.classes;
  }
  const double factor = draw.uniform(0.5, 2), norm = draw.uniform(1, 40);
  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<double> x = widened(pred_rounded);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / c.classes, k = i % c.classes;
    double& score = target_values[c.sparse ? row : in_layout(beside, row, k)];
    if (!c.sparse || labels[row] == k) score = apart(score, x[in_layout(stride, row, k)], c.activated, draw);
  }
  const std::vector<A> target_rounded = rounded<A>(target_values), weight_rounded = rounded<A>(weight_values);
  const std::vector<double> t = widened(target_rounded), w = widened(weight_rounded);
  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), weight(weight_rounded), norms(rounded<A>({norm}));
  const Buffer<int64_t> label(labels);
  ScoreInput in = input(o, params, pred.data(), dtype, target.data(), c.activated);
  in.images = c.images;
  in.classes = c.classes;
  in.locations = c.locations;
  std::copy(stride, stride + 3, in.stride);
  std::copy(beside, beside + 3, in.target_stride);
  in.label = c.sparse ? label.data() : nullptr;
  in.weight = c.weighted ? weight.data() : nullptr;
  const ScoreScale scale{factor, c.normed ? norms.data() : nullptr};
  const std::string name = std::string(o.loss) + " reduced, " + c.name;

  const double by = factor / (c.normed ? norm + kScoreNormEps : 1);
  double total = 0;
  std::vector<double> want(size);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < c.classes; ++k) {
      const int64_t i = in_layout(stride, row, k), j = in_layout(beside, row, k);
      const double score = c.sparse ? (labels[row] == k ? t[row] : 0.0) : t[j], row_weight = c.weighted ? w[row] : 1;
      const Wanted of = wanted(o, params, x[i], score, c.activated);
      total += row_weight * of.value;
      want[j] = by * row_weight * of.by_pred;
    }
  }
  const auto same_gradient = [&](const std::vector<double>& got, double times, const char* what) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < c.classes; ++k) {
        const int64_t i = in_layout(beside, row, k);
        CHECK(close_gradient<T>(got[i], times * want[i], epsilon, std::fabs(times)), "%s, %s: [%lld] is %g, not %g",
              name.c_str(), what, static_cast<long long>(i), got[i], times * want[i]);
      }
    }
  };
  const auto equal = [](const Buffer<T>& a, const Buffer<T>& b) {
    const std::vector<T> one = a.read(), other = b.read();
    return one.empty() || std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) == 0;
  };
  Buffer<A> loss(1), alone(1), again(1);

#if defined(GFL_TEST_CUDA)
  CHECK(cuda::score_reduced_fits(in), "%s", name.c_str());
  Buffer<double> workspace(static_cast<size_t>(cuda::score_reduced_workspace(in)));
  Buffer<T> grad(size), twice(size);
  const auto forward = [&](Buffer<A>& result, T* gradient) {
    CHECK_CUDA(cuda::score_reduced_forward(in, scale, workspace.data(), result.data(), gradient, beside, nullptr));
  };
  forward(loss, grad.data());
  forward(alone, nullptr);
  forward(again, twice.data());
  same_gradient(widened(grad.read()), 1, "beside the loss");

  // 1 arrives: what is there stays, which a pattern in its place shows. Anything else is computed again.
  const std::vector<T> pattern = rounded<T>(std::vector<double>(size, 0.75));
  const auto backward = [&](double arriving, bool stored, Buffer<T>& gradient) {
    const Buffer<A> one(rounded<A>({arriving}));
    CHECK_CUDA(cuda::score_reduced_backward(in, scale, one.data(), stored, gradient.data(), beside, nullptr));
  };
  for (const double arriving : {1.0, 0.0, -2.5}) {
    Buffer<T> kept(pattern), computed(size);
    backward(arriving, true, kept);
    backward(arriving, false, computed);
    same_gradient(widened(computed.read()), arriving, "computed again");
    if (arriving == 1.0) {
      CHECK(widened(kept.read()) == widened(pattern), "%s: what was stored was written", name.c_str());
      CHECK(equal(computed, grad), "%s: both ways differ", name.c_str());
    } else {
      same_gradient(widened(kept.read()), arriving, "in place");
    }
  }
  Buffer<T> spoiled(pattern);
  backward(NAN, true, spoiled);
  const std::vector<double> nan = widened(spoiled.read());
  CHECK(count == 0 || nan[0] != nan[0], "%s: a NaN did not arrive", name.c_str());
#else
  Buffer<T> grad(count), twice(count);
  const auto walk = [&](const void* grad_loss, Buffer<A>* result, T* gradient) {
    std::vector<double> sums;
    for (const auto& [begin, end] : {std::pair{rows / 2, rows}, std::pair{int64_t{0}, rows / 2}}) {
      sums.push_back(cpu::score_reduced(in, scale, grad_loss, gradient, begin, end));
    }
    if (result != nullptr) cpu::score_reduced_sum(in, scale, sums.data(), 2, result->data());
  };
  const auto in_map = [&](const Buffer<T>& gradient) {
    const std::vector<double> dense = widened(gradient.read());
    std::vector<double> got(size);
    for (int64_t i = 0; i < count; ++i) got[i / c.classes * stride[2] + i % c.classes * stride[1]] = dense[i];
    return got;
  };
  walk(nullptr, &loss, grad.data());
  walk(nullptr, &alone, nullptr);
  walk(nullptr, &again, twice.data());
  same_gradient(in_map(grad), 1, "beside the loss");
  for (const double arriving : {1.0, 0.0, -2.5}) {
    const Buffer<A> one(rounded<A>({arriving}));
    Buffer<T> computed(count);
    walk(one.data(), nullptr, computed.data());
    same_gradient(in_map(computed), arriving, "computed again");
    CHECK(cpu::score_gradient_stands(in, one.data()) == (arriving == 1.0), "%s: %g arrives", name.c_str(), arriving);
    if (arriving == 1.0) CHECK(equal(computed, grad), "%s: both ways differ", name.c_str());
  }
#endif
  const double got = widened(loss.read())[0];
  CHECK(close(got, by * total, kChain<T>, kChain<T>), "%s: loss %g, not %g", name.c_str(), got, by * total);
  CHECK(widened(again.read())[0] == got, "%s: the loss differs from run to run", name.c_str());
  // A gradient in another layout turns the walk, and with it the order of the sum.
  const double by_itself = widened(alone.read())[0];
  CHECK(c.turned ? close(by_itself, got, kChain<T>, kChain<T>) : by_itself == got, "%s: %g beside a gradient, %g alone",
        name.c_str(), got, by_itself);
  CHECK(equal(grad, twice), "%s: the gradient differs from run to run", name.c_str());
}

const ReducedCase kReducedCases[] = {
    {"empty", 1, 0, 80},
    {"no classes", 1, 5, 0},
    {"one", 1, 1, 1},
    {"odd", 1, 7, 3},
    {"a tile less one", 1, 127, 20},
    {"over a tile", 1, 301, 16, true, true},
    {"no norm", 1, 40, 16, true, true, false},
    {"unaligned rows", 1, 150, 9, true, true},
    {"padded", 1, 60, 8, true, false, true, false, Layout::padded},
    {"sliced", 1, 60, 8, true, true, true, false, Layout::sliced},
    {"planar", 1, 144, 8, true, true, true, false, Layout::planar},
    {"planar, odd", 1, 133, 5, true, false, true, false, Layout::planar},
    {"dense", 1, 140, 16, false, true},
    {"dense, unweighted", 1, 140, 16, false, false, false},
    {"dense, one class", 1, 301, 1, false, false},
    {"dense, unaligned", 1, 37, 5, false},
    {"dense images", 3, 50, 8, false, true},
    {"dense planar images", 3, 52, 8, false, true, true, false, Layout::planar},
    {"planar, gradient turned", 2, 144, 8, true, true, true, false, Layout::planar, true},
    {"dense, turned", 2, 144, 16, false, true, true, false, Layout::rows, true},
    {"dense planar, turned", 2, 40, 8, false, true, true, false, Layout::planar, true},
    {"many runs", 1, 130, 72, true, true},
    {"many planar runs", 1, 256, 72, true, true, true, false, Layout::planar},
    {"many dense runs", 1, 136, 72, false, true},
    {"activated", 1, 40, 8, true, true, true, true},
    {"dense, activated", 1, 40, 8, false, true, true, true},
    {"far from 0", 1, 40, 8, true, true, true, false, Layout::rows, false, true},
    {"many images", 2100, 1, 1},
    {"dense, far from 0", 1, 40, 8, false, true, true, false, Layout::rows, false, true},
};

// ±1e4: finite losses, gradients of ±1. Infinities count as the largest number and have no gradient; NaN spreads.
template <class T> void check_extremes(DType dtype) {
  using A = acc_t<T>;
  const std::vector<T> values = rounded<T>({1e4, -1e4, -HUGE_VAL, HUGE_VAL, HUGE_VAL, -HUGE_VAL, NAN});
  const A big = static_cast<A>(load(&values[0])), largest = std::numeric_limits<A>::max();
  const std::vector<A> want{big, big, 0, 0, largest, largest}, want_grad{1, -1, 0, 0, 0, 0};
  const size_t n = values.size();
  const Buffer<T> pred(values);
  const Buffer<A> target(std::vector<A>{0, 1, 0, 1, 0, 1, 0}), grad(std::vector<A>(n, 1));
  const Buffer<int64_t> label(std::vector<int64_t>{9, 0, 9, 0, 9, 0, 9});
  for (const Oracle& o : kOracles) {
    const bool rows =
        std::string(o.loss) != "focal" && std::string(o.loss) != "vfl";  // these have factors of their own
    for (const std::vector<double>& params : o.params) {
      ScoreInput in = input(o, params, pred.data(), dtype, target.data(), false);
      in.classes = in.stride[1] = in.stride[2] = 1;
      in.locations = static_cast<int64_t>(n);
      in.label = rows ? label.data() : nullptr;
      Buffer<A> loss(n);
      Buffer<T> grad_pred(n);
      run(in, rows, nullptr, 0, loss.data(), nullptr, nullptr);
      run(in, rows, grad.data(), 1, nullptr, grad_pred.data(), nullptr);
      const std::vector<double> got = widened(loss.read()), got_grad = widened(grad_pred.read());
      CHECK(got[n - 1] != got[n - 1] && got_grad[n - 1] != got_grad[n - 1], "%s: a NaN is lost", o.loss);
      for (size_t i = 0; i + 1 < n; ++i) {
        CHECK(got[i] == got[i] && got_grad[i] == got_grad[i], "%s: a NaN of element %zu", o.loss, i);
        if (!rows) continue;
        CHECK(got[i] == static_cast<double>(want[i]), "%s: extreme loss %zu is %g", o.loss, i, got[i]);
        CHECK(got_grad[i] == static_cast<double>(want_grad[i]), "%s: extreme gradient %zu is %g", o.loss, i,
              got_grad[i]);
      }
    }
  }
}

// Calls f(value of the element type, dtype, its rounding) for each.
template <class F> void for_dtypes(const F& f) {
  f(float{}, DType::f32, 0.0);
  f(double{}, DType::f64, 0.0);
  f(half_t{}, DType::f16, 1e-3);
  f(bfloat16_t{}, DType::bf16, 8e-3);
}

}  // namespace

int main() {
  Generator draw(20200608);
  ScoreLosses::for_each([&](auto kind) {
    using Loss = decltype(kind);
    const Oracle* o = nullptr;
    for (const Oracle& given : kOracles) {
      if (std::string(given.loss) == Loss::name) o = &given;
    }
    CHECK(o != nullptr, "%s has no oracle", Loss::name);
    if (o == nullptr) return;
    CHECK(score_param_count(Loss::name) == static_cast<int>(o->params[0].size()), "parameters of %s", Loss::name);
    for_dtypes([&](auto t, DType dtype, double epsilon) {
      using T = decltype(t);
      for (const std::vector<double>& params : o->params) {
        const bool fast = params.empty() || params[0] == o->params[0][0];
        if (Loss::summed) {
          for (const Case& c : kRowCases) check<T>(*o, params, c, true, dtype, epsilon, draw);
        } else {
          for (const Case& c : kElementCases) check<T>(*o, params, c, false, dtype, epsilon, draw);
        }
        for (const ReducedCase& c : kReducedCases) {
          if (c.sparse && !Loss::summed) continue;
          if (!fast && c.locations > 60) continue;  // the general walk knows no tiles of runs
          if (c.images > 1000 && (!fast || o != kOracles || epsilon > 0)) continue;  // the sums are those of any loss
          check_reduced<T>(*o, params, c, dtype, epsilon, draw);
        }
      }
    });
  });
  CHECK(score_param_count("none of them") == -1, "a name that there is not");
  for_dtypes([](auto t, DType dtype, double) { check_extremes<decltype(t)>(dtype); });
  return result("score");
}
