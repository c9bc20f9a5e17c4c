// SPDX-License-Identifier: Apache-2.0
// What the tests of the element-wise losses share. `Kernel` says how to call the launchers, `formula(x, t)` is the loss of
// one element in long double; derivatives are held against differences of it.
#pragma once
#include <string>

#include "testing.h"

namespace gfl::testing {

struct ElementCase {
  std::string name;
  int64_t count;
  bool activated, spread;  // spread: one gradient for all elements
};

inline const std::vector<ElementCase>& element_cases() {
  static const std::vector<ElementCase> cases{{"empty", 0, false, false},       {"one", 1, false, false},
                                              {"odd", 37, false, false},        {"over a block", 257, false, false},
                                              {"activated", 37, true, false},   {"spread gradient", 37, false, true},
                                              {"two blocks", 600, false, true}};
  return cases;
}

struct Bce {
  long double p, value;
};

inline Bce bce(long double x, long double t, bool activated) {
  if (activated) return {x, -(t * std::log(x) + (1 - t) * std::log1p(-x))};
  const long double e = std::log1p(std::exp(-x));
  return {1 / (1 + std::exp(-x)), t * e + (1 - t) * (x + e)};
}

template <class F> double difference(const F& f, double at) {
  const long double h = 1e-6L;
  return static_cast<double>((f(at + h) - f(at - h)) / (2 * h));
}

template <class T, class Kernel, class Formula>
void check_element_loss(const ElementCase& c, DType dtype, double epsilon, const Kernel& kernel, const Formula& formula,
                        Generator& draw) {
  using A = acc_t<T>;
  std::vector<double> pred_values(c.count), target_values(c.count), grad_values(c.spread ? 1 : c.count);
  for (double& v : pred_values) v = c.activated ? draw.uniform(0.02, 0.98) : draw.normal(3);
  for (double& v : target_values) v = draw.integer(0, 3) == 0 ? draw.uniform(0.05, 0.99) : kernel.negative();
  for (double& v : grad_values) v = draw.normal(2);
  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<A> target_rounded = rounded<A>(target_values), grad_rounded = rounded<A>(grad_values);
  const std::vector<double> x = widened(pred_rounded), t = widened(target_rounded), g = widened(grad_rounded);

  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), grad(grad_rounded);
  Buffer<A> loss(c.count), grad_target(c.count), target_alone(c.count);
  Buffer<T> grad_pred(c.count), alone(c.count);
  const int64_t stride = c.spread ? 0 : 1;
  kernel.forward(pred.data(), dtype, target.data(), c.count, c.activated, loss.data());
  kernel.backward(pred.data(), dtype, target.data(), c.count, c.activated, grad.data(), stride, grad_pred.data(),
                  grad_target.data());
  kernel.backward(pred.data(), dtype, target.data(), c.count, c.activated, grad.data(), stride, alone.data(), nullptr);
  kernel.backward(pred.data(), dtype, target.data(), c.count, c.activated, grad.data(), stride, nullptr,
                  target_alone.data());
  const std::vector<double> got = widened(loss.read()), got_pred = widened(grad_pred.read());
  const std::vector<double> got_target = widened(grad_target.read());

  const double chain = sizeof(A) == 8 ? 1e-8 : 2e-5;
  for (size_t i = 0; i < got.size(); ++i) {
    const double scale = g[c.spread ? 0 : i];
    const double want = static_cast<double>(formula(x[i], t[i], c.activated));
    const double by_pred = scale * difference([&](long double v) { return formula(v, t[i], c.activated); }, x[i]);
    const double by_target = scale * difference([&](long double v) { return formula(x[i], v, c.activated); }, t[i]);
    CHECK(close(got[i], want, chain, chain), "%s loss[%zu] %g, not %g", c.name.c_str(), i, got[i], want);
    CHECK(close(got_pred[i], by_pred, epsilon + chain, chain + epsilon * 1e-4), "%s grad_pred[%zu] %g, not %g",
          c.name.c_str(), i, got_pred[i], by_pred);
    CHECK(close(got_target[i], by_target, chain, chain), "%s grad_target[%zu] %g, not %g", c.name.c_str(), i,
          got_target[i], by_target);
  }
  CHECK(widened(alone.read()) == got_pred, "%s: grad_pred depends on grad_target", c.name.c_str());
  CHECK(widened(target_alone.read()) == got_target, "%s: grad_target depends on grad_pred", c.name.c_str());
}

template <class Kernel, class Formula>
void check_element_loss(const Kernel& kernel, const Formula& formula, Generator& draw) {
  for (const ElementCase& c : element_cases()) {
    check_element_loss<float>(c, DType::f32, 0, kernel, formula, draw);
    check_element_loss<double>(c, DType::f64, 0, kernel, formula, draw);
    check_element_loss<half_t>(c, DType::f16, 1e-3, kernel, formula, draw);
    check_element_loss<bfloat16_t>(c, DType::bf16, 8e-3, kernel, formula, draw);
  }
}

}  // namespace gfl::testing
