// SPDX-License-Identifier: Apache-2.0
// Softmax over one row of bins, its expectation and the cross entropy of two of its bins, with derivatives.
//
//   p[j] = exp(x[j] − max) / Σ exp(x − max)     y = Σ_j p[j]·j     −log p[j] = log Σ exp(x − max) − (x[j] − max)
//   ∂y/∂x[j] = p[j]·(j − y)     ∂(−wₗ log p[l] − wᵣ log p[r])/∂x[j] = (wₗ + wᵣ)·p[j] − wₗ·[j=l] − wᵣ·[j=r]
//
// The sums run over the bins in order, so a row has the same bits wherever it is computed.
#pragma once
#include <cmath>
#include <limits>

#include "gfl/rows.h"
#include "host_device.h"

namespace gfl {

// A logit counts at most as a quarter of the largest number: no difference of two overflows, so neither an infinite
// logit nor a huge one makes a NaN of 0 · ∞. Beyond, the derivative is 0. A NaN stays and spreads over its row.
template <class A> GFL_HOST_DEVICE A largest_logit() { return std::numeric_limits<A>::max() / A(4); }
template <class A> GFL_HOST_DEVICE A bounded_logit(A x) {
  const A limit = largest_logit<A>();
  return x > limit ? limit : (x < -limit ? -limit : x);
}
template <class A> GFL_HOST_DEVICE bool is_beyond(A x) { return x > largest_logit<A>() || x < -largest_logit<A>(); }

// Where row r begins, in elements from BinRows::data.
GFL_HOST_DEVICE int64_t row_offset(const BinRows& v, int64_t row) {
  int64_t location = row, side = 0, outer = 0;
  if (v.sides > 1) {
    location = row / v.sides;
    side = row - location * v.sides;
  }
  if (v.count_outer > 1) {
    outer = location / v.count_inner;
    location -= outer * v.count_inner;
  }
  return outer * v.stride_location.outer + location * v.stride_location.inner + side * v.stride_side;
}

// Where location i lies in a tensor that has such strides, in elements.
GFL_HOST_DEVICE int64_t location_offset(LocationStride stride, int64_t count_outer, int64_t count_inner, int64_t i) {
  if (count_outer <= 1) return i * stride.inner;
  const int64_t outer = i / count_inner;
  return outer * stride.outer + (i - outer * count_inner) * stride.inner;
}

// One row's softmax. `total` is Σ exp(x − max), `moment` Σ (j − peak)·exp(x − max): counted from the highest bin, the
// sum is short where the distribution is, and j − y loses nothing to cancellation.
template <class A> struct BinSoftmax {
  A max, total, moment;
  int peak;
  GFL_HOST_DEVICE A mean() const { return A(peak) + moment / total; }
  // ∂y/∂x[j] = p·(j − y)
  GFL_HOST_DEVICE A mean_gradient(int j, A p) const { return p * (A(j - peak) - moment / total); }
};

// `logit(j)` is a bounded logit; `keep(j, e)` is told each exponential.
template <class A, class Logit, class Keep>
GFL_HOST_DEVICE BinSoftmax<A> bin_softmax(int bins, const Logit& logit, const Keep& keep) {
  BinSoftmax<A> s{logit(0), A(0), A(0), 0};
  for (int j = 1; j < bins; ++j) {
    const A x = logit(j);
    if (x > s.max) {
      s.max = x;
      s.peak = j;
    }
  }
  for (int j = 0; j < bins; ++j) {
    const A e = std::exp(logit(j) - s.max);
    keep(j, e);
    s.total += e;
    s.moment += e * A(j - s.peak);
  }
  return s;
}
template <class A, class Logit> GFL_HOST_DEVICE BinSoftmax<A> bin_softmax(int bins, const Logit& logit) {
  return bin_softmax<A>(bins, logit, [](int, A) {});
}

// How spread out a distribution over bins is: its variance in bins², its entropy −Σ p log p in nats, and the probability
// of its likeliest bin. No sum has terms of two signs, and none is lost to cancellation.
template <class A> struct BinSpread {
  A variance, entropy, peak;
};
template <class A, class Logit> GFL_HOST_DEVICE BinSpread<A> bin_spread(int bins, const Logit& logit) {
  const BinSoftmax<A> s = bin_softmax<A>(bins, logit);
  const A centre = s.moment / s.total;
  A squares = A(0), surprise = A(0);
  for (int j = 0; j < bins; ++j) {
    const A below = s.max - logit(j), e = std::exp(-below), away = A(j - s.peak) - centre;
    squares += e * away * away;
    surprise += e * below;
  }
  return {squares / s.total, std::log(s.total) + surprise / s.total, A(1) / s.total};
}

// Two bins and their weights; where nothing is counted, loss and gradient are 0 whatever the logits are.
template <class A> struct TwoBins {
  int left, right;
  A weight_left, weight_right;
  bool counted;
  bool clamped;  // the target lay outside [0, R]: it has no gradient
};

template <class A> GFL_HOST_DEVICE TwoBins<A> bins_at_position(A y, int bins, bool ignore_out_of_range) {
  const int last = bins - 1;
  const bool below = y < A(0), above = y > A(last), nan = y != y;
  TwoBins<A> b;
  b.counted = !nan && !(ignore_out_of_range && (below || above));
  b.clamped = below || above;
  if (below || nan) y = A(0);
  if (above) y = A(last);
  b.left = static_cast<int>(y);
  if (b.left > last - 1) b.left = last - 1;
  b.right = b.left + 1;
  b.weight_left = A(b.right) - y;
  b.weight_right = y - A(b.left);
  return b;
}

template <class A> GFL_HOST_DEVICE TwoBins<A> bins_given(int64_t left, A weight_left, A weight_right, int bins) {
  const int64_t last = bins - 1;
  const int64_t near = left < -1 ? -1 : (left > last ? last : left);  // keeps left + 1 from running over
  TwoBins<A> b;
  b.left = static_cast<int>(near < 0 ? 0 : near);
  b.right = static_cast<int>(near + 1 > last ? last : near + 1);
  b.weight_left = weight_left;
  b.weight_right = weight_right;
  b.counted = true;
  b.clamped = false;
  return b;
}

// −log p of both bins.
template <class A> struct TwoBinEntropy {
  A left, right;
};
template <class A, class Logit>
GFL_HOST_DEVICE TwoBinEntropy<A> two_bin_entropy(const BinSoftmax<A>& s, const TwoBins<A>& b, const Logit& logit) {
  const A log_total = std::log(s.total);
  return {log_total - (logit(b.left) - s.max), log_total - (logit(b.right) - s.max)};
}
template <class A> GFL_HOST_DEVICE A two_bin_loss(const TwoBins<A>& b, const TwoBinEntropy<A>& entropy) {
  return entropy.left * b.weight_left + entropy.right * b.weight_right;
}

// d loss / d x[j] of a row that counts.
template <class A> GFL_HOST_DEVICE A two_bin_gradient(const TwoBins<A>& b, int j, A p) {
  A g = p * (b.weight_left + b.weight_right);
  if (j == b.left) g -= b.weight_left;
  if (j == b.right) g -= b.weight_right;
  return g;
}

}  // namespace gfl
