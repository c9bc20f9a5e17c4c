// SPDX-License-Identifier: Apache-2.0
// One row of bins by the textbook, in long double; derivatives by central differences, so that no formula is shared
// with the code under test.
#pragma once
#include <cmath>
#include <functional>
#include <vector>

#include "float_buffer.h"
#include "gfl/rows.h"

namespace gfl::testing {

using Row = std::vector<long double>;

inline long double log_sum_exp(const Row& x) {
  long double largest = x[0], sum = 0;
  for (const long double value : x) largest = std::fmax(largest, value);
  for (const long double value : x) sum += std::exp(value - largest);
  return largest + std::log(sum);
}
inline long double expectation(const Row& x) {
  const long double log_total = log_sum_exp(x);
  long double sum = 0;
  for (size_t j = 0; j < x.size(); ++j) sum += static_cast<long double>(j) * std::exp(x[j] - log_total);
  return sum;
}
inline long double cross_entropy(const Row& x, size_t bin) { return log_sum_exp(x) - x[bin]; }

// d f / d x[j]
inline double slope(const std::function<long double(const Row&)>& f, Row x, size_t j) {
  const long double h = 1e-6L, at = x[j];
  x[j] = at + h;
  const long double above = f(x);
  x[j] = at - h;
  return static_cast<double>((above - f(x)) / (2 * h));
}

// Rows in memory as a conv output has them, with unused elements before and between: the logits as doubles, and where.
struct Layout {
  const char* name;
  int64_t outer, inner, sides, bins;
  LocationStride location;
  int64_t side, bin, elements;
};
inline Layout dense_layout(int64_t locations, int64_t sides, int64_t bins) {
  return {"dense", 1, locations, sides, bins, {0, sides * bins}, bins, 1, locations * sides * bins};
}
inline Layout padded_layout(int64_t locations, int64_t sides, int64_t bins, int64_t gap = 5) {
  const int64_t pitch = sides * bins + gap;
  return {"padded", 1, locations, sides, bins, {0, pitch}, bins, 1, locations * pitch};
}
// Every second element of padded rows.
inline Layout strided_layout(int64_t locations, int64_t bins) {
  const int64_t pitch = 2 * bins + 5;
  return {"strided", 1, locations, 1, bins, {0, pitch}, bins, 2, locations * pitch};
}
// [outer, sides · bins, inner]
inline Layout planar_layout(int64_t outer, int64_t inner, int64_t sides, int64_t bins) {
  return {"planar",     outer, inner,
          sides,        bins,  {sides * bins * inner, 1},
          bins * inner, inner, outer * inner * sides * bins};
}

// Logits: normal, or of a steep row, where the exponential of a difference is subnormal in double.
constexpr double kSteep = 360;
inline std::vector<double> logits(Generator& generator, const Layout& layout, double scale) {
  std::vector<double> values = normals(generator, static_cast<size_t>(layout.elements), scale);
  if (scale == kSteep) {
    for (double& value : values) value = value < 0 ? -kSteep : kSteep;
  }
  return values;
}

inline BinRows rows_in(const Layout& layout, FloatBuffer& memory, DType dtype) {
  return {memory.data(), dtype,           layout.outer, layout.inner, layout.sides,
          layout.bins,   layout.location, layout.side,  layout.bin};
}

inline Row row_of(const Layout& layout, const std::vector<double>& values, int64_t row) {
  const int64_t location = row / layout.sides, side = row % layout.sides;
  const int64_t at = location / layout.inner * layout.location.outer + location % layout.inner * layout.location.inner +
                     side * layout.side;
  Row x;
  for (int64_t j = 0; j < layout.bins; ++j) x.push_back(values[static_cast<size_t>(at + j * layout.bin)]);
  return x;
}

// Roundings of a softmax and a sum over the bins, on terms of the size of `scale`. Gradients are rounded to the logits'
// dtype besides. The floor is the error of the central difference.
inline double bins_tolerance(DType arithmetic, DType result, double scale) {
  return std::fmax(64 * rounding(arithmetic), 1e-10) * scale + (result == arithmetic ? 0 : 2 * rounding(result));
}

}  // namespace gfl::testing
