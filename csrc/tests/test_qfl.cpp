// SPDX-License-Identifier: Apache-2.0
// Quality focal loss against its formula, written as a loop in long double; derivatives against differences of that.
#include "gfl/qfl.h"

#include <string>

#include "testing.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

struct Case {
  std::string name;
  int64_t rows, classes;
  double beta;
  bool activated, dense, transposed;
};

long double element(long double x, long double t, const Case& c) {
  const long double p = c.activated ? x : 1 / (1 + std::exp(-x));
  const long double log_p = c.activated ? std::log(x) : -std::log1p(std::exp(-x));
  const long double log_q = c.activated ? std::log1p(-x) : -x - std::log1p(std::exp(-x));
  return std::pow(std::fabs(t - p), static_cast<long double>(c.beta)) * -(t * log_p + (1 - t) * log_q);
}

template <class F> double slope(const F& f, double at) {
  const long double h = 1e-6L;
  return static_cast<double>((f(at + h) - f(at - h)) / (2 * h));
}

void forward(const QflInput& in, void* loss) {
#if defined(GFL_TEST_CUDA)
  CHECK_CUDA(cuda::qfl_forward(in, loss, nullptr));
#else
  cpu::qfl_forward(in, loss, in.rows / 2, in.rows);
  cpu::qfl_forward(in, loss, 0, in.rows / 2);
#endif
}

void backward(const QflInput& in, const void* grad, void* grad_pred, void* grad_target) {
#if defined(GFL_TEST_CUDA)
  CHECK_CUDA(cuda::qfl_backward(in, grad, grad_pred, grad_target, nullptr));
#else
  cpu::qfl_backward(in, grad, grad_pred, grad_target, in.rows / 2, in.rows);
  cpu::qfl_backward(in, grad, grad_pred, grad_target, 0, in.rows / 2);
#endif
}

template <class T> void check(const Case& c, DType dtype, double epsilon, Generator& draw) {
  using A = acc_t<T>;
  const int64_t count = c.rows * c.classes;
  std::vector<double> pred_values(count), target_values(c.dense ? count : c.rows), grad_values(c.rows);
  std::vector<int64_t> labels(c.rows);
  for (double& v : pred_values) v = c.activated ? draw.uniform(0.02, 0.98) : draw.normal(3);
  for (double& v : target_values) v = draw.uniform(0.01, 0.99);
  for (double& v : grad_values) v = draw.normal(2);
  for (int64_t& l : labels) l = draw.integer(-2, c.classes + 3);

  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<A> target_rounded = rounded<A>(target_values), grad_rounded = rounded<A>(grad_values);
  const std::vector<double> x = widened(pred_rounded), t = widened(target_rounded), g = widened(grad_rounded);
  const int64_t stride_row = c.transposed ? 1 : c.classes, stride_class = c.transposed ? c.rows : 1;

  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), grad(grad_rounded);
  const Buffer<int64_t> label(labels);
  Buffer<A> loss(c.rows), grad_target(t.size());
  Buffer<T> grad_pred(count);
  const QflInput in{pred.data(), dtype,   stride_row, stride_class, c.dense ? nullptr : label.data(), target.data(),
                    c.rows,      c.classes, c.beta,     c.activated};
  forward(in, loss.data());
  backward(in, grad.data(), grad_pred.data(), grad_target.data());
  const std::vector<double> got = widened(loss.read()), got_pred = widened(grad_pred.read());
  const std::vector<double> got_target = widened(grad_target.read());

  // Chains of a few dozen roundings in the accumulator; a half's own rounding, and its subnormal step, on what is stored.
  const double chain = sizeof(A) == 8 ? 1e-8 : 2e-5;
  for (int64_t row = 0; row < c.rows; ++row) {
    long double sum = 0;
    double want_score = 0;
    for (int64_t k = 0; k < c.classes; ++k) {
      const double at = x[row * stride_row + k * stride_class];
      const double score = c.dense ? t[row * c.classes + k] : labels[row] == k ? t[row] : 0.0;
      sum += element(at, score, c);
      const double by_pred = g[row] * slope([&](long double v) { return element(v, score, c); }, at);
      const double by_target = g[row] * slope([&](long double v) { return element(at, v, c); }, score);
      const size_t i = row * c.classes + k;
      CHECK(close(got_pred[i], by_pred, epsilon + chain, chain + epsilon * 1e-4), "%s grad_pred[%zu] %g, not %g",
            c.name.c_str(), i, got_pred[i], by_pred);
      if (c.dense) {
        CHECK(close(got_target[i], by_target, chain, chain), "%s grad_target[%zu] %g, not %g", c.name.c_str(), i,
              got_target[i], by_target);
      } else if (labels[row] == k) {
        want_score = by_target;
      }
    }
    CHECK(close(got[row], static_cast<double>(sum), chain, chain), "%s loss[%lld] %g, not %g", c.name.c_str(),
          static_cast<long long>(row), got[row], static_cast<double>(sum));
    if (!c.dense) {
      CHECK(close(got_target[row], want_score, chain, chain), "%s grad_score[%lld] %g, not %g", c.name.c_str(),
            static_cast<long long>(row), got_target[row], want_score);
    }
  }

  // Only what is wanted is written, and a second run has the same bits.
  Buffer<A> again(c.rows);
  forward(in, again.data());
  CHECK(widened(again.read()) == got, "%s: forward differs from run to run", c.name.c_str());
  Buffer<T> alone(count);
  backward(in, grad.data(), alone.data(), nullptr);
  CHECK(widened(alone.read()) == got_pred, "%s: grad_pred depends on grad_target", c.name.c_str());
  Buffer<A> target_alone(t.size());
  backward(in, grad.data(), nullptr, target_alone.data());
  CHECK(widened(target_alone.read()) == got_target, "%s: grad_target depends on grad_pred", c.name.c_str());
#if !defined(GFL_TEST_CUDA)
  Buffer<A> loss_beside(c.rows);
  Buffer<T> grad_beside(count);
  cpu::qfl_forward_and_gradient(in, grad.data(), loss_beside.data(), grad_beside.data(), 0, c.rows);
  CHECK(widened(loss_beside.read()) == got, "%s: the loss depends on the gradient beside it", c.name.c_str());
  CHECK(widened(grad_beside.read()) == got_pred, "%s: the gradient depends on the loss beside it", c.name.c_str());
#endif
}

// ±1e4: finite losses, gradients of ±1. Infinities count as the largest number and have no gradient.
void check_extremes() {
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  const Buffer<float> pred(std::vector<float>{1e4f, -1e4f, -infinity, infinity, infinity, -infinity});
  const Buffer<float> target(std::vector<float>{0, 1, 0, 1, 0, 1}), grad(std::vector<float>(6, 1));
  const Buffer<int64_t> label(std::vector<int64_t>{9, 0, 9, 0, 9, 0});
  for (const double beta : {2.0, 1.5}) {  // the CPU has code of its own for 2
    Buffer<float> loss(6), grad_pred(6);
    const QflInput in{pred.data(), DType::f32, 1, 1, label.data(), target.data(), 6, 1, beta, false};
    forward(in, loss.data());
    backward(in, grad.data(), grad_pred.data(), nullptr);
    CHECK((loss.read() == std::vector<float>{1e4f, 1e4f, 0, 0, largest, largest}), "extreme losses");
    CHECK((grad_pred.read() == std::vector<float>{1, -1, 0, 0, 0, 0}), "extreme gradients");
  }
}

}  // namespace

int main() {
  Generator draw(20200608);
  const Case cases[] = {
      {"empty", 0, 80, 2, false, false, false},     {"one", 1, 1, 2, false, false, false},
      {"odd", 7, 3, 2, false, false, false},        {"over a warp", 3, 33, 2, false, false, false},
      {"over a block", 9, 80, 2, false, false, false}, {"beta 1.5", 9, 5, 1.5, false, false, false},
      {"activated", 9, 5, 2, true, false, false},   {"dense", 9, 37, 2, false, true, false},
      {"transposed", 9, 37, 2, false, false, true}, {"no classes", 5, 0, 2, false, false, false},
      {"runs of 16 bytes", 70, 16, 2, false, false, false}, {"many runs", 5, 400, 2, false, false, false},
      {"dense runs", 33, 24, 2, false, true, false}, {"over a block, transposed", 300, 8, 2, false, false, true},
  };
  for (const Case& c : cases) {
    check<float>(c, DType::f32, 0, draw);
    check<double>(c, DType::f64, 0, draw);
    check<half_t>(c, DType::f16, 1e-3, draw);
    check<bfloat16_t>(c, DType::bf16, 8e-3, draw);
  }
  check_extremes();
  return result("qfl");
}
