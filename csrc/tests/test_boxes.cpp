// SPDX-License-Identifier: Apache-2.0
// Distances to boxes and back, against the coordinates written out.
#include "gfl/boxes.h"

#include "float_buffer.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

double held(double x, double lower, double upper) { return x < lower ? lower : (x > upper ? upper : x); }

// The test's own rounding: every coordinate is one operation, so results are equal, not close.
double rounded_to(DType dtype, double x) {
  return dtype == DType::f64 ? x : static_cast<double>(static_cast<float>(x));
}

void boxes(Generator& generator, DType dtype, int64_t outer, int64_t inner, bool clipped, size_t shift = 0) {
  const int64_t n = outer * inner;
  const size_t count = static_cast<size_t>(n);
  // One grid of points for all outer items, one limit for each.
  FloatBuffer points(dtype, uniforms(generator, static_cast<size_t>(2 * inner), 0, 100));
  FloatBuffer distance(dtype, uniforms(generator, shift + 4 * count, -20, 60));
  FloatBuffer limit(dtype, uniforms(generator, static_cast<size_t>(2 * outer), 60, 110));
  FloatBuffer grad(dtype, uniforms(generator, shift + 4 * count, -1, 1));
  FloatBuffer result(dtype, shift + 4 * count), grad_points(dtype, 2 * count), grad_distance(dtype, shift + 4 * count);
  const DistanceToBoxInput in{
      dtype,  outer,          inner, points.data(), distance.at(shift), clipped ? limit.data() : nullptr,
      {0, 2}, {4 * inner, 4}, {2, 0}};
  GFL_RUN(n, distance_to_box_forward, in, result.at(shift));
  GFL_RUN(n, distance_to_box_backward, in, grad.at(shift), grad_points.data(), grad_distance.at(shift));
  const std::vector<double> p = points.read(), d = distance.read(shift), l = limit.read(), g = grad.read(shift);
  std::vector<double> want(4 * count), want_points(2 * count, 0.0), want_distance(4 * count);
  for (int64_t i = 0; i < n; ++i) {
    for (int side = 0; side < 4; ++side) {
      const size_t k = static_cast<size_t>(4 * i + side);
      const double sign = side < 2 ? -1 : 1;
      const double x = rounded_to(dtype, p[static_cast<size_t>(2 * (i % inner) + side % 2)] + sign * d[k]);
      const double upper = clipped ? l[static_cast<size_t>(2 * (i / inner) + 1 - side % 2)] : HUGE_VAL;
      const double lower = clipped ? 0 : -HUGE_VAL;
      want[k] = held(x, lower, upper);
      want_distance[k] = want[k] == x ? sign * g[k] : 0;
      want_points[static_cast<size_t>(2 * i + side % 2)] += want[k] == x ? g[k] : 0;
    }
  }
  expect_close(result.read(shift), want, 0, "distance_to_box");
  expect_close(grad_distance.read(shift), want_distance, 0, "distance_to_box, gradient of the distance");
  expect_close(grad_points.read(), want_points, 2 * rounding(dtype), "distance_to_box, gradient of the points");
}

// Boxes with `gap` unused numbers after each; results and gradients begin `shift` elements after their buffers do.
void distances(Generator& generator, DType dtype, int64_t outer, int64_t inner, bool clamped, int64_t gap,
               size_t shift = 0) {
  const int64_t n = outer * inner, row = 4 + gap;
  const size_t count = static_cast<size_t>(n);
  FloatBuffer points(dtype, uniforms(generator, 2 * count, 0, 100));
  FloatBuffer box(dtype, uniforms(generator, static_cast<size_t>(row) * count, 0, 100));
  FloatBuffer grad(dtype, uniforms(generator, shift + 4 * count, -1, 1));
  FloatBuffer result(dtype, shift + 4 * count), grad_points(dtype, 2 * count), grad_boxes(dtype, shift + 4 * count);
  const double upper = 29.9;
  const BoxToDistanceInput in{dtype,   outer, inner, points.data(), box.data(), {2 * inner, 2}, {row * inner, row},
                              clamped, upper};
  GFL_RUN(n, box_to_distance_forward, in, result.at(shift));
  GFL_RUN(n, box_to_distance_backward, in, grad.at(shift), grad_points.data(), grad_boxes.at(shift));
  const std::vector<double> p = points.read(), b = box.read(), g = grad.read(shift);
  std::vector<double> want(4 * count), want_points(2 * count, 0.0), want_boxes(4 * count);
  for (int64_t i = 0; i < n; ++i) {
    for (int side = 0; side < 4; ++side) {
      const size_t k = static_cast<size_t>(4 * i + side);
      const double sign = side < 2 ? -1 : 1;
      const double x =
          rounded_to(dtype, sign * (b[static_cast<size_t>(row * i + side)] - p[static_cast<size_t>(2 * i + side % 2)]));
      want[k] = clamped ? held(x, 0, rounded_to(dtype, upper)) : x;
      want_boxes[k] = want[k] == x ? sign * g[k] : 0;
      want_points[static_cast<size_t>(2 * i + side % 2)] -= want_boxes[k];
    }
  }
  expect_close(result.read(shift), want, 0, "box_to_distance");
  expect_close(grad_boxes.read(shift), want_boxes, 0, "box_to_distance, gradient of the boxes");
  expect_close(grad_points.read(), want_points, 2 * rounding(dtype), "box_to_distance, gradient of the points");
}

}  // namespace

int main() {
  Generator generator(fresh_seed());
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const bool limited : {false, true}) {
      boxes(generator, dtype, 1, 0, limited);
      boxes(generator, dtype, 1, 1, limited);
      boxes(generator, dtype, 3, 37, limited);
      boxes(generator, dtype, 1, 2100, limited);
      boxes(generator, dtype, 3, 37, limited, 1);
      distances(generator, dtype, 3, 37, limited, 1, 1);
      for (const int64_t gap : {0, 1}) {
        distances(generator, dtype, 1, 0, limited, gap);
        distances(generator, dtype, 1, 2111, limited, gap);
        distances(generator, dtype, 3, 37, limited, gap);
      }
    }
  }
  return result("boxes");
}
