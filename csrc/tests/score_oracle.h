// SPDX-License-Identifier: Apache-2.0
// The losses of class scores by their formulas in long double, and their derivatives by differences.
#pragma once
#include <cmath>
#include <vector>

#include "testing.h"

namespace gfl::testing {

// The probability of a score, and its cross entropy against any target.
struct Score {
  long double p, log_p, log_q;
  Score(long double x, bool activated)
      : p(activated ? x : 1 / (1 + std::exp(-x))),
        log_p(activated ? std::log(x) : -std::log1p(std::exp(-x))),
        log_q(activated ? std::log1p(-x) : -x - std::log1p(std::exp(-x))) {}
  long double bce(long double t) const { return -(t * log_p + (1 - t) * log_q); }
};

struct Oracle {
  const char* loss;
  std::vector<std::vector<double>> params;  // first those of the fast path
  // From parameters, score and target; `constant` is the score where it counts as a constant.
  long double (*term)(const std::vector<double>& params, const Score& s, long double t, const Score& constant);
  // The target of a negative: apart from a step that a difference must not cross, or where a power begins.
  double negative;
};

const Oracle kOracles[] = {
    {"qfl",
     {{2}, {1.5}, {3}},
     [](const std::vector<double>& params, const Score& s, long double t, const Score&) {
       return std::pow(std::fabs(t - s.p), (long double)params[0]) * s.bce(t);
     },
     0},
    {"focal",
     {{2, 0.25}, {1.5, 0.6}, {3, -1}, {2, -1}, {1, 0.3}},
     [](const std::vector<double>& params, const Score& s, long double t, const Score&) {
       const long double alpha = params[1], hit = s.p * t + (1 - s.p) * (1 - t);
       const long double balance = alpha < 0 ? 1 : alpha * t + (1 - alpha) * (1 - t);
       return balance * std::pow(1 - hit, (long double)params[0]) * s.bce(t);
     },
     0.001},
    {"vfl",
     {{2, 0.75, 1}, {1.5, 0.4, 1}, {2, 0.75, 0}, {3, 0.4, 0}},
     [](const std::vector<double>& params, const Score& s, long double t, const Score&) {
       if (t > 0) return (params[2] != 0 ? t : 1) * s.bce(t);
       return params[1] * std::pow(std::fabs(s.p - t), (long double)params[0]) * s.bce(t);
     },
     -0.001},
    {"mal",
     {{1.5}, {2.5}, {1}, {2}},
     [](const std::vector<double>& params, const Score& s, long double t, const Score& constant) {
       if (t > 0) return s.bce(std::pow(t, (long double)params[0]));
       return std::pow(constant.p, (long double)params[0]) * s.bce(0);
     },
     0},
    {"soft_bce",
     {{}},
     [](const std::vector<double>&, const Score& s, long double t, const Score&) { return s.bce(t); },
     0},
};

// Where the exponential of a logit or a power of the score is subnormal in double, and 0 in float.
inline double far_logit(Generator& draw) {
  const double values[] = {-720, -460, -100, 100, 720};
  return values[draw.integer(0, 5)];
}

// The target of a score, so far from it that no difference below crosses the bend between them.
inline double apart(double t, double x, bool activated, Generator& draw) {
  const double p = activated ? x : 1 / (1 + std::exp(-x));
  while (t > 0 && std::fabs(t - p) < 0.004) t = draw.uniform(0.05, 0.98);
  return t;
}

template <class F> inline double difference(const F& f, double at) {
  const long double h = 1e-6L;
  return static_cast<double>((f(at + h) - f(at - h)) / (2 * h));
}

// Value and derivatives of one element.
struct Wanted { double value, by_pred, by_target; };
inline Wanted wanted(const Oracle& o, const std::vector<double>& params, double x, double t, bool activated) {
  const Score here(x, activated);
  return {static_cast<double>(o.term(params, here, t, here)),
          difference([&](long double v) { return o.term(params, Score(v, activated), t, here); }, x),
          difference([&](long double v) { return o.term(params, here, v, here); }, t)};
}

}  // namespace gfl::testing
