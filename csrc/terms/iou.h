// SPDX-License-Identifier: Apache-2.0
// Losses of a box against another, 1 − IoU and its kin, with their derivatives. Boxes are xyxy.
//
//   iou    1 − I/U                                       U = max(union, ε)
//   giou   iou + (E − U)/E                               Rezatofighi et al., arXiv 1902.09630, E = max(enclosing area, ε)
//   diou   1 − I/(union + ε) + ρ²/(c² + ε)               Zheng et al., arXiv 1911.08287, eq. 7
//   ciou   diou + α·v, within [0, 2]                     Zheng et al., arXiv 2005.03572, α constant in the derivative
// Where a max or min ties, each side takes half the derivative, and a clamp at its bound lets it pass, both as torch's.
#pragma once
#include <cmath>
#include <limits>

#include "host_device.h"

namespace gfl {

// `overlap` is I/U itself, for losses of the IoU other than 1 − IoU.
enum class IouKind : int { iou = 0, giou = 1, diou = 2, ciou = 3, overlap = 4 };

// Value and derivatives of one pair of boxes.
template <class A> struct IouTerm { A value, grad_pred[4], grad_target[4]; };

// The larger or smaller of two numbers, with the share of the derivative that goes to either; NaN if one of them is.
template <class A> struct Extreme { A value, to_a, to_b; };

template <class A> GFL_HOST_DEVICE Extreme<A> larger(A a, A b) {
  if (a > b) return {a, A(1), A(0)};
  if (a < b) return {b, A(0), A(1)};
  if (a == b) return {a, A(0.5), A(0.5)};
  return {a + b, A(1), A(1)};
}

template <class A> GFL_HOST_DEVICE Extreme<A> smaller(A a, A b) {
  const Extreme<A> e = larger(-a, -b);
  return {-e.value, e.to_a, e.to_b};
}

// Adds `g` times the derivative of an extreme to those of its two arguments.
template <class A> GFL_HOST_DEVICE void spread(const Extreme<A>& e, A g, A& a, A& b) {
  a += g * e.to_a;
  b += g * e.to_b;
}

// A side that is cut at 0, and whether the derivative passes.
template <class A> struct Side { A value, slope; };

template <class A> GFL_HOST_DEVICE Side<A> side(A from, A to) {
  const A length = to - from;
  if (length < A(0)) return {A(0), A(0)};
  return {length, A(1)};
}

template <class A>
GFL_HOST_DEVICE IouTerm<A> iou_term(const A (&p)[4], const A (&t)[4], IouKind kind, A eps) {
  IouTerm<A> out{};
  A* gp = out.grad_pred;
  A* gt = out.grad_target;

  const Extreme<A> left = larger(p[0], t[0]), top = larger(p[1], t[1]);
  const Extreme<A> right = smaller(p[2], t[2]), bottom = smaller(p[3], t[3]);
  const Side<A> width = side(left.value, right.value), height = side(top.value, bottom.value);
  const A overlap = width.value * height.value;
  const A pw = p[2] - p[0], ph = p[3] - p[1], tw = t[2] - t[0], th = t[3] - t[1];
  const A area = pw * ph + tw * th - overlap;
  const bool adds_eps = kind == IouKind::diou || kind == IouKind::ciou;
  const Extreme<A> bounded = adds_eps ? Extreme<A>{area + eps, A(1), A(0)} : larger(area, eps);
  const A united = bounded.value;
  const A iou = overlap / united;

  // Derivatives of the loss by IoU, by the bounded union (beyond its part in IoU) and by the enclosing sides.
  A by_iou = A(-1), by_union = A(0), by_enclosing_width = A(0), by_enclosing_height = A(0);
  const Extreme<A> outer_left = smaller(p[0], t[0]), outer_top = smaller(p[1], t[1]);
  const Extreme<A> outer_right = larger(p[2], t[2]), outer_bottom = larger(p[3], t[3]);
  const Side<A> outer_width = side(outer_left.value, outer_right.value);
  const Side<A> outer_height = side(outer_top.value, outer_bottom.value);

  switch (kind) {
    case IouKind::iou: out.value = A(1) - iou; break;
    case IouKind::overlap:
      out.value = iou;
      by_iou = A(1);
      break;
    case IouKind::giou: {
      const Extreme<A> enclosing = larger(outer_width.value * outer_height.value, eps);
      const A e = enclosing.value;
      out.value = A(1) - (iou - (e - united) / e);
      by_union = A(-1) / e;
      const A by_enclosing = united / e / e * enclosing.to_a;
      by_enclosing_width = by_enclosing * outer_height.value;
      by_enclosing_height = by_enclosing * outer_width.value;
      break;
    }
    case IouKind::diou:
    case IouKind::ciou: {
      const A dx = (t[0] + t[2]) - (p[0] + p[2]), dy = (t[1] + t[3]) - (p[1] + p[3]);
      const A distance = dx * dx / A(4) + dy * dy / A(4);
      const A diagonal = outer_width.value * outer_width.value + outer_height.value * outer_height.value + eps;
      const A penalty = distance / diagonal;
      A cost = penalty, alpha = A(0), angle = A(0);
      const A factor = A(0.40528473456935108578);  // 4/π²
      if (kind == IouKind::ciou) {
        angle = std::atan(tw / (th + eps)) - std::atan(pw / (ph + eps));
        const A v = factor * angle * angle;
        const A rest = A(1) - iou + v;
        // Equal boxes: their rounded IoU may be 1 and the quotient 0/0, which stands for no cost.
        alpha = iou > A(0.5) && rest != A(0) ? v / rest : A(0);
        cost = penalty + alpha * v;
      }
      const A value = iou - cost;
      if (kind == IouKind::ciou && value > A(1)) {
        out.value = A(0);
        return out;
      }
      if (kind == IouKind::ciou && value < A(-1)) {
        out.value = A(2);
        return out;
      }
      out.value = A(1) - value;
      const A by_dx = dx / A(2) / diagonal, by_dy = dy / A(2) / diagonal;
      for (int i = 0; i < 4; i += 2) {
        gp[i] -= by_dx;
        gt[i] += by_dx;
        gp[i + 1] -= by_dy;
        gt[i + 1] += by_dy;
      }
      by_enclosing_width = -penalty / diagonal * A(2) * outer_width.value;
      by_enclosing_height = -penalty / diagonal * A(2) * outer_height.value;
      if (kind == IouKind::ciou) {
        const A by_angle = alpha * factor * A(2) * angle;
        const A phe = ph + eps, the = th + eps;
        const A p_norm = pw * pw + phe * phe, t_norm = tw * tw + the * the;
        // d atan(w/h) = (h·dw − w·dh)/(w² + h²); a box of no size at all has no angle.
        const A pu = p_norm == A(0) ? A(0) : by_angle / p_norm, tu = t_norm == A(0) ? A(0) : by_angle / t_norm;
        gp[2] -= pu * phe;
        gp[0] += pu * phe;
        gp[3] += pu * pw;
        gp[1] -= pu * pw;
        gt[2] += tu * the;
        gt[0] -= tu * the;
        gt[3] -= tu * tw;
        gt[1] += tu * tw;
      }
      break;
    }
  }

  by_union = (by_union - by_iou * iou / united) * bounded.to_a;
  const A by_overlap = by_iou / united - by_union;
  const A by_width = by_overlap * height.value * width.slope, by_height = by_overlap * width.value * height.slope;
  spread(right, by_width, gp[2], gt[2]);
  spread(left, -by_width, gp[0], gt[0]);
  spread(bottom, by_height, gp[3], gt[3]);
  spread(top, -by_height, gp[1], gt[1]);
  gp[2] += by_union * ph;
  gp[0] -= by_union * ph;
  gp[3] += by_union * pw;
  gp[1] -= by_union * pw;
  gt[2] += by_union * th;
  gt[0] -= by_union * th;
  gt[3] += by_union * tw;
  gt[1] -= by_union * tw;
  const A by_outer_width = by_enclosing_width * outer_width.slope;
  const A by_outer_height = by_enclosing_height * outer_height.slope;
  spread(outer_right, by_outer_width, gp[2], gt[2]);
  spread(outer_left, -by_outer_width, gp[0], gt[0]);
  spread(outer_bottom, by_outer_height, gp[3], gt[3]);
  spread(outer_top, -by_outer_height, gp[1], gt[1]);
  return out;
}

}  // namespace gfl
