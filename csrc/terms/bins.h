// SPDX-License-Identifier: Apache-2.0
// Softmax over one row of bins, its expectation, the cross entropy of two of its bins, and the divergence of a
// teacher's distribution from a student's, with derivatives.
//
//   p[j] = exp(x[j] − max) / Σ exp(x − max)     y = Σ_j p[j]·j     −log p[j] = log Σ exp(x − max) − (x[j] − max)
//   ∂y/∂x[j] = p[j]·(j − y)     ∂(−wₗ log p[l] − wᵣ log p[r])/∂x[j] = (wₗ + wᵣ)·p[j] − wₗ·[j=l] − wᵣ·[j=r]
//
// The sums run over the bins in order, so a row has the same bits wherever it is computed.
#pragma once
#include <cmath>
#include <limits>

#include "distance.h"
#include "gfl/bins.h"
#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

// ---- logits and where they lie ----

// A logit counts at most as a quarter of the largest number: no difference of two overflows, so neither an infinite
// logit nor a huge one makes a NaN of 0 · ∞. Beyond, the derivative is 0. A NaN stays and spreads over its row.
template <class A> GFL_HOST_DEVICE A largest_logit() { return std::numeric_limits<A>::max() / A(4); }
template <class A> GFL_HOST_DEVICE A bounded(A x, A limit) { return x > limit ? limit : (x < -limit ? -limit : x); }
template <class A> GFL_HOST_DEVICE bool is_beyond(A x, A limit) { return x > limit || x < -limit; }
template <class A> GFL_HOST_DEVICE A bounded_logit(A x) { return bounded(x, largest_logit<A>()); }
template <class A> GFL_HOST_DEVICE bool is_beyond(A x) { return is_beyond(x, largest_logit<A>()); }

// A location by its two leading dimensions, and where it lies in a tensor with such strides, in elements.
struct LocationIndex {
  int64_t outer, inner;
  GFL_HOST_DEVICE int64_t offset(LocationStride stride) const { return outer * stride.outer + inner * stride.inner; }
};
GFL_HOST_DEVICE LocationIndex location_index(int64_t count_outer, int64_t count_inner, int64_t location) {
  if (count_outer <= 1) return {0, location};
  const int64_t outer = location / count_inner;
  return {outer, location - outer * count_inner};
}
GFL_HOST_DEVICE LocationIndex location_index(const BinRows& v, int64_t location) {
  return location_index(v.count_outer, v.count_inner, location);
}
GFL_HOST_DEVICE int64_t location_offset(LocationStride stride, int64_t count_outer, int64_t count_inner, int64_t i) {
  return location_index(count_outer, count_inner, i).offset(stride);
}

// Where row r begins, in elements from BinRows::data.
GFL_HOST_DEVICE int64_t row_offset(const BinRows& v, int64_t row) {
  int64_t location = row, side = 0;
  if (v.sides > 1) {
    location = row / v.sides;
    side = row - location * v.sides;
  }
  return location_index(v, location).offset(v.stride_location) + side * v.stride_side;
}

// ---- softmax and expectation ----

// One row's softmax. `total` is Σ exp(x − max), `moment` Σ (j − peak)·exp(x − max): counted from the highest bin, the
// sum is short where the distribution is, and j − y loses nothing to cancellation.
template <class A> struct BinSoftmax {
  A max, total, moment;
  int peak;
  GFL_HOST_DEVICE A mean() const { return A(peak) + moment / total; }
  // ∂y/∂x[j] = p·(j − y)
  GFL_HOST_DEVICE A mean_gradient(int j, A p) const { return p * (A(j - peak) - moment / total); }
};

// `logit(j)` is a bounded logit; keep(j, e) is called with each exponential.
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

// How spread out a distribution over bins is: its variance in bins², its entropy −Σ p log p in nats, and the
// probability of its likeliest bin. No sum has terms of two signs, and none is lost to cancellation.
template <class A> struct BinSpread { A variance, entropy, peak; };
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

// ---- decode ----

// The side that row `row` of decode's distributions stands for.
template <class A> struct BoxSide {
  const A* point;  // x, y in pixels
  const A* limit;  // height, width, or null
  A scale;         // pixels per bin
  int side;

  GFL_HOST_DEVICE BoxSide(const DecodeInput& in, int64_t row)
      : BoxSide(in, location_index(in.pred, row >> 2), static_cast<int>(row & 3)) {}
  GFL_HOST_DEVICE BoxSide(const DecodeInput& in, const LocationIndex& i, int of_side) : side(of_side) {
    point = static_cast<const A*>(in.points) + i.offset(in.stride_points);
    scale = static_cast<const A*>(in.scale)[i.offset(in.stride_scale)];
    limit = in.limit == nullptr ? nullptr : static_cast<const A*>(in.limit) + i.offset(in.stride_limit);
  }

  // Its coordinate at an expected distance of `mean` bins; and the mean's gradient from the coordinate's.
  GFL_HOST_DEVICE auto at(A mean) const { return clipped_side_at(point[side & 1], mul_rn(mean, scale), side, limit); }
  GFL_HOST_DEVICE A mean_gradient(A passed) const { return passed * side_sign<A>(side) * scale; }
};

// Adds what a side hands on to the gradient of its point, for walks that reach left and top before right and bottom.
template <class A> void add_to_point(A* grad_points, int64_t row, A of_point) {
  if (grad_points == nullptr) return;
  A& to = grad_points[(row >> 2) * 2 + (row & 1)];
  to = (row & 2) == 0 ? of_point : to + of_point;
}

// ---- distribution focal loss ----

// Two bins and their weights; where nothing is counted, loss and gradient are 0 whatever the logits are.
template <class A> struct TwoBins {
  int left, right;
  A weight_left, weight_right;
  bool counted;
  bool clamped;  // the target lay outside [0, R]: it has no gradient
};

template <class A> GFL_HOST_DEVICE TwoBins<A> bins_at_position(A y, int bins, bool ignore_out_of_range) {
  const int last = bins - 1;
  const bool below = y<A(0), above = y> A(last), nan = y != y;
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

template <class A> GFL_HOST_DEVICE TwoBins<A> bins_of_row(const DflInput& in, int64_t row) {
  const int bins = static_cast<int>(in.pred.bins);
  if (in.target != nullptr) {
    return bins_at_position(static_cast<const A*>(in.target)[row], bins, in.ignore_out_of_range);
  }
  return bins_given(in.left[row], static_cast<const A*>(in.weight_left)[row],
                    static_cast<const A*>(in.weight_right)[row], bins);
}

// −log p of both bins.
template <class A> struct TwoBinEntropy { A left, right; };
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

// ---- distillation with a temperature ----
//
//   a[j] = (pred[j] − max pred) / T   b[j] = (teacher[j] − max teacher) / T   P = Σ e^a   Q = Σ e^b
//   Σ q (log q − log p) = Σ e^b·(b − a) / Q + log(P / Q)   p = e^a / P   q = e^b / Q   ∂loss/∂pred[j] = T/n (p − q)
//
// Logits are subtracted before they are divided, so that those near the largest lose nothing; equal rows give
// exactly 0.

template <class A> struct LdScale {
  A inverse;   // 1/T
  A loss;      // T²/n
  A gradient;  // T/n
  A limit;     // what a logit counts as at most

  explicit LdScale(const LdInput& in)
      : inverse(static_cast<A>(1.0 / in.temperature)),
        loss(static_cast<A>(in.temperature * in.temperature / static_cast<double>(in.bins))),
        gradient(static_cast<A>(in.temperature / static_cast<double>(in.bins))),
        limit(static_cast<A>((in.temperature < 1.0 ? in.temperature : 1.0) *
                             (static_cast<double>(std::numeric_limits<A>::max()) / 4.0))) {}

  // A logit less its row's largest, over T.
  GFL_HOST_DEVICE A below_largest(A x, A max) const { return (bounded(x, limit) - max) * inverse; }
};

template <class A> struct LdSums {
  A max_pred, max_teacher, total_pred, total_teacher, cross;  // cross is Σ e^b·(b − a)

  GFL_HOST_DEVICE A divergence() const {
    // The quotient lies within [1/n, n], and near 1 for similar distributions: two logarithms would cancel there.
    return cross / total_teacher + std::log(total_pred / total_teacher);
  }
};

// walk(visit) calls visit(x, z) for the logits of a row in a fixed order. Where several threads share a row, each walks
// over its own part, and `largest` and `sum` reduce over all of them. With kKeep, x and z are overwritten: x by e^a, or
// −1 where the student's logit is beyond what counts, z by e^b.
template <bool kKeep, class A, class Walk, class Largest, class Sum>
GFL_HOST_DEVICE LdSums<A> ld_sums(const LdScale<A>& scale, const Walk& walk, const Largest& largest, const Sum& sum) {
  const A lowest = -std::numeric_limits<A>::infinity();
  A max_pred = lowest, max_teacher = lowest;
  walk([&](A& x, A& z) {
    max_pred = x > max_pred ? x : max_pred;
    max_teacher = z > max_teacher ? z : max_teacher;
  });
  // The largest of bounded logits is the largest logit, bounded.
  LdSums<A> s{bounded(largest(max_pred), scale.limit), bounded(largest(max_teacher), scale.limit), A(0), A(0), A(0)};
  walk([&](A& x, A& z) {
    const A a = scale.below_largest(x, s.max_pred), b = scale.below_largest(z, s.max_teacher);
    const A e_a = std::exp(a), e_b = std::exp(b);
    s.total_pred += e_a;
    s.total_teacher += e_b;
    s.cross += e_b * (b - a);
    if (kKeep) {
      x = is_beyond(x, scale.limit) ? A(-1) : e_a;
      z = e_b;
    }
  });
  s.total_pred = sum(s.total_pred);
  s.total_teacher = sum(s.total_teacher);
  s.cross = sum(s.cross);
  return s;
}

// factor · (p − q) where the softmax has not been kept; `factor` is T/n times what arrives.
template <class A>
GFL_HOST_DEVICE A ld_gradient(const LdScale<A>& scale, const LdSums<A>& s, A factor, A x, A z) {
  const A p = std::exp(scale.below_largest(x, s.max_pred)) / s.total_pred;
  const A q = std::exp(scale.below_largest(z, s.max_teacher)) / s.total_teacher;
  return is_beyond(x, scale.limit) ? A(0) : factor * (p - q);
}

GFL_ISA_CLOSE
}  // namespace gfl
