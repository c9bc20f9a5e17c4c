// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU of fp32 and 16-bit maps in fp32, kWidth elements at a time along the contiguous
// dimension:
// rows of channels, whose coefficients are arrays, or runs of one channel's locations, whose coefficients are numbers.
//
// Sums are taken about a value of their own block, whose distance from the mean is at most √n deviations for a block of
// n:
// the cancellation in Σd² − (Σd)²/n costs the variance at most n roundings of its own size, and usually few.
#include "../group_norm_relu.h"

#include "vector_math.h"

namespace gfl::GFL_ISA {
namespace {

using cpu::NormChannel;
using cpu::NormChannels;
using cpu::NormMoments;
using cpu::NormRows;
using cpu::NormSums;

constexpr int kRunBlock = 512;       // elements of a run whose sums stay in fp32
constexpr int kParts = 32 / kWidth;  // registers that a run's sums are kept in: 32 partial sums on every processor

struct Coefficients { Floats mean, scale, bias, level, slope; };

struct OfRow {  // channel i's
  const NormChannels& all;
  Coefficients forward_at(int64_t i) const {
    return {load_floats(all.mean + i), load_floats(all.scale + i), load_floats(all.bias + i), Floats{}, Floats{}};
  }
  Coefficients at(int64_t i) const {
    Coefficients k = forward_at(i);
    k.level = load_floats(all.level + i);
    k.slope = load_floats(all.slope + i);
    return k;
  }
};

struct OfRun {
  Coefficients k;
  explicit OfRun(const NormChannel& c) : k{all(c.mean), all(c.scale), all(c.bias), all(c.level), all(c.slope)} {}
  static Floats all(double x) { return splat<Floats>(static_cast<float>(x)); }
  const Coefficients& forward_at(int64_t) const { return k; }
  const Coefficients& at(int64_t) const { return k; }
};

// Before the ReLU. The same in both directions, so that both cut the same elements.
inline Floats normalised(Floats distance, const Coefficients& k) { return multiply_add(distance, k.scale, k.bias); }

// The gradient where the ReLU lets it through; NaN lets it.
inline Floats passed(Floats grad, Floats distance, const Coefficients& k, float floor) {
  return normalised(distance, k) <= floor ? Floats{} : grad;
}

template <class T, class K> void forward_row(const NormRows& in, const K& coefficients, int64_t row) {
  const float floor = static_cast<float>(in.floor);
  const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
  T* y = static_cast<T*>(in.out) + row * in.out_stride;
  for (int64_t i = 0; i < in.length; i += kWidth) {
    const Coefficients k = coefficients.forward_at(i);
    const int64_t count = in.length - i;
    const Floats distance = load_floats(x + i, count, 0.0f) - k.mean;
    store_floats(at_least(floor, normalised(distance, k)), count, y + i);
  }
}

template <class T, class K> void backward_row(const NormRows& in, const K& coefficients, int64_t row) {
  const float floor = static_cast<float>(in.floor);
  const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
  const T* grad = static_cast<const T*>(in.grad) + row * in.grad_stride;
  T* out = static_cast<T*>(in.out) + row * in.out_stride;
  for (int64_t i = 0; i < in.length; i += kWidth) {
    const Coefficients k = coefficients.at(i);
    const int64_t count = in.length - i;
    const Floats distance = load_floats(x + i, count, 0.0f) - k.mean;
    const Floats g = passed(load_floats(grad + i, count, 0.0f), distance, k, floor);
    store_floats(multiply_add(g, k.scale, -multiply_add(distance, k.slope, k.level)), count, out + i);
  }
}

// Σd and Σd², d being the distance from the first row. Row by row: several at once would share the loads of sums, but
// rows of a kibibyte each then come from one page in an order that no prefetcher follows (half the speed).
template <class T> void add_moments(const NormRows& in, const float* shift, float* sum, float* squares, int64_t row) {
  const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
  for (int64_t i = 0; i < in.length; i += kWidth) {
    const Floats d = load_floats(x + i, in.length - i, 0.0f) - load_floats(shift + i);
    store_floats(load_floats(sum + i) + d, sum + i);
    store_floats(multiply_add(d, d, load_floats(squares + i)), squares + i);
  }
}

// Σg and Σg·(x − mean).
template <class T> void add_sums(const NormRows& in, const OfRow& coefficients, float* sum, float* product,
                                 int64_t row) {
  const float floor = static_cast<float>(in.floor);
  const T* x = static_cast<const T*>(in.x) + row * in.x_stride;
  const T* grad = static_cast<const T*>(in.grad) + row * in.grad_stride;
  for (int64_t i = 0; i < in.length; i += kWidth) {
    const Coefficients k = coefficients.forward_at(i);
    const int64_t count = in.length - i;
    const Floats distance = load_floats(x + i, count, 0.0f) - k.mean;
    const Floats g = passed(load_floats(grad + i, count, 0.0f), distance, k, floor);
    store_floats(load_floats(sum + i) + g, sum + i);
    store_floats(multiply_add(g, distance, load_floats(product + i)), product + i);
  }
}

struct Pair { float first, second; };

// Two sums over a piece of a run; term(i, count) gives both addends of the kWidth elements from i, 0 beyond `count`.
template <class Term> Pair sum_pair(int64_t begin, int64_t end, const Term& term) {
  Floats first[kParts] = {}, second[kParts] = {};
  int64_t i = begin;
  const auto add = [&](int part) {
    const auto [a, b] = term(i, end - i);
    first[part] += a;
    second[part] += b;
    i += kWidth;
  };
  while (i + kParts * kWidth <= end) {
    for (int part = 0; part < kParts; ++part) add(part);
  }
  const int rest = static_cast<int>((end - i + kWidth - 1) / kWidth);
  for (int part = 0; part < rest; ++part) add(part);
  for (int width = kParts / 2; width > 0; width /= 2) {
    for (int part = 0; part < width; ++part) {
      first[part] += first[part + width];
      second[part] += second[part + width];
    }
  }
  return {sum_of(first[0]), sum_of(second[0])};
}

struct Terms { Floats first, second; };

template <class T> void run_moments(const T* x, int64_t length, NormMoments& all) {
  for (int64_t begin = 0; begin < length; begin += kRunBlock) {
    const int64_t end = begin + kRunBlock < length ? begin + kRunBlock : length;
    const float shift = load(x + begin);
    const Pair of = sum_pair(begin, end, [&](int64_t i, int64_t count) {
      const Floats d = load_floats(x + i, count, shift) - shift;
      return Terms{d, d * d};
    });
    const double n = static_cast<double>(end - begin), sum = of.first;
    const double squares = of.second - sum * sum / n;
    cpu::merge(all, {n, shift + sum / n, squares < 0 ? 0 : squares});
  }
}

template <class T> void run_sums(const NormRows& in, const NormChannel& channel, NormSums& all) {
  const float floor = static_cast<float>(in.floor);
  const T* x = static_cast<const T*>(in.x);
  const T* grad = static_cast<const T*>(in.grad);
  const OfRun run(channel);
  for (int64_t begin = 0; begin < in.length; begin += kRunBlock) {
    const int64_t end = begin + kRunBlock < in.length ? begin + kRunBlock : in.length;
    const Pair of = sum_pair(begin, end, [&](int64_t i, int64_t count) {
      const Floats distance = load_floats(x + i, count, 0.0f) - run.k.mean;
      const Floats g = passed(load_floats(grad + i, count, 0.0f), distance, run.k, floor);
      return Terms{g, g * distance};
    });
    all.grad += of.first;
    all.grad_xhat += of.second;
  }
}

}  // namespace

// Rows: `shift`, `sum` and `squares` hold in.length floats rounded up to a whole number of vectors.
void norm_row_moments(const NormRows& in, float* shift, float* sum, float* squares) {
  dispatch_float(in.dtype, [&](auto t) {
    using T = decltype(t);
    const T* x = static_cast<const T*>(in.x);
    for (int64_t i = 0; i < in.length; i += kWidth) {
      store_floats(load_floats(x + i, in.length - i, 0.0f), shift + i);
      store_floats(Floats{}, sum + i);
      store_floats(Floats{}, squares + i);
    }
    for (int64_t row = 0; row < in.rows; ++row) add_moments<T>(in, shift, sum, squares, row);
  });
}

void norm_row_forward(const NormRows& in, const NormChannels& channels) {
  dispatch_float(in.dtype, [&](auto t) {
    for (int64_t row = 0; row < in.rows; ++row) forward_row<decltype(t)>(in, OfRow{channels}, row);
  });
}

void norm_row_sums(const NormRows& in, const NormChannels& channels, float* sum, float* product) {
  dispatch_float(in.dtype, [&](auto t) {
    for (int64_t i = 0; i < in.length; i += kWidth) {
      store_floats(Floats{}, sum + i);
      store_floats(Floats{}, product + i);
    }
    for (int64_t row = 0; row < in.rows; ++row) add_sums<decltype(t)>(in, OfRow{channels}, sum, product, row);
  });
}

void norm_row_backward(const NormRows& in, const NormChannels& channels) {
  dispatch_float(in.dtype, [&](auto t) {
    for (int64_t row = 0; row < in.rows; ++row) backward_row<decltype(t)>(in, OfRow{channels}, row);
  });
}

// A run: one row.
void norm_run_moments(const NormRows& in, NormMoments& all) {
  dispatch_float(in.dtype, [&](auto t) { run_moments(static_cast<const decltype(t)*>(in.x), in.length, all); });
}

void norm_run_forward(const NormRows& in, const NormChannel& channel) {
  dispatch_float(in.dtype, [&](auto t) { forward_row<decltype(t)>(in, OfRun(channel), 0); });
}

// Σg and Σg·(x − mean).
void norm_run_sums(const NormRows& in, const NormChannel& channel, NormSums& all) {
  dispatch_float(in.dtype, [&](auto t) { run_sums<decltype(t)>(in, channel, all); });
}

void norm_run_backward(const NormRows& in, const NormChannel& channel) {
  dispatch_float(in.dtype, [&](auto t) { backward_row<decltype(t)>(in, OfRun(channel), 0); });
}

}  // namespace gfl::GFL_ISA
