// SPDX-License-Identifier: Apache-2.0
// Divergence of a teacher's distribution from a student's, both softened by a temperature; formulas in gfl/ld.h.
//
//   a[j] = (pred[j] − max pred) / T   b[j] = (teacher[j] − max teacher) / T   P = Σ e^a   Q = Σ e^b
//   Σ q (log q − log p) = Σ e^b·(b − a) / Q + log(P / Q)     p = e^a / P     q = e^b / Q
//
// Logits are subtracted before they are divided, so that those near the largest lose nothing; equal rows give exactly 0.
#pragma once
#include <cmath>
#include <limits>

#include "gfl/ld.h"
#include "host_device.h"

namespace gfl {
GFL_ISA_OPEN

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

  GFL_HOST_DEVICE A bounded(A x) const { return x > limit ? limit : (x < -limit ? -limit : x); }
  GFL_HOST_DEVICE bool is_beyond(A x) const { return x > limit || x < -limit; }
};

template <class A> struct LdSums {
  A max_pred, max_teacher, total_pred, total_teacher, cross;  // cross is Σ e^b·(b − a)

  GFL_HOST_DEVICE A divergence() const {
    // The quotient lies within [1/n, n], and near 1 for distributions alike: two logarithms would cancel there.
    return cross / total_teacher + std::log(total_pred / total_teacher);
  }
};

// `walk(visit)` calls visit(x, z) for the logits of a row in a fixed order; where several threads share one, for its own
// share, and `largest` and `sum` give all of them what all of them have. visit may write to x and z: with kKeep they
// become e^a, or −1 where the student's logit is beyond what counts, and e^b.
template <bool kKeep, class A, class Walk, class Largest, class Sum>
GFL_HOST_DEVICE LdSums<A> ld_sums(const LdScale<A>& scale, const Walk& walk, const Largest& largest, const Sum& sum) {
  const A lowest = -std::numeric_limits<A>::infinity();
  A max_pred = lowest, max_teacher = lowest;
  walk([&](A& x, A& z) {
    max_pred = x > max_pred ? x : max_pred;
    max_teacher = z > max_teacher ? z : max_teacher;
  });
  // The largest of bounded logits is the largest logit, bounded.
  LdSums<A> s{scale.bounded(largest(max_pred)), scale.bounded(largest(max_teacher)), A(0), A(0), A(0)};
  walk([&](A& x, A& z) {
    const A a = (scale.bounded(x) - s.max_pred) * scale.inverse, b = (scale.bounded(z) - s.max_teacher) * scale.inverse;
    const A e_a = std::exp(a), e_b = std::exp(b);
    s.total_pred += e_a;
    s.total_teacher += e_b;
    s.cross += e_b * (b - a);
    if (kKeep) {
      x = scale.is_beyond(x) ? A(-1) : e_a;
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
  const A p = std::exp((scale.bounded(x) - s.max_pred) * scale.inverse) / s.total_pred;
  const A q = std::exp((scale.bounded(z) - s.max_teacher) * scale.inverse) / s.total_teacher;
  return scale.is_beyond(x) ? A(0) : factor * (p - q);
}

GFL_ISA_CLOSE
}  // namespace gfl
