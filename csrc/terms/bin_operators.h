// SPDX-License-Identifier: Apache-2.0
// What each operator on bins makes of the softmax of a row: integral, decode and dfl, one functor per direction. The
// walks over rows, cpu/bins.cpp for fp64 and cuda/bins.cu, compute the softmax and call
//
//   forward(row, softmax, logit)                 stores the row's results
//   backward(row, softmax, logit) -> gradient    stores the row's small gradients
//   gradient(softmax, j, p)                      the gradient of logit j
//
// `logit(j)` is a bounded logit, p the probability of bin j. csrc/cpu/simd/bins.cpp has the same for registers of rows.
#pragma once
#include "bins.h"

namespace gfl {

// slope · ∂y/∂x[j]
template <class A> struct MeanGradient {
  A slope;
  GFL_HOST_DEVICE A operator()(const BinSoftmax<A>& s, int j, A p) const { return slope * s.mean_gradient(j, p); }
};

template <class A> struct IntegralForward {
  A* distance;
  template <class Logit>
  GFL_HOST_DEVICE void operator()(int64_t row, const BinSoftmax<A>& s, const Logit&) const {
    distance[row] = s.mean();
  }
};

template <class A> struct IntegralBackward {
  const A* grad_distance;
  template <class Logit>
  GFL_HOST_DEVICE MeanGradient<A> operator()(int64_t row, const BinSoftmax<A>&, const Logit&) const {
    return {grad_distance[row]};
  }
};

template <class A> struct DecodeForward {
  DecodeInput in;
  A* boxes;
  template <class Logit>
  GFL_HOST_DEVICE void operator()(int64_t row, const BinSoftmax<A>& s, const Logit&) const {
    boxes[row] = BoxSide<A>(in, row).at(s.mean()).value;
  }
};

// A side's coordinate hands its gradient on to the expected distance and, as it is, to the point.
template <class A> struct DecodeBackward {
  DecodeInput in;
  const A* grad_boxes;
  struct Gradient : MeanGradient<A> { A of_point; };
  template <class Logit>
  GFL_HOST_DEVICE Gradient operator()(int64_t row, const BinSoftmax<A>& s, const Logit&) const {
    const BoxSide<A> side(in, row);
    const A passed = side.at(s.mean()).inside ? grad_boxes[row] : A(0);
    return {{side.mean_gradient(passed)}, passed};
  }
};

template <class A> struct DflForward {
  DflInput in;
  A *loss, *distance;  // distance may be null
  template <class Logit>
  GFL_HOST_DEVICE void operator()(int64_t row, const BinSoftmax<A>& s, const Logit& logit) const {
    if (distance != nullptr) distance[row] = s.mean();
    const TwoBins<A> b = bins_of_row<A>(in, row);
    const A value = two_bin_loss(b, two_bin_entropy(s, b, logit));
    loss[row] = b.counted ? value : A(0);
  }
};

template <class A> struct DflBackward {
  DflInput in;
  const A *grad_loss, *grad_distance;  // grad_distance may be null
  DflGradients out;
  struct Gradient {
    TwoBins<A> bins;
    A of_loss, of_distance;
    bool with_distance;
    GFL_HOST_DEVICE A operator()(const BinSoftmax<A>& s, int j, A p) const {
      A g = bins.counted ? of_loss * two_bin_gradient(bins, j, p) : A(0);
      if (with_distance) g += of_distance * s.mean_gradient(j, p);
      return g;
    }
  };
  template <class Logit>
  GFL_HOST_DEVICE Gradient operator()(int64_t row, const BinSoftmax<A>& s, const Logit& logit) const {
    const TwoBins<A> b = bins_of_row<A>(in, row);
    const TwoBinEntropy<A> entropy = two_bin_entropy(s, b, logit);
    const A scale = grad_loss[row];
    if (out.target != nullptr) {
      static_cast<A*>(out.target)[row] = b.counted && !b.clamped ? scale * (entropy.right - entropy.left) : A(0);
    }
    if (out.weight_left != nullptr) static_cast<A*>(out.weight_left)[row] = scale * entropy.left;
    if (out.weight_right != nullptr) static_cast<A*>(out.weight_right)[row] = scale * entropy.right;
    return {b, scale, grad_distance != nullptr ? grad_distance[row] : A(0), grad_distance != nullptr};
  }
};

}  // namespace gfl
