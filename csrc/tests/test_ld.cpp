// SPDX-License-Identifier: Apache-2.0
// Distillation with a temperature and its gradient, against the definition in long double: rows of every
// layout, short, long, and too long for a block's shared memory.
#include "gfl/bins.h"

#include "bins_oracle.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

// T²/n Σ q (log q − log p)
long double divergence(const Row& pred, const Row& teacher, long double t) {
  Row a = pred, b = teacher;
  for (long double& value : a) value /= t;
  for (long double& value : b) value /= t;
  const long double log_total_a = log_sum_exp(a), log_total_b = log_sum_exp(b);
  long double sum = 0;
  for (size_t j = 0; j < a.size(); ++j) {
    const long double log_p = a[j] - log_total_a, log_q = b[j] - log_total_b;
    sum += std::exp(log_q) * (log_q - log_p);
  }
  return sum * t * t / static_cast<long double>(a.size());
}

// The rows begin `shift` elements after the buffers do.
LdInput input_of(const Layout& pred, FloatBuffer& x, const Layout& teacher, FloatBuffer& z, DType dtype, double t,
                 size_t shift = 0) {
  return {x.at(shift), z.at(shift),
          dtype,       pred.inner,
          pred.bins,   pred.location.inner,
          pred.bin,    teacher.location.inner,
          teacher.bin, t};
}

void compare(Generator& generator, const Layout& pred, const Layout& teacher, DType dtype, double t, size_t shift,
             double scale_of_logits = 3) {
  const size_t n = static_cast<size_t>(pred.inner), bins = static_cast<size_t>(pred.bins);
  const DType acc = accumulator_of(dtype);
  const auto drawn = [&](const Layout& layout) {
    std::vector<double> values = logits(generator, layout, scale_of_logits);
    values.insert(values.begin(), shift, std::nan(""));
    return values;
  };
  FloatBuffer x(dtype, drawn(pred)), z(dtype, drawn(teacher));
  FloatBuffer grad_loss(acc, uniforms(generator, n, -2, 2)), loss(acc, n), grad(dtype, n * bins);
  const LdInput in = input_of(pred, x, teacher, z, dtype, t, shift);
  GFL_RUN(pred.inner, ld_forward, in, loss.data());
  GFL_RUN(pred.inner, ld_backward, in, grad_loss.data(), grad.data());

  char what[160];
  std::snprintf(what, sizeof what, "%s/%s %s rows %zu bins %zu T %g", pred.name, teacher.name, name_of(dtype), n, bins,
                t);
  const std::vector<double> xs = x.read(shift), zs = z.read(shift), scale = grad_loss.read(), got_grad = grad.read();
  // Terms of both signs cancel: logarithms up to log n + the range of the logits over T, times T²/n.
  const double count = static_cast<double>(bins);
  const double range = 10 * scale_of_logits, size = std::fmax(1, t * t / count * (std::log(count) + range / t));
  std::vector<double> want, got_some, want_some;
  for (size_t i = 0; i < n; ++i) {
    const Row p = row_of(pred, xs, static_cast<int64_t>(i)), q = row_of(teacher, zs, static_cast<int64_t>(i));
    want.push_back(static_cast<double>(divergence(p, q, t)));
    const auto of_row = [&](const Row& row) { return divergence(row, q, t); };
    // A slope takes time in proportion to the row: of long rows only some bins are tested, always with the last.
    for (size_t j = 0; j < bins; ++j) {
      if (bins > 64 && j + 1 < bins && generator.uniform() > 12 / count) continue;
      got_some.push_back(got_grad[i * bins + j]);
      want_some.push_back(scale[i] * slope(of_row, p, j));
    }
  }
  expect_close(loss.read(), want, bins_tolerance(acc, acc, size), what);
  expect_close(got_some, want_some, bins_tolerance(acc, dtype, std::fmax(1, t / count)), what);
  // Every element has been written, and the gradient of a row adds up to 0.
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    for (size_t j = 0; j < bins; ++j) sum += got_grad[i * bins + j];
    // Twice what arrives at most, in parts that are rounded each, subnormal halves to multiples of 2^-24.
    const double allowed = t / count * (4 * 64 * rounding(acc) + 4 * rounding(dtype)) + count * 0x1p-25;
    CHECK(std::fabs(sum) <= allowed, "%s row %zu: the gradient adds up to %g", what, i, sum);
  }
}

void equal_rows_cost_nothing(Generator& generator, DType dtype, int64_t bins) {
  const Layout layout = dense_layout(19, 1, bins);
  const size_t n = static_cast<size_t>(layout.elements);
  FloatBuffer x(dtype, normals(generator, n, 1e4)), ones(accumulator_of(dtype), std::vector<double>(19, 1.0));
  FloatBuffer loss(accumulator_of(dtype), size_t{19}), grad(dtype, n);
  const LdInput in = input_of(layout, x, layout, x, dtype, 0.5);
  GFL_RUN(19, ld_forward, in, loss.data());
  GFL_RUN(19, ld_backward, in, ones.data(), grad.data());
  expect_close(loss.read(), std::vector<double>(19, 0.0), 0, "loss of equal rows");
  expect_close(grad.read(), std::vector<double>(n, 0.0), 0, "gradient of equal rows");
}

// Infinite logits count as the largest that count, without gradient; NaN stays in its row. `filler` more bins without
// weight select the code for longer rows.
void special_values(DType dtype, double t, int64_t filler) {
  const double infinity = HUGE_VAL, nan = std::nan("");
  const double pairs[][4] = {{infinity, -infinity, -infinity, infinity},  // both at the bounds, apart
                             {1, 3, infinity, -infinity},                 // the teacher is certain
                             {infinity, 0, 0, -infinity},                 // so is the student, of the same
                             {-infinity, 0, -infinity, 0},                // equal
                             {nan, 0, 1, 2},
                             {1, 2, 0, nan}};
  const size_t rows = sizeof pairs / sizeof pairs[0], bins = 2 + static_cast<size_t>(filler);
  std::vector<double> xs, zs;
  for (const auto& pair : pairs) {
    for (int j = 0; j < 2; ++j) xs.push_back(pair[j]), zs.push_back(pair[2 + j]);
    xs.resize(xs.size() + bins - 2, -infinity);
    zs.resize(zs.size() + bins - 2, -infinity);
  }
  const DType acc = accumulator_of(dtype);
  FloatBuffer x(dtype, xs), z(dtype, zs), ones(acc, std::vector<double>(rows, 1.0));
  FloatBuffer loss(acc, rows), grad(dtype, rows * bins);
  const Layout layout = dense_layout(static_cast<int64_t>(rows), 1, static_cast<int64_t>(bins));
  const LdInput in = input_of(layout, x, layout, z, dtype, t);
  GFL_RUN(layout.inner, ld_forward, in, loss.data());
  GFL_RUN(layout.inner, ld_backward, in, ones.data(), grad.data());
  const double largest = acc == DType::f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  const double n = static_cast<double>(bins), limit = largest / 4 * std::fmin(t, 1);
  const double second = 1 / (1 + std::exp(-2 / t));  // p of the logits 1 and 3
  const std::vector<double> got = loss.read(), slopes = grad.read();
  // The first is more than the loss's dtype holds where T is far above n: an infinite loss then, but no NaN.
  const double apart = t * t / n * (2 * limit / t), infinite = apart > largest ? HUGE_VAL : apart;
  const double want[] = {infinite, t * t / n * -std::log(1 - second), 0, 0};
  for (size_t i = 0; i < 4; ++i) {
    CHECK(close(got[i], want[i], 1e-5, 1e-5), "T %g, %zu bins, row %zu: %g, expected %g", t, bins, i, got[i], want[i]);
    for (size_t j = 0; j < bins; ++j) {
      const double expected = i == 1 && j < 2 ? t / n * (j == 0 ? -second : second) : 0;
      CHECK(close(slopes[i * bins + j], expected, 1e-5 + rounding(dtype), 1e-6),
            "T %g, %zu bins, gradient %zu of row %zu: %g, expected %g", t, bins, j, i, slopes[i * bins + j], expected);
    }
  }
  for (size_t i = 4; i < rows; ++i) {
    CHECK(std::isnan(got[i]), "T %g, %zu bins: a NaN is lost, the loss is %g", t, bins, got[i]);
    for (size_t j = 0; j < bins; ++j) {
      const bool beyond = std::isinf(xs[i * bins + j]);
      CHECK(beyond ? slopes[i * bins + j] == 0 : std::isnan(slopes[i * bins + j]),
            "T %g, %zu bins, row %zu: gradient %g", t, bins, i, slopes[i * bins + j]);
    }
  }
}

}  // namespace

int main() {
  Generator generator(fresh_seed());
  const double temperatures[] = {10, 1, 0.5};
  for (const DType dtype : kDTypes) {
    int turn = 0;
    const auto run = [&](const Layout& pred, const Layout& teacher, size_t shift = 0) {
      compare(generator, pred, teacher, dtype, temperatures[turn++ % 3], shift);
    };
    for (const int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 37, 128, 130})
      run(dense_layout(rows, 1, 17), dense_layout(rows, 1, 17));
    for (const int64_t bins : {1, 2, 3, 16, 32, 33, 64, 65, 80}) {
      run(dense_layout(21, 1, bins), dense_layout(21, 1, bins));
      run(padded_layout(21, 1, bins), planar_layout(1, 21, 1, bins));
      run(planar_layout(1, 21, 1, bins), padded_layout(21, 1, bins));
    }
    for (const size_t shift : {1, 3}) {  // not where 16 bytes begin
      run(dense_layout(9, 1, 17), dense_layout(9, 1, 17), shift);
      run(dense_layout(9, 1, 80), padded_layout(9, 1, 80), shift);
    }
    // Runs of 16 bytes with a rest of each length, and bins apart from each other.
    for (const int64_t bins : {17, 18, 19, 20, 21, 22, 23}) {
      run(padded_layout(5, 1, bins, 24 - bins), padded_layout(5, 1, bins, 24 - bins));
    }
    for (const int64_t bins : {17, 80}) run(strided_layout(21, bins), strided_layout(21, bins));
    for (const int64_t bins : {17, 20, 80, 6301}) {
      compare(generator, dense_layout(5, 1, bins), dense_layout(5, 1, bins), dtype, 1, 0, kSteep);
    }
    run(dense_layout(9, 1, 6365), dense_layout(9, 1, 6365));
    for (const int64_t bins : {513, 1203, 2051, 6301}) run(dense_layout(3, 1, bins), padded_layout(3, 1, bins));
    run(planar_layout(1, 5, 1, 700), planar_layout(1, 5, 1, 700));
    for (const int64_t bins : {17, 80, 6301}) equal_rows_cost_nothing(generator, dtype, bins);
  }
  for (const double t : {10.0, 1.0, 0.5, 0.1}) {
    for (const int64_t filler : {0, 15, 78, 2100, 6300}) {
      special_values(DType::f32, t, filler);
      if (t != 1) continue;
      for (const DType dtype : {DType::f16, DType::bf16, DType::f64}) special_values(dtype, t, filler);
    }
  }
  return result("ld");
}
