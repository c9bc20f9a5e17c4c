// SPDX-License-Identifier: Apache-2.0
// Integral and its gradient against a loop over the bins.
#include "gfl/bins.h"

#include "bins_oracle.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

void compare(Generator& generator, const Layout& layout, DType dtype, double scale_of_logits = 2) {
  const int64_t rows = layout.outer * layout.inner * layout.sides;
  FloatBuffer pred(dtype, logits(generator, layout, scale_of_logits));
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
  const std::vector<double> values = {infinity, 0,     infinity, -infinity, -infinity, -infinity,
                                      3e38,     -3e38, 1,        nan,       0,         1};
  const std::vector<double> want = {1, 1, 0, nan};
  FloatBuffer pred(DType::f32, values), distance(DType::f32, size_t{4}), ones(DType::f32, std::vector<double>(4, 1.0));
  FloatBuffer grad(DType::f32, values.size());
  const BinRows in = rows_in(dense_layout(4, 1, 3), pred, DType::f32);
  GFL_RUN(4, integral_forward, in, distance.data());
  GFL_RUN(4, integral_backward, in, ones.data(), grad.data());
  expect_close(distance.read(), want, 1e-6, "special values");
  const std::vector<double> slopes = grad.read();
  for (size_t i = 0; i < 9; ++i) CHECK(slopes[i] == 0, "gradient %zu of a special value is %g", i, slopes[i]);
  for (size_t i = 9; i < 12; ++i) CHECK(std::isnan(slopes[i]), "gradient %zu beside a NaN is %g", i, slopes[i]);
}

#if !defined(GFL_TEST_CUDA)
// A row has the same bits alone, in the middle of others and in another layout.
void same_bits_anywhere(Generator& generator, DType dtype, int64_t bins) {
  constexpr int64_t kLocations = 45;
  const Layout dense = dense_layout(kLocations, 4, bins), planar = planar_layout(1, kLocations, 4, bins);
  const std::vector<double> values = normals(generator, static_cast<size_t>(dense.elements), 3);
  std::vector<double> turned(values.size());
  for (int64_t i = 0; i < kLocations; ++i) {
    for (int64_t c = 0; c < 4 * bins; ++c) {
      turned[static_cast<size_t>(c * kLocations + i)] = values[static_cast<size_t>(i * 4 * bins + c)];
    }
  }
  FloatBuffer rows(dtype, values), columns(dtype, turned);
  const int64_t count = 4 * kLocations;
  const size_t n = static_cast<size_t>(count);
  FloatBuffer slopes(accumulator_of(dtype), normals(generator, n));
  const DType acc = accumulator_of(dtype);
  FloatBuffer at_once(acc, n), one_by_one(acc, n), by_column(acc, n);
  FloatBuffer grad(dtype, values.size()), grad_one_by_one(dtype, values.size()), grad_by_column(dtype, values.size());
  const BinRows in = rows_in(dense, rows, dtype), turned_in = rows_in(planar, columns, dtype);
  cpu::integral_forward(in, at_once.data(), 0, count);
  cpu::integral_backward(in, slopes.data(), grad.data(), 0, count);
  for (int64_t row = 0; row < count; ++row) {
    cpu::integral_forward(in, one_by_one.data(), row, row + 1);
    cpu::integral_backward(in, slopes.data(), grad_one_by_one.data(), row, row + 1);
  }
  GFL_RUN(count, integral_forward, turned_in, by_column.data());
  GFL_RUN(count, integral_backward, turned_in, slopes.data(), grad_by_column.data());
  CHECK(at_once.read() == one_by_one.read(), "%s: a row alone differs", name_of(dtype));
  CHECK(at_once.read() == by_column.read(), "%s: a row in the other layout differs", name_of(dtype));
  CHECK(grad.read() == grad_one_by_one.read(), "%s: the gradient of a row alone differs", name_of(dtype));
  CHECK(grad.read() == grad_by_column.read(), "%s: the gradient in the other layout differs", name_of(dtype));
}
#endif

}  // namespace

int main() {
  Generator generator(fresh_seed());
  for (const DType dtype : kDTypes) {
    for (const int64_t locations : {0, 1, 7, 33, 65}) compare(generator, dense_layout(locations, 4, 17), dtype);
    compare(generator, padded_layout(9, 4, 17), dtype);
    compare(generator, planar_layout(2, 35, 4, 17), dtype);
    compare(generator, planar_layout(3, 1, 4, 8), dtype);
    for (const int64_t bins : {5, 6, 7, 8}) compare(generator, planar_layout(1, 9, 1, bins), dtype, kSteep);
    compare(generator, dense_layout(5, 4, 2), dtype);
    compare(generator, planar_layout(2, 5, 4, 20), dtype);
    compare(generator, dense_layout(5, 4, 19), dtype);
    compare(generator, dense_layout(9, 4, 129), dtype);
    compare(generator, planar_layout(2, 5, 4, 129), dtype);
#if !defined(GFL_TEST_CUDA)
    for (const int64_t bins : {2, 17, 18, 129}) same_bits_anywhere(generator, dtype, bins);
#endif
  }
  special_values();
  return result("integral");
}
