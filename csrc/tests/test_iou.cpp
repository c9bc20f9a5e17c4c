// SPDX-License-Identifier: Apache-2.0
// IoU losses against their formulas in long double; derivatives against differences of those.
#include "gfl/boxes.h"

#include <algorithm>
#include <string>

#include "float_buffer.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

struct Kind {
  std::string name;
  double parameter;
};
const Kind kKinds[] = {{"overlap", 0}, {"iou", 0},    {"giou", 0}, {"diou", 0},  {"ciou", 0},
                       {"eiou", 0.1},  {"eiou", 0.5}, {"siou", 1}, {"siou", -1}, {"mpdiou", 5000}};
using Real = long double;

// The intersection signed by inclusion and exclusion, in the terms of mmdet's eiou_loss.
Real extended_iou_loss(const Real* p, const Real* t, Real smooth_point, Real eps) {
  Real first[2], second[2];
  for (int a = 0; a < 2; ++a) {
    first[a] = std::max(p[a], t[a]) - std::min(p[a], t[a]);
    second[a] = std::min(p[a + 2], t[a + 2]) - std::min(p[a], t[a]);
  }
  const Real overlap = second[0] * second[1] + std::min(first[0], second[0]) * std::min(first[1], second[1]) -
                       first[0] * std::max(first[1], second[1]) - std::max(first[0], second[0]) * first[1];
  const Real area = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - overlap + eps;
  const Real cost = 1 - overlap / area;
  return cost < smooth_point ? cost * cost / smooth_point / 2 : cost - smooth_point / 2;
}

// With the angle itself, as the paper has it.
Real siou_loss(const Real* p, const Real* t, bool neg_gamma, Real eps) {
  Real inner = 1, area_p = 1, area_t = 1, way[2], outer[2], shape = 0;
  for (int a = 0; a < 2; ++a) {
    inner *= std::max<Real>(0, std::min(p[a + 2], t[a + 2]) - std::max(p[a], t[a]));
    const Real size_p = p[a + 2] - p[a], size_t = t[a + 2] - t[a];
    area_p *= size_p;
    area_t *= size_t;
    way[a] = (t[a] + t[a + 2] - p[a] - p[a + 2]) / 2 + eps;
    outer[a] = std::max(eps, std::max(p[a + 2], t[a + 2]) - std::min(p[a], t[a]));
    const Real difference = std::fabs(size_p - size_t) / (std::max(size_p, size_t) + eps);
    shape += std::pow(1 - std::exp(-difference), Real(4));
  }
  const Real angle = std::sin(2 * std::asin(std::fabs(way[1]) / std::sqrt(way[0] * way[0] + way[1] * way[1])));
  const Real gamma = neg_gamma ? angle - 2 : 2 - angle;
  Real distance = 0;
  for (int a = 0; a < 2; ++a) distance += 1 - std::exp(gamma * way[a] * way[a] / outer[a] / outer[a]);
  const Real value = inner / (area_p + area_t - inner + eps) - (distance + shape) / 2;
  return 1 - std::min<Real>(1, std::max<Real>(-1, value));
}

// `alpha`: CIoU's factor, constant in its derivative; negative to have it computed and returned in `used`.
Real formula(const Real* p, const Real* t, const Kind& kind, Real eps, Real alpha, Real* used) {
  const std::string& name = kind.name;
  if (name == "eiou") return extended_iou_loss(p, t, kind.parameter, eps);
  if (name == "siou") return siou_loss(p, t, kind.parameter < 0, eps);
  const Real width = std::max<Real>(0, std::min(p[2], t[2]) - std::max(p[0], t[0]));
  const Real height = std::max<Real>(0, std::min(p[3], t[3]) - std::max(p[1], t[1]));
  const Real outer_width = std::max<Real>(0, std::max(p[2], t[2]) - std::min(p[0], t[0]));
  const Real outer_height = std::max<Real>(0, std::max(p[3], t[3]) - std::min(p[1], t[1]));
  const Real pw = p[2] - p[0], ph = p[3] - p[1], tw = t[2] - t[0], th = t[3] - t[1];
  const Real area = pw * ph + tw * th - width * height;
  const bool adds_eps = name == "diou" || name == "ciou" || name == "mpdiou";
  const Real iou = width * height / (adds_eps ? area + eps : std::max(area, eps));
  if (name == "overlap") return iou;
  if (name == "iou") return 1 - iou;
  if (name == "mpdiou") {
    Real corners = 0;
    for (int i = 0; i < 4; ++i) corners += (p[i] - t[i]) * (p[i] - t[i]);
    return 1 - iou + corners / kind.parameter;
  }
  if (name == "giou") {
    const Real enclosing = std::max(outer_width * outer_height, eps);
    return 1 - iou + (enclosing - std::max(area, eps)) / enclosing;
  }
  const Real dx = (p[0] + p[2] - t[0] - t[2]) / 2, dy = (p[1] + p[3] - t[1] - t[3]) / 2;
  const Real value = iou - (dx * dx + dy * dy) / (outer_width * outer_width + outer_height * outer_height + eps);
  if (name == "diou") return 1 - value;
  const Real angle = std::atan(tw / (th + eps)) - std::atan(pw / (ph + eps));
  const Real pi = 3.14159265358979323846264338327950288L, v = 4 / (pi * pi) * angle * angle;
  *used = alpha >= 0 ? alpha : iou > 0.5L ? v / (1 - iou + v) : 0;
  return 1 - std::min<Real>(1, std::max<Real>(-1, value - *used * v));
}

void backward(const IouInput& in, const void* grad, void* grad_pred, void* grad_target) {
  GFL_RUN(in.rows, iou_backward, in, grad, grad_pred, grad_target);
}

template <class T> void check(const Kind& kind, int64_t rows, DType dtype, double epsilon, Generator& draw) {
  using A = acc_t<T>;
  const char* const name = kind.name.c_str();
  std::vector<double> pred_values(rows * 4), target_values(rows * 4), grad_values(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int axis = 0; axis < 2; ++axis) {
      const double centre = draw.uniform(-20, 60), size = draw.uniform(4, 40);
      target_values[row * 4 + axis] = centre - size / 2;
      target_values[row * 4 + axis + 2] = centre + size / 2;
      pred_values[row * 4 + axis] = centre - size / 2 + draw.normal(size * 0.2);
      pred_values[row * 4 + axis + 2] = centre + size / 2 + draw.normal(size * 0.2);
    }
    grad_values[row] = draw.normal(2);
  }
  const std::vector<T> pred_rounded = rounded<T>(pred_values);
  const std::vector<A> target_rounded = rounded<A>(target_values), grad_rounded = rounded<A>(grad_values);
  const std::vector<double> p = widened(pred_rounded), t = widened(target_rounded), g = widened(grad_rounded);
  const Buffer<T> pred(pred_rounded);
  const Buffer<A> target(target_rounded), grad(grad_rounded);
  Buffer<A> loss(rows), grad_target(rows * 4);
  Buffer<T> grad_pred(rows * 4), alone(rows * 4);
  const IouInput in{pred.data(), dtype, 4, 1, target.data(), rows, name, 1e-6, kind.parameter};
  GFL_RUN(rows, iou_forward, in, loss.data());
  backward(in, grad.data(), grad_pred.data(), grad_target.data());
  backward(in, grad.data(), alone.data(), nullptr);
  const std::vector<double> got = widened(loss.read()), got_pred = widened(grad_pred.read());
  const std::vector<double> got_target = widened(grad_target.read());

  // The same boxes with gaps between rows and sides, which no vector access suits.
  std::vector<T> spread(static_cast<size_t>(rows * 9 + 1));
  for (int64_t i = 0; i < rows * 4; ++i) spread[static_cast<size_t>(i / 4 * 9 + i % 4 * 2 + 1)] = pred_rounded[i];
  const Buffer<T> strided(spread);
  Buffer<A> loss_again(rows);
  Buffer<T> grad_again(rows * 4);
  const IouInput gaps{strided.data() + 1, dtype, 9, 2, target.data(), rows, name, 1e-6, kind.parameter};
  GFL_RUN(rows, iou_forward, gaps, loss_again.data());
  backward(gaps, grad.data(), grad_again.data(), nullptr);
  CHECK(widened(loss_again.read()) == got, "%s: the loss depends on the strides", name);
  CHECK(widened(grad_again.read()) == got_pred, "%s: the gradient depends on the strides", name);

  // Targets and gradients that begin at an odd element.
  std::vector<A> behind(1);
  behind.insert(behind.end(), target_rounded.begin(), target_rounded.end());
  const Buffer<A> odd_target(behind);
  Buffer<T> odd_pred(rows * 4 + 1);
  Buffer<A> odd_grad(rows * 4 + 1), odd_loss(rows);
  const IouInput odd{strided.data() + 1, dtype, 9, 2, odd_target.data() + 1, rows, name, 1e-6, kind.parameter};
  GFL_RUN(rows, iou_forward, odd, odd_loss.data());
  backward(odd, grad.data(), odd_pred.data() + 1, odd_grad.data() + 1);
  const std::vector<double> shifted_pred = widened(odd_pred.read()), shifted_target = widened(odd_grad.read());
  CHECK(widened(odd_loss.read()) == got, "%s: the loss depends on the address", name);
  CHECK(std::equal(got_pred.begin(), got_pred.end(), shifted_pred.begin() + 1), "%s: grad_pred at odd places", name);
  CHECK(std::equal(got_target.begin(), got_target.end(), shifted_target.begin() + 1), "%s: grad_target at odd places",
        name);

  const double chain = sizeof(A) == 8 ? 1e-8 : 3e-5;
  for (int64_t row = 0; row < rows; ++row) {
    Real sides[8], alpha = 0, ignored;
    for (int i = 0; i < 4; ++i) {
      sides[i] = p[row * 4 + i];
      sides[4 + i] = t[row * 4 + i];
    }
    const Real eps = static_cast<A>(1e-6);
    const double want = static_cast<double>(formula(sides, sides + 4, kind, eps, -1, &alpha));
    CHECK(close(got[row], want, chain, chain), "%s loss[%lld] %g, not %g", name, static_cast<long long>(row), got[row],
          want);
    for (int i = 0; i < 8; ++i) {
      const Real at = sides[i], h = 1e-6L;
      sides[i] = at + h;
      const Real above = formula(sides, sides + 4, kind, eps, alpha, &ignored);
      sides[i] = at - h;
      const Real below = formula(sides, sides + 4, kind, eps, alpha, &ignored);
      sides[i] = at;
      const double slope = g[row] * static_cast<double>((above - below) / (2 * h));
      const double found = i < 4 ? got_pred[row * 4 + i] : got_target[row * 4 + i - 4];
      const double rounding = i < 4 ? epsilon : 0;
      CHECK(close(found, slope, chain + rounding, chain + rounding * 1e-4), "%s row %lld side %d: %g, not %g", name,
            static_cast<long long>(row), i, found, slope);
    }
  }
  CHECK(widened(alone.read()) == got_pred, "%s: grad_pred depends on grad_target", name);
}

// Boxes without area, equal, turned round: finite, and half the derivative to either side of a tie.
void check_degenerate() {
  const std::vector<float> pairs[2] = {{5, 5, 5, 5, 0, 0, 4, 4, 3, 3, 1, 1}, {5, 5, 5, 5, 0, 0, 4, 4, 0, 0, 9, 9}};
  const Buffer<float> pred(pairs[0]), target(pairs[1]), grad(std::vector<float>{1, 1, 1});
  for (const Kind& kind : kKinds) {
    const char* const name = kind.name.c_str();
    const IouInput in{pred.data(), DType::f32, 4, 1, target.data(), 3, name, 1e-7, kind.parameter};
    Buffer<float> loss(3), grad_pred(12), grad_target(12);
    GFL_RUN(3, iou_forward, in, loss.data());
    backward(in, grad.data(), grad_pred.data(), grad_target.data());
    for (const auto& values : {loss.read(), grad_pred.read(), grad_target.read()}) {
      for (const float v : values) CHECK(std::isfinite(v), "%s gives %g for a degenerate box", name, v);
    }
    if (kind.name != "giou") continue;
    const std::vector<float> g = grad_pred.read();
    // Equal boxes of side 4: IoU 1 changes by ∓1/8 a side on half of a tie, and the union with it.
    CHECK(g[4] == g[5] && g[6] == g[7] && g[4] == -g[6], "ties %g %g %g %g", g[4], g[5], g[6], g[7]);
  }
}

}  // namespace

int main() {
  Generator draw(20191119);
  for (const Kind& kind : kKinds) {
    for (const int64_t rows : {0, 1, 37}) {
      check<float>(kind, rows, DType::f32, 0, draw);
      check<double>(kind, rows, DType::f64, 0, draw);
      check<half_t>(kind, rows, DType::f16, 1e-3, draw);
      check<bfloat16_t>(kind, rows, DType::bf16, 8e-3, draw);
    }
  }
  check_degenerate();
  return result("iou");
}
