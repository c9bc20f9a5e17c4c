// SPDX-License-Identifier: Apache-2.0
// Decoding on the CPU: softmax, expectation, stride, box and clipping in one walk over the logits, locations [begin,
// end) of the caller's chunk.
//
//   pred      [locations, 4, bins] dtype read, any strides      boxes       [locations, 4] A write
//   points    [locations, 2]       A     read                   limit       [locations, 2] A read
//   scale     [locations]          A     read                   grad_points [locations, 2] A write
//   grad_pred [locations, 4, bins] dtype write, contiguous
#include "gfl/decode.h"

#include "bins.h"
#include "distance.h"
#include "scalar.h"

namespace gfl::cpu {
namespace {

// What belongs to one location.
template <class A> struct Place {
  const A* point;
  A scale;
  const A* limit;
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

template <class T> void forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t i = begin; i < end; ++i) {
    const Place<A> place = place_at<A>(in, i);
    for (int side = 0; side < 4; ++side) {
      const T* x = static_cast<const T*>(in.pred.data) + row_offset(in.pred, i * 4 + side);
      const auto logit = [&](int j) { return bounded_logit<A>(load(x + j * in.pred.stride_bin)); };
      const A distance = mul_rn(bin_softmax<A>(static_cast<int>(in.pred.bins), logit).mean(), place.scale);
      static_cast<A*>(boxes)[i * 4 + side] = clipped_side_at(place.point[side & 1], distance, side, place.limit).value;
    }
  }
}

template <class T>
void backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
              int64_t end) {
  using A = acc_t<T>;
  const int bins = static_cast<int>(in.pred.bins);
  A x[kMaxBins], e[kMaxBins];
  const auto logit = [&](int j) { return bounded_logit(x[j]); };
  for (int64_t i = begin; i < end; ++i) {
    const Place<A> place = place_at<A>(in, i);
    A through[4];  // the gradient of each side, 0 where it was clipped
    for (int side = 0; side < 4; ++side) {
      const int64_t row = i * 4 + side;
      const T* from = static_cast<const T*>(in.pred.data) + row_offset(in.pred, row);
      for (int j = 0; j < bins; ++j) x[j] = load(from + j * in.pred.stride_bin);
      const BinSoftmax<A> s = bin_softmax<A>(bins, logit, [&](int j, A value) { e[j] = value; });
      const A distance = mul_rn(s.mean(), place.scale);
      const bool inside = clipped_side_at(place.point[side & 1], distance, side, place.limit).inside;
      through[side] = inside ? static_cast<const A*>(grad_boxes)[row] : A(0);
      if (grad_pred == nullptr) continue;
      const A scale = through[side] * side_sign<A>(side) * place.scale;
      T* grad = static_cast<T*>(grad_pred) + row * bins;
      for (int j = 0; j < bins; ++j) {
        store(grad + j, is_beyond(x[j]) ? A(0) : scale * s.mean_gradient(j, e[j] / s.total));
      }
    }
    if (grad_points == nullptr) continue;
    for (int axis = 0; axis < 2; ++axis) static_cast<A*>(grad_points)[i * 2 + axis] = through[axis] + through[axis + 2];
  }
}

}  // namespace

void decode_forward(const DecodeInput& in, void* boxes, int64_t begin, int64_t end) {
  dispatch(in.pred.dtype, [&](auto t) { forward<decltype(t)>(in, boxes, begin, end); });
}

void decode_backward(const DecodeInput& in, const void* grad_boxes, void* grad_pred, void* grad_points, int64_t begin,
                     int64_t end) {
  dispatch(in.pred.dtype,
           [&](auto t) { backward<decltype(t)>(in, grad_boxes, grad_pred, grad_points, begin, end); });
}

}  // namespace gfl::cpu
