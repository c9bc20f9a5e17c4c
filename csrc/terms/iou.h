// SPDX-License-Identifier: Apache-2.0
// Losses of the overlap of two boxes xyxy, with their derivatives: one functor per kind.
//
//   iou    1 − I/U                                       U = max(union, ε)
//   giou   iou + (E − U)/E, E = max(enclosing area, ε)   Rezatofighi et al., arXiv 1902.09630
//   diou   1 − I/(union + ε) + ρ²/(c² + ε)               Zheng et al., arXiv 1911.08287, eq. 7
//   ciou   diou + α·v, within [0, 2]                     Zheng et al., arXiv 2005.03572, α constant in the derivative
//   eiou, siou, mpdiou: stated at their functors; U = union + ε
//   overlap  I/U itself, for losses of the IoU other than 1 − IoU, which a subtraction would round
//   full_ciou  ciou whose α counts at every IoU, and without bounds, as ultralytics has it; no kind of box_iou_loss
// Where a max or min ties, each side takes half the derivative, and a clamp at its bound lets it pass, both as torch's.
#pragma once
#include <cmath>
#include <cstring>

#include "host_device.h"

// For the functions that would otherwise remain calls within the loop over the pairs, which is vector code without
// them.
#define GFL_INLINED __attribute__((always_inline)) GFL_HOST_DEVICE

namespace gfl {

// Value and derivatives of one pair of boxes.
template <class A> struct IouTerm { A value, grad_pred[4], grad_target[4]; };

// The numbers that a kind is called with; `parameter` is its own, and what it means is said there.
template <class A> struct IouParams { A eps, parameter; };

// A pair of boxes in the pieces that losses are made of, [0] along x and [1] along y. A second one holds the
// derivatives by each piece.
template <class A> struct BoxPair {
  A pred[4], target[4];
  A inner_low[2], inner_high[2];  // the intersection; high < low where there is none
  A outer_low[2], outer_high[2];  // the enclosing box
};

// The larger or smaller of two numbers, with the share of the derivative that goes to either. In a form that compiles
// without branches, which random boxes would mispredict. Of two numbers of which one is NaN it is `a`: where that hides
// a NaN of `b`, the area of its box has it.
template <class A> struct Extreme { A value, to_a, to_b; };

// 1 for a > b, 1/2 in a tie, else 0.
template <class A> GFL_HOST_DEVICE A share_of_greater(A a, A b) {
  return (a > b ? A(0.5) : A(0)) + (a >= b ? A(0.5) : A(0));
}

template <class A> GFL_HOST_DEVICE Extreme<A> max_of(A a, A b) {
  const A share = share_of_greater(a, b);
  return {b > a ? b : a, share, A(1) - share};
}

template <class A> GFL_HOST_DEVICE Extreme<A> min_of(A a, A b) {
  const A share = share_of_greater(a, b);
  return {b < a ? b : a, A(1) - share, share};
}

// Adds `g` times the derivative of an extreme to those of its two arguments.
template <class A> GFL_HOST_DEVICE void add_extreme(const Extreme<A>& e, A g, A& a, A& b) {
  a += g * e.to_a;
  b += g * e.to_b;
}

// Adds `g` times the derivative of high − low.
template <class A> GFL_HOST_DEVICE void add_length(A g, A& low, A& high) {
  high += g;
  low -= g;
}

// A length of at least `least`, and whether the derivative passes.
template <class A> struct Length { A value, slope; };

template <class A> GFL_HOST_DEVICE Length<A> length_of(A low, A high, A least = A(0)) {
  const A length = high - low;
  return {least > length ? least : length, least > length ? A(0) : A(1)};
}

// Width (axis 0) or height (axis 1) of a box, which is negative for an inverted one.
template <class A> GFL_HOST_DEVICE A extent(const A (&box)[4], int axis) { return box[axis + 2] - box[axis]; }

template <class A> GFL_HOST_DEVICE A area_of(const A (&box)[4]) { return extent(box, 0) * extent(box, 1); }

// Adds `g` times the derivative of a box's area.
template <class A> GFL_HOST_DEVICE void add_area(const A (&box)[4], A g, A (&d)[4]) {
  for (int axis = 0; axis < 2; ++axis) add_length(g * extent(box, 1 - axis), d[axis], d[axis + 2]);
}

// I/U, with U = union + ε or max(union, ε), for the intersection I that a kind has found.
template <class A> struct AreaRatio {
  A value, united, slope;  // `slope`: of U by the union

  GFL_HOST_DEVICE AreaRatio(const BoxPair<A>& b, A overlap, A eps, bool adds_eps) {
    const A area = area_of(b.pred) + area_of(b.target) - overlap;
    const Extreme<A> bounded = adds_eps ? Extreme<A>{area + eps, A(1), A(0)} : max_of(area, eps);
    united = bounded.value;
    slope = bounded.to_a;
    value = overlap / united;
  }

  // Adds the derivatives by the boxes of a loss whose own ones are `by_value`, and `by_united` where U appears outside
  // of I/U too. Returns the one by I.
  GFL_INLINED A backward(const BoxPair<A>& b, A by_value, A by_united, BoxPair<A>& d) const {
    const A by_union = (by_united - by_value * value / united) * slope;
    add_area(b.pred, by_union, d.pred);
    add_area(b.target, by_union, d.target);
    return by_value / united - by_union;
  }
};

// The IoU itself.
template <class A> struct OverlapRatio {
  Length<A> inner[2];
  AreaRatio<A> ratio;

  GFL_HOST_DEVICE OverlapRatio(const BoxPair<A>& b, A eps, bool adds_eps)
      : inner{length_of(b.inner_low[0], b.inner_high[0]), length_of(b.inner_low[1], b.inner_high[1])},
        ratio(b, inner[0].value * inner[1].value, eps, adds_eps) {}

  GFL_INLINED void backward(const BoxPair<A>& b, A by_value, A by_united, BoxPair<A>& d) const {
    const A by_overlap = ratio.backward(b, by_value, by_united, d);
    for (int axis = 0; axis < 2; ++axis) {
      add_length(by_overlap * inner[1 - axis].value * inner[axis].slope, d.inner_low[axis], d.inner_high[axis]);
    }
  }
};

// From the target's centre to pred's along one axis, doubled.
template <class A> GFL_HOST_DEVICE A centre_distance(const BoxPair<A>& b, int axis) {
  return (b.target[axis] + b.target[axis + 2]) - (b.pred[axis] + b.pred[axis + 2]);
}

// Adds `g` times the derivative of that distance.
template <class A> GFL_HOST_DEVICE void add_centre_distance(A g, int axis, BoxPair<A>& d) {
  for (int i = axis; i < 4; i += 2) {
    d.pred[i] -= g;
    d.target[i] += g;
  }
}

// 1 − (I/U − ρ²/c²), the part that DIoU and CIoU share.
template <class A> struct DistanceIou {
  OverlapRatio<A> iou;
  Length<A> outer[2];
  A diagonal, penalty;

  GFL_HOST_DEVICE DistanceIou(const BoxPair<A>& b, A eps) : iou(b, eps, true) {
    for (int axis = 0; axis < 2; ++axis) outer[axis] = length_of(b.outer_low[axis], b.outer_high[axis]);
    const A dx = centre_distance(b, 0), dy = centre_distance(b, 1);
    diagonal = outer[0].value * outer[0].value + outer[1].value * outer[1].value + eps;
    penalty = (dx * dx / A(4) + dy * dy / A(4)) / diagonal;
  }

  GFL_INLINED void backward(const BoxPair<A>& b, BoxPair<A>& d) const {
    iou.backward(b, A(-1), A(0), d);
    for (int axis = 0; axis < 2; ++axis) {
      add_centre_distance(centre_distance(b, axis) / A(2) / diagonal, axis, d);
      const A by_outer = -penalty / diagonal * A(2) * outer[axis].value * outer[axis].slope;
      add_length(by_outer, d.outer_low[axis], d.outer_high[axis]);
    }
  }
};

// A loss within [0, 2]; beyond, it has no derivative.
template <class A> GFL_HOST_DEVICE A bounded_loss(A loss, BoxPair<A>& d) {
  if (loss < A(0) || loss > A(2)) {
    d = BoxPair<A>{};
    return loss < A(0) ? A(0) : A(2);
  }
  return loss;
}

// Every kind has a name and loss(pair, params, d), which adds to the zeros in `d`. A new one joins `IouKinds` below.
namespace iou_kind {

struct overlap {
  static constexpr const char* name = "overlap";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const OverlapRatio<A> iou(b, k.eps, false);
    iou.backward(b, A(1), A(0), d);
    return iou.ratio.value;
  }
};

struct iou {
  static constexpr const char* name = "iou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const OverlapRatio<A> iou(b, k.eps, false);
    iou.backward(b, A(-1), A(0), d);
    return A(1) - iou.ratio.value;
  }
};

struct giou {
  static constexpr const char* name = "giou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const OverlapRatio<A> iou(b, k.eps, false);
    const Length<A> width = length_of(b.outer_low[0], b.outer_high[0]);
    const Length<A> height = length_of(b.outer_low[1], b.outer_high[1]);
    const Extreme<A> enclosing = max_of(width.value * height.value, k.eps);
    const A e = enclosing.value, by_enclosing = iou.ratio.united / e / e * enclosing.to_a;
    iou.backward(b, A(-1), A(-1) / e, d);
    add_length(by_enclosing * height.value * width.slope, d.outer_low[0], d.outer_high[0]);
    add_length(by_enclosing * width.value * height.slope, d.outer_low[1], d.outer_high[1]);
    return A(1) - (iou.ratio.value - (e - iou.ratio.united) / e);
  }
};

struct diou {
  static constexpr const char* name = "diou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const DistanceIou<A> diou(b, k.eps);
    diou.backward(b, d);
    return A(1) - (diou.iou.ratio.value - diou.penalty);
  }
};

// The sides' ratio counts from an IoU of 1/2 on or, with `everywhere`, always.
template <class A> GFL_INLINED A complete_iou(const BoxPair<A>& b, A eps, bool everywhere, BoxPair<A>& d) {
  const DistanceIou<A> diou(b, eps);
  const A factor = A(0.40528473456935108578);  // 4/π²
  const A pw = extent(b.pred, 0), ph = extent(b.pred, 1) + eps;
  const A tw = extent(b.target, 0), th = extent(b.target, 1) + eps;
  const A angle = std::atan(tw / th) - std::atan(pw / ph);
  const A v = factor * angle * angle, rest = A(1) - diou.iou.ratio.value + v + (everywhere ? eps : A(0));
  // Equal boxes: their rounded IoU may be 1 and the quotient 0/0, which stands for no cost.
  const A alpha = (everywhere || diou.iou.ratio.value > A(0.5)) && rest != A(0) ? v / rest : A(0);
  diou.backward(b, d);
  const A by_angle = alpha * factor * A(2) * angle;
  const A p_norm = pw * pw + ph * ph, t_norm = tw * tw + th * th;
  // d atan(w/h) = (h·dw − w·dh)/(w² + h²); a box of no size at all has no angle.
  const A by_p = p_norm == A(0) ? A(0) : by_angle / p_norm, by_t = t_norm == A(0) ? A(0) : by_angle / t_norm;
  add_length(-by_p * ph, d.pred[0], d.pred[2]);
  add_length(by_p * pw, d.pred[1], d.pred[3]);
  add_length(by_t * th, d.target[0], d.target[2]);
  add_length(-by_t * tw, d.target[1], d.target[3]);
  return A(1) - (diou.iou.ratio.value - (diou.penalty + alpha * v));
}

struct ciou {
  static constexpr const char* name = "ciou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const A loss = complete_iou(b, k.eps, false, d);
    return bounded_loss(loss, d);
  }
};

struct full_ciou {
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    return complete_iou(b, k.eps, true, d);
  }
};

struct eiou {  // mmdet's extended IoU, whose intersection is signed where the boxes are apart, under a smooth L1
  static constexpr const char* name = "eiou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    A x1[2], x2[2];  // the intersection's sides from the enclosing box's corner
    Extreme<A> low[2], high[2];
    for (int a = 0; a < 2; ++a) {
      x1[a] = b.inner_low[a] - b.outer_low[a];
      x2[a] = b.inner_high[a] - b.outer_low[a];
      low[a] = min_of(x1[a], x2[a]);
      high[a] = max_of(x1[a], x2[a]);
    }
    const A overlap = x2[0] * x2[1] + low[0].value * low[1].value - x1[0] * high[1].value - high[0].value * x1[1];
    const AreaRatio<A> iou(b, overlap, k.eps, true);
    const A cost = A(1) - iou.value, slope = cost < k.parameter ? cost / k.parameter : A(1);
    const A by_overlap = iou.backward(b, -slope, A(0), d);
    for (int a = 0; a < 2; ++a) {
      const A by_low = by_overlap * low[1 - a].value, by_high = -by_overlap * x1[1 - a];
      const A by_x1 = -by_overlap * high[1 - a].value, by_x2 = by_overlap * x2[1 - a];
      add_length(by_x1 + by_low * low[a].to_a + by_high * high[a].to_a, d.outer_low[a], d.inner_low[a]);
      add_length(by_x2 + by_low * low[a].to_b + by_high * high[a].to_b, d.outer_low[a], d.inner_high[a]);
    }
    return cost < k.parameter ? cost * slope / A(2) : cost - k.parameter / A(2);
  }
};

struct siou {  // mmdet's (arXiv 2205.12740); for s from centre to centre, its angle cost sin 2α is 2|s₀·s₁|/|s|²
  static constexpr const char* name = "siou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const OverlapRatio<A> iou(b, k.eps, true);
    const A s[2] = {centre_distance(b, 0) / A(2) + k.eps, centre_distance(b, 1) / A(2) + k.eps};
    const A norm = s[0] * s[0] + s[1] * s[1], angle = A(2) * std::fabs(s[0] * s[1]) / norm;
    A cost = A(1), by_gamma = A(0), by_s[2];
    for (int a = 0; a < 2; ++a) {
      const Length<A> outer = length_of(b.outer_low[a], b.outer_high[a], k.eps);
      const A rho = s[a] / outer.value, gamma = k.parameter * (A(2) - angle), e = std::exp(gamma * rho * rho) / A(2);
      const Extreme<A> low = min_of(extent(b.pred, a), extent(b.target, a));
      const Extreme<A> high = max_of(extent(b.pred, a), extent(b.target, a));
      const A ratio = (low.value + k.eps) / (high.value + k.eps), o = A(1) - std::exp(ratio - A(1));
      const A by_low = A(2) * o * o * o * (o - A(1)) / (high.value + k.eps);
      cost += o * o * o * o / A(2) - e;
      by_gamma -= e * rho * rho;
      by_s[a] = -gamma * rho * e / outer.value;
      add_length(by_low * (low.to_a - ratio * high.to_a), d.pred[a], d.pred[a + 2]);
      add_length(by_low * (low.to_b - ratio * high.to_b), d.target[a], d.target[a + 2]);
      add_length(A(-2) * by_s[a] * rho * outer.slope, d.outer_low[a], d.outer_high[a]);
    }
    const A g = -k.parameter * by_gamma / norm;
    for (int a = 0; a < 2; ++a) add_centre_distance(by_s[a] + g * (std::copysign(s[1 - a], s[a]) - angle * s[a]), a, d);
    iou.backward(b, A(-1), A(0), d);
    return bounded_loss(A(1) - (iou.ratio.value - cost), d);
  }
};

struct mpdiou {  // arXiv 2307.07662: the corners' squared distances over the image's squared diagonal, the parameter
  static constexpr const char* name = "mpdiou";
  template <class A> static GFL_HOST_DEVICE A loss(const BoxPair<A>& b, const IouParams<A>& k, BoxPair<A>& d) {
    const OverlapRatio<A> iou(b, k.eps, true);
    A penalty = A(0);
    for (int i = 0; i < 4; ++i) {
      const A distance = b.pred[i] - b.target[i];
      penalty += distance * distance / k.parameter;
      add_length(A(2) * distance / k.parameter, d.target[i], d.pred[i]);
    }
    iou.backward(b, A(-1), A(0), d);
    return A(1) - (iou.ratio.value - penalty);
  }
};

}  // namespace iou_kind

template <class... Kind> struct IouKindList {};
using IouKinds = IouKindList<iou_kind::iou, iou_kind::giou, iou_kind::diou, iou_kind::ciou, iou_kind::eiou,
                             iou_kind::siou, iou_kind::mpdiou, iou_kind::overlap>;

// Calls f(kind) with the functor of that name; false if there is none.
template <class F, class... Kind> bool dispatch_iou_kind(IouKindList<Kind...>, const char* name, const F& f) {
  const auto call = [&f](auto kind) {
    f(kind);
    return true;
  };
  return ((std::strcmp(name, Kind::name) == 0 && call(Kind{})) || ...);
}

template <class F> bool dispatch_iou_kind(const char* name, const F& f) {
  return dispatch_iou_kind(IouKinds{}, name, f);
}

template <class A, class Kind>
GFL_INLINED IouTerm<A> iou_term(const A (&p)[4], const A (&t)[4], Kind, A eps, A parameter = A(0)) {
  BoxPair<A> b, d{};
  Extreme<A> inner_low[2], inner_high[2], outer_low[2], outer_high[2];
  for (int i = 0; i < 4; ++i) {
    b.pred[i] = p[i];
    b.target[i] = t[i];
  }
  for (int axis = 0; axis < 2; ++axis) {
    inner_low[axis] = max_of(p[axis], t[axis]);
    inner_high[axis] = min_of(p[axis + 2], t[axis + 2]);
    outer_low[axis] = min_of(p[axis], t[axis]);
    outer_high[axis] = max_of(p[axis + 2], t[axis + 2]);
    b.inner_low[axis] = inner_low[axis].value;
    b.inner_high[axis] = inner_high[axis].value;
    b.outer_low[axis] = outer_low[axis].value;
    b.outer_high[axis] = outer_high[axis].value;
  }
  IouTerm<A> out;
  out.value = Kind::loss(b, IouParams<A>{eps, parameter}, d);
  for (int axis = 0; axis < 2; ++axis) {
    add_extreme(inner_high[axis], d.inner_high[axis], d.pred[axis + 2], d.target[axis + 2]);
    add_extreme(inner_low[axis], d.inner_low[axis], d.pred[axis], d.target[axis]);
    add_extreme(outer_high[axis], d.outer_high[axis], d.pred[axis + 2], d.target[axis + 2]);
    add_extreme(outer_low[axis], d.outer_low[axis], d.pred[axis], d.target[axis]);
  }
  for (int i = 0; i < 4; ++i) {
    out.grad_pred[i] = d.pred[i];
    out.grad_target[i] = d.target[i];
  }
  return out;
}

}  // namespace gfl
