// SPDX-License-Identifier: Apache-2.0
// Decoding on the CPU: the means of simd/integral.cpp, then stride, box and clipping in place, locations [begin, end)
// of the caller's chunk.
//
//   pred      [locations, 4, bins] dtype read, any strides      boxes       [locations, 4] A write
//   points    [locations, 2]       A     read                   limit       [locations, 2] A read
//   scale     [locations]          A     read                   grad_points [locations, 2] A write
//   grad_pred [locations, 4, bins] dtype write, contiguous
#include "gfl/decode.h"

#include <algorithm>

#include "bin_means.h"
#include "terms/bins.h"
#include "terms/distance.h"
#include "gfl/integral.h"

namespace gfl::cpu {
namespace {

constexpr int64_t kBlock = 64;  // locations whose gradients are held at a time

// What belongs to one location.
template <class A> struct Place {
  const A* point;
  A scale;
  const A* limit;

  Clamped<A> side(int side, A mean) const { return clipped_side_at(point[side & 1], mul_rn(mean, scale), side, limit); }
};

template <class A> Place<A> place_at(const DecodeInput& in, int64_t i) {
  const int64_t outer = in.pred.count_outer, inner = in.pred.count_inner;
  Place<A> p;
  p.point = static_cast<const A*>(in.points) + location_offset(in.stride_points, outer, inner, i);
  p.scale = static_cast<const A*>(in.scale)[location_offset(in.stride_scale, outer, inner, i)];
  p.limit = in.limit == nullptr
                ? nullptr
                : static_cast<const A*>(in.limit) + location_offset(in.stride_limit, outer, inner, i);
  return p;
}

template <class A> void boxes_of_means(const DecodeInput& in, A* boxes, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Place<A> place = place_at<A>(in, i);
    for (int side = 0; side < 4; ++side) boxes[i * 4 + side] = place.side(side, boxes[i * 4 + side]).value;
  }
}

// The gradient of each side of up to kBlock locations, 0 where it was clipped.
template <class A> struct Through {
  const DecodeInput& in;
  const A* grad_boxes;
  int64_t begin;
  A at[kBlock * 4];

  // Notes the gradient of a row whose mean is known; returns that of the mean.
  A pass(int64_t row, A mean) {
    const int side = static_cast<int>(row & 3);
    const Place<A> place = place_at<A>(in, row >> 2);
    const A passed = place.side(side, mean).inside ? grad_boxes[row] : A(0);
    at[row - begin * 4] = passed;
    return passed * side_sign<A>(side) * place.scale;
  }
};

void backward(const DecodeInput& in, Through<float>& through, void* grad_pred, int64_t begin, int64_t end) {
  const auto of_rows = [](void* context, const int64_t* row, int count, const float* mean, float* scales) {
    for (int k = 0; k < count; ++k) scales[k] = static_cast<Through<float>*>(context)->pass(row[k], mean[k]);
  };
  const SlopeOfMean slope{nullptr, of_rows, &through};
  GFL_BY_ISA(integral_backward, in.pred, slope, grad_pred, begin, end);
}

void backward(const DecodeInput& in, Through<double>& through, void* grad_pred, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.pred.bins);
  double e[kMaxBins];
  for (int64_t row = begin; row < end; ++row) {
    const double* x = static_cast<const double*>(in.pred.data) + row_offset(in.pred, row);
    const auto logit = [&](int j) { return bounded_logit(x[j * in.pred.stride_bin]); };
    const BinSoftmax<double> s = bin_softmax<double>(bins, logit, [&](int j, double value) { e[j] = value; });
    const double scale = through.pass(row, s.mean());
    if (grad_pred == nullptr) continue;
    for (int j = 0; j < bins; ++j) {
      const double gradient = scale * s.mean_gradient(j, e[j] / s.total);
      static_cast<double*>(grad_pred)[row * bins + j] = is_beyond(x[j * in.pred.stride_bin]) ? 0.0 : gradient;
    }
  }
}

template <class A>
void walk_back(const DecodeInput& in, const void* grad_boxes, void* grad_pred, A* grad_points, int64_t begin,
               int64_t end) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(end, first + kBlock);
    Through<A> through{in, static_cast<const A*>(grad_boxes), first, {}};
    backward(in, through, grad_pred, first * 4, last * 4);
    if (grad_points == nullptr) continue;
    for (int64_t i = first; i < last; ++i) {
      const A* side = through.at + (i - first) * 4;
      for (int axis = 0; axis < 2; ++axis) grad_points[i * 2 + axis] = side[axis] + side[axis + 2];
    }
  }
}

}  // namespace

void decode_forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end) {
  integral_forward(in.pred, boxes, begin * 4, end * 4);
  if (in.pred.dtype == DType::f64) boxes_of_means(in, static_cast<double*>(boxes), begin, end);
  else boxes_of_means(in, static_cast<float*>(boxes), begin, end);
}

void decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
                     int64_t end) {
  if (in.pred.dtype == DType::f64) {
    walk_back(in, grad_boxes, grad_pred, static_cast<double*>(grad_points), begin, end);
  } else {
    walk_back(in, grad_boxes, grad_pred, static_cast<float*>(grad_points), begin, end);
  }
}

}  // namespace gfl::cpu
