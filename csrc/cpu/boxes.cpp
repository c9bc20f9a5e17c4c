// SPDX-License-Identifier: Apache-2.0
// Distances to boxes and back on the CPU, locations [begin, end) of the caller's chunk.
//
//   points, limit [locations, 2] A read     distance, boxes [locations, 4] A read or written     gradients A write
#include "gfl/boxes.h"

#include "terms/bins.h"
#include "terms/distance.h"

namespace gfl::cpu {
namespace {

template <class Input, class Body> void for_type(const Input& in, const Body& body) {
  if (in.dtype == DType::f64) body(double{});
  else body(float{});
}

// Where location i of a tensor lies.
template <class A, class Input> const A* at(const Input& in, const void* data, LocationStride stride, int64_t i) {
  if (data == nullptr) return nullptr;
  return static_cast<const A*>(data) + location_offset(stride, in.count_outer, in.count_inner, i);
}

}  // namespace

void distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, int64_t begin, int64_t end) {
  for_type(in, [&](auto t) {
    using A = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const A* point = at<A>(in, in.points, in.stride_points, i);
      const A* distance = at<A>(in, in.distance, in.stride_distance, i);
      const A* limit = at<A>(in, in.limit, in.stride_limit, i);
      for (int side = 0; side < 4; ++side) {
        static_cast<A*>(boxes)[i * 4 + side] = clipped_side_at(point[side & 1], distance[side], side, limit).value;
      }
    }
  });
}

void distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                              void* grad_distance, int64_t begin, int64_t end) {
  for_type(in, [&](auto t) {
    using A = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const A* point = at<A>(in, in.points, in.stride_points, i);
      const A* distance = at<A>(in, in.distance, in.stride_distance, i);
      const A* limit = at<A>(in, in.limit, in.stride_limit, i);
      A through[4];  // the gradient of each side, 0 where it was clipped
      for (int side = 0; side < 4; ++side) {
        const bool inside = clipped_side_at(point[side & 1], distance[side], side, limit).inside;
        through[side] = inside ? static_cast<const A*>(grad_boxes)[i * 4 + side] : A(0);
        if (grad_distance != nullptr) {
          static_cast<A*>(grad_distance)[i * 4 + side] = through[side] * side_sign<A>(side);
        }
      }
      if (grad_points == nullptr) continue;
      for (int axis = 0; axis < 2; ++axis) {
        static_cast<A*>(grad_points)[i * 2 + axis] = through[axis] + through[axis + 2];
      }
    }
  });
}

void box_to_distance_forward(const BoxToDistanceInput& in, void* distance, int64_t begin, int64_t end) {
  for_type(in, [&](auto t) {
    using A = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const A* point = at<A>(in, in.points, in.stride_points, i);
      const A* box = at<A>(in, in.boxes, in.stride_boxes, i);
      for (int side = 0; side < 4; ++side) {
        const A d = distance_to_side(point[side & 1], box[side], side);
        static_cast<A*>(distance)[i * 4 + side] =
            in.clamped ? clamp_passing_grad(d, A(0), static_cast<A>(in.upper)).value : d;
      }
    }
  });
}

void box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                              void* grad_boxes, int64_t begin, int64_t end) {
  for_type(in, [&](auto t) {
    using A = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      const A* point = at<A>(in, in.points, in.stride_points, i);
      const A* box = at<A>(in, in.boxes, in.stride_boxes, i);
      A through[4];
      for (int side = 0; side < 4; ++side) {
        const A d = distance_to_side(point[side & 1], box[side], side);
        const bool inside = !in.clamped || clamp_passing_grad(d, A(0), static_cast<A>(in.upper)).inside;
        through[side] = inside ? static_cast<const A*>(grad_distance)[i * 4 + side] * side_sign<A>(side) : A(0);
        if (grad_boxes != nullptr) static_cast<A*>(grad_boxes)[i * 4 + side] = through[side];
      }
      if (grad_points == nullptr) continue;
      for (int axis = 0; axis < 2; ++axis) {
        static_cast<A*>(grad_points)[i * 2 + axis] = -through[axis] - through[axis + 2];
      }
    }
  });
}

}  // namespace gfl::cpu
