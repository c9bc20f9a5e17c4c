// SPDX-License-Identifier: Apache-2.0
// Integral and its gradient against a loop over the bins.
#include "gfl/integral.h"

#include "bins_oracle.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

void compare(Generator& generator, const Layout& layout, DType dtype) {
  const int64_t rows = layout.outer * layout.inner * layout.sides;
  FloatBuffer pred(dtype, normals(generator, static_cast<size_t>(layout.elements), 2));
  const std::vector<double> values = pred.read();
  const DType acc = accumulator_of(dtype);
  FloatBuffer grad_distance(acc, uniforms(generator, static_cast<size_t>(rows), -2, 2));
  const std::vector<double> grads = grad_distance.read();
  FloatBuffer distance(acc, static_cast<size_t>(rows));
  FloatBuffer grad_pred(dtype, static_cast<size_t>(rows * layout.bins));
  const BinRows in = rows_in(layout, pred, dtype);
  GFL_RUN(rows, integral_forward, in, distance.data());
  GFL_RUN(rows, integral_backward, in, grad_distance.data(), grad_pred.data());

  std::vector<double> want, want_grad;
  for (int64_t row = 0; row < rows; ++row) {
    const Row x = row_of(layout, values, row);
    want.push_back(static_cast<double>(expectation(x)));
    const double scale = grads[static_cast<size_t>(row)];
    for (size_t j = 0; j < x.size(); ++j) want_grad.push_back(scale * slope(expectation, x, j));
  }
  char what[96];
  std::snprintf(what, sizeof what, "%s %s rows %lld bins %lld", layout.name, name_of(dtype),
                static_cast<long long>(rows), static_cast<long long>(layout.bins));
  const double size = static_cast<double>(layout.bins);
  expect_close(distance.read(), want, bins_tolerance(acc, acc, size), what);
  expect_close(grad_pred.read(), want_grad, bins_tolerance(acc, dtype, size), what);
}

// Infinite and huge logits: the largest share the probability, the gradient there is 0, a NaN spreads over its row
// alone.
void special_values() {
  const double infinity = HUGE_VAL, nan = std::nan("");
  const std::vector<double> logits = {infinity, 0,        infinity,  -infinity, -infinity, -infinity,
                                      3e38,     -3e38,    1,         nan,       0,         1};
  const std::vector<double> want = {1, 1, 0, nan};
  FloatBuffer pred(DType::f32, logits), distance(DType::f32, size_t{4}), ones(DType::f32, std::vector<double>(4, 1.0));
  FloatBuffer grad(DType::f32, logits.size());
  const BinRows in = rows_in(dense_layout(4, 1, 3), pred, DType::f32);
  GFL_RUN(4, integral_forward, in, distance.data());
  GFL_RUN(4, integral_backward, in, ones.data(), grad.data());
  expect_close(distance.read(), want, 1e-6, "special values");
  const std::vector<double> slopes = grad.read();
  for (size_t i = 0; i < 9; ++i) CHECK(slopes[i] == 0, "gradient %zu of a special value is %g", i, slopes[i]);
  for (size_t i = 9; i < 12; ++i) CHECK(std::isnan(slopes[i]), "gradient %zu beside a NaN is %g", i, slopes[i]);
}

}  // namespace

int main() {
  Generator generator(fresh_seed());
  for (const DType dtype : kDTypes) {
    for (const int64_t locations : {0, 1, 7, 33, 65}) compare(generator, dense_layout(locations, 4, 17), dtype);
    compare(generator, padded_layout(9, 4, 17), dtype);
    compare(generator, planar_layout(2, 35, 4, 17), dtype);
    compare(generator, planar_layout(3, 1, 4, 8), dtype);
    compare(generator, dense_layout(5, 4, 2), dtype);
    compare(generator, dense_layout(9, 4, 129), dtype);
    compare(generator, planar_layout(2, 5, 4, 129), dtype);
  }
  special_values();
  return result("integral");
}
