// SPDX-License-Identifier: Apache-2.0
// Distances to boxes and back on the GPU: one thread per location.
//
//   points, limit [locations, 2] A read, any strides     distance, boxes [locations, 4] A read (any strides) or write
//   grad of the result [locations, 4] A read             gradients of the inputs A write
// Bytes per location: forward 10·sizeof(A), 2·sizeof(A) more where clipped; backward 12·sizeof(A) and what is wanted of
// 4·sizeof(A) and 2·sizeof(A), less where points are shared. Four coordinates are one access of 16 bytes (two for
// double). Accumulator: the type itself; every coordinate is one rounded operation. The bits repeat.
#include "gfl/boxes.h"

#include "terms/bins.h"
#include "terms/distance.h"
#include "fours.h"

namespace gfl::cuda {
namespace {

// Which of the tensors can be moved one row per access: the input of four coordinates, the result or its gradient, the
// gradient of the input.
struct Dense { bool input, result, grad; };

template <class A, class Input>
__device__ __forceinline__ const A* at(const Input& in, const void* data, LocationStride stride, int64_t i) {
  if (data == nullptr) return nullptr;
  return static_cast<const A*>(data) + location_offset(stride, in.count_outer, in.count_inner, i);
}

// body(location) for every location.
template <class Input, class Body> __device__ __forceinline__ void for_locations(const Input& in, const Body& body) {
  const int64_t count = in.count_outer * in.count_inner;
  for (int64_t i = int64_t(blockIdx.x) * kFoursThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kFoursThreads) {
    body(i);
  }
}

template <class A>
__global__ void __launch_bounds__(kFoursThreads)
    distance_to_box_forward_kernel(DistanceToBoxInput in, Dense dense, A* boxes) {
  for_locations(in, [&](int64_t i) {
    const A* point = at<A>(in, in.points, in.stride_points, i);
    const A* limit = at<A>(in, in.limit, in.stride_limit, i);
    A distance[4], box[4];
    load_four(at<A>(in, in.distance, in.stride_distance, i), 1, dense.input, distance);
    for (int side = 0; side < 4; ++side) {
      box[side] = clipped_side_at(point[side & 1], distance[side], side, limit).value;
    }
    store_four(boxes + i * 4, dense.result, box);
  });
}

template <class A>
__global__ void __launch_bounds__(kFoursThreads)
    distance_to_box_backward_kernel(DistanceToBoxInput in, Dense dense, const A* grad_boxes, A* grad_points,
                                    A* grad_distance) {
  for_locations(in, [&](int64_t i) {
    const A* point = at<A>(in, in.points, in.stride_points, i);
    const A* limit = at<A>(in, in.limit, in.stride_limit, i);
    A distance[4], through[4];  // the gradient of each side, 0 where it was clipped
    load_four(at<A>(in, in.distance, in.stride_distance, i), 1, dense.input, distance);
    load_four(grad_boxes + i * 4, 1, dense.result, through);
    for (int side = 0; side < 4; ++side) {
      if (!clipped_side_at(point[side & 1], distance[side], side, limit).inside) through[side] = A(0);
      distance[side] = through[side] * side_sign<A>(side);
    }
    if (grad_distance != nullptr) store_four(grad_distance + i * 4, dense.grad, distance);
    for (int axis = 0; axis < 2 && grad_points != nullptr; ++axis) {
      grad_points[i * 2 + axis] = through[axis] + through[axis + 2];
    }
  });
}

template <class A>
__global__ void __launch_bounds__(kFoursThreads)
    box_to_distance_forward_kernel(BoxToDistanceInput in, Dense dense, A* distance) {
  for_locations(in, [&](int64_t i) {
    const A* point = at<A>(in, in.points, in.stride_points, i);
    A box[4], d[4];
    load_four(at<A>(in, in.boxes, in.stride_boxes, i), 1, dense.input, box);
    for (int side = 0; side < 4; ++side) {
      d[side] = distance_to_side(point[side & 1], box[side], side);
      if (in.clamped) d[side] = clamp_passing_grad(d[side], A(0), static_cast<A>(in.upper)).value;
    }
    store_four(distance + i * 4, dense.result, d);
  });
}

template <class A>
__global__ void __launch_bounds__(kFoursThreads)
    box_to_distance_backward_kernel(BoxToDistanceInput in, Dense dense, const A* grad_distance, A* grad_points,
                                    A* grad_boxes) {
  for_locations(in, [&](int64_t i) {
    const A* point = at<A>(in, in.points, in.stride_points, i);
    A box[4], through[4];
    load_four(at<A>(in, in.boxes, in.stride_boxes, i), 1, dense.input, box);
    load_four(grad_distance + i * 4, 1, dense.result, through);
    for (int side = 0; side < 4; ++side) {
      const A d = distance_to_side(point[side & 1], box[side], side);
      const bool inside = !in.clamped || clamp_passing_grad(d, A(0), static_cast<A>(in.upper)).inside;
      through[side] = inside ? through[side] * side_sign<A>(side) : A(0);
    }
    if (grad_boxes != nullptr) store_four(grad_boxes + i * 4, dense.grad, through);
    for (int axis = 0; axis < 2 && grad_points != nullptr; ++axis) {
      grad_points[i * 2 + axis] = -through[axis] - through[axis + 2];
    }
  });
}

template <class Input, class Body> cudaError_t for_type(const Input& in, const Body& body) {
  if (in.count_outer * in.count_inner == 0) return cudaSuccess;
  if (in.dtype == DType::f64) body(double{});
  else body(float{});
  return cudaGetLastError();
}

template <class A>
Dense dense_of(const void* input, LocationStride stride, const void* result, const void* grad) {
  return {dense_fours<A>(input, stride.outer, stride.inner), dense_fours<A>(result, 0, 4), dense_fours<A>(grad, 0, 4)};
}

}  // namespace

cudaError_t distance_to_box_forward(const DistanceToBoxInput& in, void* boxes, cudaStream_t stream) {
  return for_type(in, [&](auto t) {
    using A = decltype(t);
    GFL_LAUNCH(distance_to_box_forward_kernel<A>, fours_grid(in.count_outer * in.count_inner), dim3(kFoursThreads), 0,
               stream, in, dense_of<A>(in.distance, in.stride_distance, boxes, nullptr), static_cast<A*>(boxes));
  });
}

cudaError_t distance_to_box_backward(const DistanceToBoxInput& in, const void* grad_boxes, void* grad_points,
                                     void* grad_distance, cudaStream_t stream) {
  return for_type(in, [&](auto t) {
    using A = decltype(t);
    GFL_LAUNCH(distance_to_box_backward_kernel<A>, fours_grid(in.count_outer * in.count_inner), dim3(kFoursThreads), 0,
               stream, in, dense_of<A>(in.distance, in.stride_distance, grad_boxes, grad_distance),
               static_cast<const A*>(grad_boxes), static_cast<A*>(grad_points), static_cast<A*>(grad_distance));
  });
}

cudaError_t box_to_distance_forward(const BoxToDistanceInput& in, void* distance, cudaStream_t stream) {
  return for_type(in, [&](auto t) {
    using A = decltype(t);
    GFL_LAUNCH(box_to_distance_forward_kernel<A>, fours_grid(in.count_outer * in.count_inner), dim3(kFoursThreads), 0,
               stream, in, dense_of<A>(in.boxes, in.stride_boxes, distance, nullptr), static_cast<A*>(distance));
  });
}

cudaError_t box_to_distance_backward(const BoxToDistanceInput& in, const void* grad_distance, void* grad_points,
                                     void* grad_boxes, cudaStream_t stream) {
  return for_type(in, [&](auto t) {
    using A = decltype(t);
    GFL_LAUNCH(box_to_distance_backward_kernel<A>, fours_grid(in.count_outer * in.count_inner), dim3(kFoursThreads), 0,
               stream, in, dense_of<A>(in.boxes, in.stride_boxes, grad_distance, grad_boxes),
               static_cast<const A*>(grad_distance), static_cast<A*>(grad_points), static_cast<A*>(grad_boxes));
  });
}

}  // namespace gfl::cuda
