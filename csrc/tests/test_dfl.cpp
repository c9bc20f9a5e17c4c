// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss in both forms, the distance from the same softmax and all gradients, against a loop over the
// bins; a kept softmax and a reduced loss against the plain launchers.
#include "gfl/bins.h"

#include "bins_oracle.h"

using namespace gfl;
using namespace gfl::testing;

namespace {

// What a row means to the loss, found from the target as the rules say it.
struct Meaning {
  size_t left, right;
  double weight_left, weight_right;
  bool counted, inside;
};

Meaning of_position(double y, int64_t last, bool ignore) {
  const bool inside = y >= 0 && y <= static_cast<double>(last);
  const bool counted = ignore ? inside : !std::isnan(y);
  const double held = counted ? std::fmin(std::fmax(y, 0), static_cast<double>(last)) : 0;
  const size_t left = held == static_cast<double>(last) ? static_cast<size_t>(last - 1) : static_cast<size_t>(held);
  return {left, left + 1, static_cast<double>(left + 1) - held, held - static_cast<double>(left), counted, inside};
}

size_t nearest(int64_t bin, int64_t last) { return static_cast<size_t>(bin < 0 ? 0 : (bin > last ? last : bin)); }

void compare(Generator& generator, const Layout& layout, DType dtype, bool two_bin, bool ignore, bool with_distance,
             double scale_of_logits = 2) {
  const int64_t rows = layout.outer * layout.inner * layout.sides, last = layout.bins - 1;
  const size_t n = static_cast<size_t>(rows);
  const DType acc = accumulator_of(dtype);
  FloatBuffer pred(dtype, logits(generator, layout, scale_of_logits));
  const std::vector<double> values = pred.read();
  FloatBuffer grad_loss(acc, uniforms(generator, n, -2, 2)), grad_distance(acc, uniforms(generator, n, -2, 2));
  // A third of the positions lies outside; some are exactly an end, a bin or NaN.
  const double width = static_cast<double>(last);
  std::vector<double> positions = uniforms(generator, n, -width / 4, width * 5 / 4);
  const double exact[] = {0, width, 1, -0.0, std::nan(""), width + 1, -1e30, 1e30};
  for (size_t i = 0; i < 8 && n > 20; ++i) positions[2 * i] = exact[i];
  FloatBuffer target(acc, positions), weight_left(acc, uniforms(generator, n, 0, 1.5)),
      weight_right(acc, uniforms(generator, n, 0, 1.5));
  std::vector<int64_t> lefts(n);
  for (int64_t& left : lefts) left = generator.integer(-2, layout.bins + 2);
  if (n > 20) lefts[3] = INT64_MAX, lefts[5] = INT64_MIN;
  Buffer<int64_t> left(lefts);

  DflInput in{};
  in.pred = rows_in(layout, pred, dtype);
  if (two_bin) {
    in.left = left.data();
    in.weight_left = weight_left.data();
    in.weight_right = weight_right.data();
  } else {
    in.target = target.data();
    in.ignore_out_of_range = ignore;
  }
  FloatBuffer loss(acc, n), distance(acc, n), grad_target(acc, n), grad_left(acc, n), grad_right(acc, n);
  FloatBuffer grad_pred(dtype, n * static_cast<size_t>(layout.bins));
  GFL_RUN(rows, dfl_forward, in, loss.data(), with_distance ? distance.data() : nullptr);
  const DflGradients out{grad_pred.data(), two_bin ? nullptr : grad_target.data(), two_bin ? grad_left.data() : nullptr,
                         two_bin ? grad_right.data() : nullptr};
  GFL_RUN(rows, dfl_backward, in, grad_loss.data(), with_distance ? grad_distance.data() : nullptr, out);

  const std::vector<double> y = target.read(), wl = weight_left.read(), wr = weight_right.read();
  const std::vector<double> scale = grad_loss.read(), scale_distance = grad_distance.read();
  std::vector<double> want_loss, want_distance, want_target, want_left, want_right, want_pred;
  for (size_t i = 0; i < n; ++i) {
    const Row x = row_of(layout, values, static_cast<int64_t>(i));
    Meaning m = of_position(y[i], last, ignore);
    if (two_bin) {
      const int64_t near = lefts[i] < -1 ? -1 : (lefts[i] > last ? last : lefts[i]);
      m = {nearest(near, last), nearest(near + 1, last), wl[i], wr[i], true, true};
    }
    const auto row_loss = [&](const Row& row) -> long double {
      if (!m.counted) return 0;
      return m.weight_left * cross_entropy(row, m.left) + m.weight_right * cross_entropy(row, m.right);
    };
    want_loss.push_back(static_cast<double>(row_loss(x)));
    want_distance.push_back(static_cast<double>(expectation(x)));
    const double entropy_left = static_cast<double>(cross_entropy(x, m.left));
    const double entropy_right = static_cast<double>(cross_entropy(x, m.right));
    want_target.push_back(m.counted && m.inside ? scale[i] * (entropy_right - entropy_left) : 0);
    want_left.push_back(scale[i] * entropy_left);
    want_right.push_back(scale[i] * entropy_right);
    for (size_t j = 0; j < x.size(); ++j) {
      const double of_distance = with_distance ? scale_distance[i] * slope(expectation, x, j) : 0;
      want_pred.push_back(scale[i] * slope(row_loss, x, j) + of_distance);
    }
  }
  char what[128];
  std::snprintf(what, sizeof what, "%s %s rows %zu bins %lld%s%s%s", layout.name, name_of(dtype), n,
                static_cast<long long>(layout.bins), two_bin ? " two-bin" : "", ignore ? " ignore" : "",
                with_distance ? " with distance" : "");
  const double size = with_distance ? static_cast<double>(layout.bins) : 4;
  const double tolerance = bins_tolerance(acc, acc, size);
  expect_close(loss.read(), want_loss, tolerance, what);
  expect_close(grad_pred.read(), want_pred, bins_tolerance(acc, dtype, size), what);
  if (with_distance) expect_close(distance.read(), want_distance, tolerance, what);
  if (two_bin) {
    expect_close(grad_left.read(), want_left, tolerance, what);
    expect_close(grad_right.read(), want_right, tolerance, what);
  } else {
    expect_close(grad_target.read(), want_target, tolerance, what);
  }
}

// A row that does not count has no gradient, whatever its logits; infinite logits give finite losses.
void special_values() {
  const double infinity = HUGE_VAL, nan = std::nan("");
  FloatBuffer pred(DType::f32, std::vector<double>{nan, 1, infinity, -infinity, infinity, -infinity});
  FloatBuffer target(DType::f32, std::vector<double>{nan, 0, 0.5}), ones(DType::f32, std::vector<double>(3, 1.0));
  FloatBuffer loss(DType::f32, size_t{3}), grad(DType::f32, size_t{6}), grad_target(DType::f32, size_t{3});
  DflInput in{};
  in.pred = rows_in(dense_layout(3, 1, 2), pred, DType::f32);
  in.target = target.data();
  GFL_RUN(3, dfl_forward, in, loss.data(), nullptr);
  const DflGradients out{grad.data(), grad_target.data(), nullptr, nullptr};
  GFL_RUN(3, dfl_backward, in, ones.data(), nullptr, out);
  const double quarter = std::numeric_limits<float>::max() / 4.0;
  expect_close(loss.read(), {0, 0, quarter}, 1e-6, "special losses");
  expect_close(grad.read(), std::vector<double>(6, 0.0), 0, "special gradients");
  expect_close(grad_target.read(), {0, 2 * quarter, 2 * quarter}, 1e-6, "special gradients of the target");
}

#if !defined(GFL_TEST_CUDA)
// Keeping the softmax changes no bit of loss, distance and gradient, row by row or reduced, chunk by chunk.
void kept_softmax(Generator& generator, const Layout& layout, bool with_distance, bool weighted) {
  constexpr int64_t kChunk = 48;
  const int64_t rows = layout.inner;
  const size_t n = static_cast<size_t>(rows), elements = n * static_cast<size_t>(layout.bins);
  std::vector<double> values = logits(generator, layout, 2);
  if (n > 20) values[values.size() / 3] = HUGE_VAL, values[values.size() / 2] = 50;
  const DType f32 = DType::f32;
  FloatBuffer pred(f32, values), target(f32, uniforms(generator, n, -1, static_cast<double>(layout.bins)));
  FloatBuffer weight(f32, uniforms(generator, n, 0, 2)), grad_distance(f32, uniforms(generator, n, -2, 2));
  const auto floats = [](FloatBuffer& buffer) { return static_cast<float*>(buffer.data()); };
  float norm = 3.5f, grad_loss = 1.75f;
  const DflReduction reduction{weighted ? floats(weight) : nullptr, &norm, 0.25};
  const float scale = 0.25f / (norm + 1.1920929e-07f) * grad_loss;
  std::vector<double> of_rows = weighted ? weight.read() : std::vector<double>(n, 1.0);
  for (double& value : of_rows) value = static_cast<double>(scale * static_cast<float>(value));
  FloatBuffer grad_losses(f32, of_rows);

  DflInput in{};
  in.pred = rows_in(layout, pred, f32);
  in.target = target.data();
  FloatBuffer loss(f32, n), distance(f32, n), grad(f32, elements);
  const DflGradients out{grad.data(), nullptr, nullptr, nullptr};
  GFL_RUN(rows, dfl_forward, in, loss.data(), with_distance ? distance.data() : nullptr);
  GFL_RUN(rows, dfl_backward, in, grad_losses.data(), with_distance ? grad_distance.data() : nullptr, out);

  FloatBuffer kept_loss(f32, n), kept_distance(f32, n), sum_distance(f32, n), kept(f32, elements), sums(f32, 2 * n);
  FloatBuffer kept_of_sum(f32, elements), sums_of_sum(f32, 2 * n);
  const DflKept by_rows{floats(kept), floats(sums), rows}, reduced{floats(kept_of_sum), floats(sums_of_sum), rows};
  std::vector<double> of_chunks;
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t end = begin + kChunk < rows ? begin + kChunk : rows;
    cpu::dfl_forward_keeping(in, floats(kept_loss), with_distance ? floats(kept_distance) : nullptr, by_rows, begin,
                             end);
    of_chunks.push_back(
        cpu::dfl_sum_keeping(in, reduction, with_distance ? floats(sum_distance) : nullptr, reduced, begin, end));
  }
  const float* of_distance = with_distance ? floats(grad_distance) : nullptr;
  for (int64_t begin = 0; begin < rows; begin += kChunk) {
    const int64_t end = begin + kChunk < rows ? begin + kChunk : rows;
    cpu::dfl_finish(in, nullptr, floats(grad_losses), of_distance, by_rows, begin, end);
    cpu::dfl_finish(in, &reduction, &grad_loss, of_distance, reduced, begin, end);
  }
  const std::vector<double> losses = loss.read(), weights = weight.read();
  double total = 0;
  for (size_t i = 0; i < n; ++i) total += losses[i] * (weighted ? weights[i] : 1.0);
  const double one = cpu::dfl_reduce(reduction, of_chunks.data(), static_cast<int64_t>(of_chunks.size()));
  CHECK(close(one, total * 0.25 / norm, 1e-6, 0), "%s rows %zu: the reduced loss is %g", layout.name, n, one);
  CHECK(kept_loss.read() == losses, "%s rows %zu: a kept loss differs", layout.name, n);
  if (with_distance) {
    CHECK(kept_distance.read() == distance.read(), "%s rows %zu: a kept distance differs", layout.name, n);
    CHECK(sum_distance.read() == distance.read(), "%s rows %zu: a distance beside the sum differs", layout.name, n);
  }
  CHECK(kept.read() == grad.read(), "%s rows %zu: a kept gradient differs", layout.name, n);
  CHECK(kept_of_sum.read() == grad.read(), "%s rows %zu: the gradient of the reduced loss differs", layout.name, n);
}
#endif

}  // namespace

int main() {
  Generator generator(fresh_seed());
  for (const DType dtype : kDTypes) {
    for (const int64_t rows : {0, 1, 37, 128, 130}) {
      compare(generator, dense_layout(rows, 1, 17), dtype, false, false, rows % 2 == 0);
      compare(generator, dense_layout(rows, 1, 17), dtype, true, false, false);
    }
    compare(generator, padded_layout(33, 1, 17), dtype, false, true, true);
    compare(generator, planar_layout(1, 131, 1, 17), dtype, false, false, true);
    compare(generator, planar_layout(1, 31, 1, 17), dtype, true, false, false);
    for (const bool two_bin : {false, true}) {
      compare(generator, planar_layout(2, 9, 4, 17), dtype, two_bin, false, true);
      for (const int64_t bins : {5, 6, 7, 8}) {
        compare(generator, planar_layout(1, 9, 1, bins), dtype, two_bin, false, true, kSteep);
      }
    }
    compare(generator, dense_layout(41, 1, 2), dtype, false, true, false);
    compare(generator, planar_layout(1, 35, 1, 20), dtype, false, true, true);
    compare(generator, dense_layout(35, 1, 19), dtype, false, false, true);
    compare(generator, dense_layout(67, 1, 129), dtype, false, false, true);
    compare(generator, dense_layout(35, 1, 129), dtype, true, false, false);
  }
  special_values();
#if !defined(GFL_TEST_CUDA)
  for (const bool with_distance : {false, true}) {
    for (const bool weighted : {false, true}) {
      for (const int64_t rows : {0, 1, 16, 37, 205}) {
        kept_softmax(generator, dense_layout(rows, 1, 17), with_distance, weighted);
        kept_softmax(generator, planar_layout(1, rows, 1, 5), with_distance, weighted);
      }
    }
  }
#endif
  return result("dfl");
}
