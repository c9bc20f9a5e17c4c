// SPDX-License-Identifier: Apache-2.0
// Decoding and its gradients against a loop over locations, sides and bins.
#include "gfl/bins.h"

#include "bins_oracle.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

// Whether each location has its own point, stride and limit, or all outer items share them.
enum class Sharing { none, grid };

void compare(Generator& generator, const Layout& layout, DType dtype, Sharing sharing, bool clipped,
             double scale_of_logits = 2) {
  const int64_t locations = layout.outer * layout.inner, rows = locations * 4;
  const DType acc = accumulator_of(dtype);
  const bool shared = sharing == Sharing::grid;
  const size_t places = static_cast<size_t>(shared ? layout.inner : locations);
  FloatBuffer pred(dtype, logits(generator, layout, scale_of_logits));
  FloatBuffer points(acc, uniforms(generator, 2 * places, 0, 64));
  std::vector<double> strides(places);
  for (double& stride : strides) stride = static_cast<double>(8 << generator.integer(0, 4));
  FloatBuffer scale(acc, strides);
  // One limit per outer item where the grid is shared.
  FloatBuffer limit(acc, uniforms(generator, static_cast<size_t>(2 * (shared ? layout.outer : locations)), 40, 80));
  DecodeInput in{};
  in.pred = rows_in(layout, pred, dtype);
  in.points = points.data();
  in.scale = scale.data();
  in.limit = clipped ? limit.data() : nullptr;
  in.stride_points = {shared ? 0 : 2 * layout.inner, 2};
  in.stride_scale = {shared ? 0 : layout.inner, 1};
  in.stride_limit = shared ? LocationStride{2, 0} : LocationStride{2 * layout.inner, 2};

  const size_t sides = static_cast<size_t>(rows);
  FloatBuffer boxes(acc, sides), grad_boxes(acc, uniforms(generator, sides, -2, 2));
  FloatBuffer grad_pred(dtype, sides * static_cast<size_t>(layout.bins)), grad_points(acc, sides / 2);
  GFL_RUN(locations, decode_forward, in, boxes.data());
  GFL_RUN(locations, decode_backward, in, grad_boxes.data(), grad_pred.data(), grad_points.data());

  const std::vector<double> values = pred.read(), point = points.read(), pixels = scale.read(), bound = limit.read(),
                            grad = grad_boxes.read(), got = boxes.read(), got_pred = grad_pred.read();
  std::vector<double> want, want_pred, want_points(static_cast<size_t>(rows / 2), 0.0), kept_pred;
  std::vector<bool> doubtful_point(static_cast<size_t>(rows / 2), false);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t location = row / 4, side = row % 4, axis = side % 2;
    const size_t place = static_cast<size_t>(shared ? location % layout.inner : location);
    const size_t item = static_cast<size_t>(shared ? location / layout.inner : location);
    const double sign = side < 2 ? -1 : 1;
    const Row x = row_of(layout, values, row);
    const double at =
        point[2 * place + static_cast<size_t>(axis)] + sign * static_cast<double>(expectation(x)) * pixels[place];
    const double upper = clipped ? bound[2 * item + static_cast<size_t>(1 - axis)] : HUGE_VAL;
    const double lower = clipped ? 0 : -HUGE_VAL;
    want.push_back(std::fmin(std::fmax(at, lower), upper));
    // Within rounding of the border either answer is right.
    const bool doubtful = std::abs(at - lower) < 1e-3 || std::abs(at - upper) < 1e-3;
    const double through = at >= lower && at <= upper ? grad[static_cast<size_t>(row)] : 0;
    const size_t i = static_cast<size_t>(2 * location + axis);
    want_points[i] += through;
    if (doubtful) doubtful_point[i] = true;
    for (size_t j = 0; j < x.size(); ++j) {
      const size_t k = static_cast<size_t>(row * layout.bins) + j;
      want_pred.push_back(doubtful ? got_pred[k] : through * sign * pixels[place] * slope(expectation, x, j));
    }
  }
  std::vector<double> got_points = grad_points.read();
  for (size_t i = 0; i < got_points.size(); ++i) {
    if (doubtful_point[i]) got_points[i] = want_points[i];
  }
  char what[128];
  std::snprintf(what, sizeof what, "%s %s locations %lld bins %lld%s%s", layout.name, name_of(dtype),
                static_cast<long long>(locations), static_cast<long long>(layout.bins), shared ? " shared grid" : "",
                clipped ? " clipped" : "");
  const double size = 64 * static_cast<double>(layout.bins);
  expect_close(got, want, bins_tolerance(acc, acc, size), what);
  expect_close(got_points, want_points, 4 * rounding(acc), what);
  expect_close(got_pred, want_pred, bins_tolerance(acc, dtype, size), what);
}

}  // namespace

int main() {
  Generator generator(fresh_seed());
  for (const DType dtype : kDTypes) {
    for (const int64_t locations : {0, 1, 31, 32, 33, 70}) {
      compare(generator, dense_layout(locations, 4, 17), dtype, Sharing::none, locations % 2 == 1);
    }
    compare(generator, padded_layout(9, 4, 17), dtype, Sharing::none, true);
    compare(generator, planar_layout(2, 35, 4, 17), dtype, Sharing::none, true);
    compare(generator, planar_layout(3, 13, 4, 17), dtype, Sharing::grid, true);
    compare(generator, planar_layout(2, 5, 4, 8), dtype, Sharing::grid, false);
    for (const int64_t bins : {5, 6, 7, 8}) {
      compare(generator, planar_layout(1, 3, 4, bins), dtype, Sharing::none, false, kSteep);
    }
    compare(generator, planar_layout(2, 5, 4, 20), dtype, Sharing::grid, true);
    compare(generator, dense_layout(5, 4, 19), dtype, Sharing::none, true);
    compare(generator, dense_layout(9, 4, 129), dtype, Sharing::none, true);
  }
  return result("decode");
}
