// SPDX-License-Identifier: Apache-2.0
#include "gfl/boxes.h"

#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

constexpr int64_t kLocationsPerChunk = 4096;

std::vector<int64_t> with_last(const at::Tensor& t, int64_t last) {
  std::vector<int64_t> shape = t.sizes().vec();
  shape.back() = last;
  return shape;
}

void check_fours(const at::Tensor& t, const char* argument) {
  TORCH_CHECK_VALUE(t.dim() >= 1 && t.size(-1) == 4, "gfl: `", argument, "` must have shape [..., 4], got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "gfl: `", argument,
                   "` must be fp32 or fp64, got ", t.scalar_type());
}

// What a backward reads besides the forward's input.
at::Tensor prepare_gradient(const at::Tensor& grad, const at::Tensor& like) {
  check_shape(grad, like.sizes(), "grad");
  check_dtype(grad, like.scalar_type(), "grad");
  check_device(grad, like, "grad");
  return grad.contiguous();
}

struct ToBox {
  at::Tensor points, distance, limit;  // kept alive while `in` points into them
  DistanceToBoxInput in;
  int64_t count() const { return in.count_outer * in.count_inner; }
};

ToBox prepare_to_box(const at::Tensor& points, const at::Tensor& distance, const OptionalTensor& max_shape) {
  check_fours(distance, "distance");
  ToBox p{points, distance, max_shape.value_or(points), {}};
  const std::vector<int64_t> pairs = with_last(distance, 2);
  check_coordinates(p.points, pairs, distance.scalar_type(), distance, "points");
  check_coordinates(p.distance, distance.sizes(), distance.scalar_type(), distance, "distance");
  check_coordinates(p.limit, pairs, distance.scalar_type(), distance, "max_shape");
  const Locations locations = locations_of({{&p.distance, 1}, {&p.points, 1}, {&p.limit, 1}});
  p.in = DistanceToBoxInput{dtype_of(distance, "distance"), locations.outer, locations.inner, p.points.const_data_ptr(),
                            p.distance.const_data_ptr(), max_shape.has_value() ? p.limit.const_data_ptr() : nullptr,
                            locations.strides[1], locations.strides[0], locations.strides[2]};
  return p;
}

struct ToDistance {
  at::Tensor points, boxes;  // kept alive while `in` points into them
  BoxToDistanceInput in;
  int64_t count() const { return in.count_outer * in.count_inner; }
};

ToDistance prepare_to_distance(const at::Tensor& points, const at::Tensor& boxes, std::optional<double> max_distance,
                               double eps) {
  check_fours(boxes, "boxes");
  ToDistance p{points, boxes, {}};
  check_coordinates(p.points, with_last(boxes, 2), boxes.scalar_type(), boxes, "points");
  check_coordinates(p.boxes, boxes.sizes(), boxes.scalar_type(), boxes, "boxes");
  const Locations locations = locations_of({{&p.boxes, 1}, {&p.points, 1}});
  p.in = BoxToDistanceInput{dtype_of(boxes, "boxes"), locations.outer, locations.inner, p.points.const_data_ptr(),
                            p.boxes.const_data_ptr(), locations.strides[1], locations.strides[0],
                            max_distance.has_value(), max_distance.value_or(0) - eps};
  return p;
}

}  // namespace

at::Tensor distance_to_box_forward(const at::Tensor& points, const at::Tensor& distance,
                                   const OptionalTensor& max_shape) {
  const ToBox p = prepare_to_box(points, distance, max_shape);
  const at::Tensor boxes = at::empty(distance.sizes(), distance.options());
#if defined(GFL_WITH_CUDA)
  if (distance.is_cuda()) {
    on_stream_of(distance, [&](cudaStream_t stream) {
      return cuda::distance_to_box_forward(p.in, boxes.mutable_data_ptr(), stream);
    });
    return boxes;
  }
#endif
  for_chunks(p.count(), kLocationsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::distance_to_box_forward(p.in, boxes.mutable_data_ptr(), begin, end);
  });
  return boxes;
}

std::tuple<at::Tensor, at::Tensor> distance_to_box_backward(const at::Tensor& grad_boxes, const at::Tensor& points,
                                                            const at::Tensor& distance, const OptionalTensor& max_shape,
                                                            Needs2 needs) {
  const ToBox p = prepare_to_box(points, distance, max_shape);
  const at::Tensor grad = prepare_gradient(grad_boxes, distance);
  const at::Tensor grad_points = wanted(needs[0], points), grad_distance = wanted(needs[1], distance);
#if defined(GFL_WITH_CUDA)
  if (distance.is_cuda()) {
    on_stream_of(distance, [&](cudaStream_t stream) {
      return cuda::distance_to_box_backward(p.in, grad.const_data_ptr(), pointer(grad_points, needs[0]),
                                            pointer(grad_distance, needs[1]), stream);
    });
    return {grad_points, grad_distance};
  }
#endif
  for_chunks(p.count(), kLocationsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::distance_to_box_backward(p.in, grad.const_data_ptr(), pointer(grad_points, needs[0]),
                                  pointer(grad_distance, needs[1]), begin, end);
  });
  return {grad_points, grad_distance};
}

at::Tensor box_to_distance_forward(const at::Tensor& points, const at::Tensor& boxes,
                                   std::optional<double> max_distance, double eps) {
  const ToDistance p = prepare_to_distance(points, boxes, max_distance, eps);
  const at::Tensor distance = at::empty(boxes.sizes(), boxes.options());
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) {
    on_stream_of(boxes, [&](cudaStream_t stream) {
      return cuda::box_to_distance_forward(p.in, distance.mutable_data_ptr(), stream);
    });
    return distance;
  }
#endif
  for_chunks(p.count(), kLocationsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::box_to_distance_forward(p.in, distance.mutable_data_ptr(), begin, end);
  });
  return distance;
}

std::tuple<at::Tensor, at::Tensor> box_to_distance_backward(const at::Tensor& grad_distance, const at::Tensor& points,
                                                            const at::Tensor& boxes, std::optional<double> max_distance,
                                                            double eps, Needs2 needs) {
  const ToDistance p = prepare_to_distance(points, boxes, max_distance, eps);
  const at::Tensor grad = prepare_gradient(grad_distance, boxes);
  const at::Tensor grad_points = wanted(needs[0], points), grad_boxes = wanted(needs[1], boxes);
#if defined(GFL_WITH_CUDA)
  if (boxes.is_cuda()) {
    on_stream_of(boxes, [&](cudaStream_t stream) {
      return cuda::box_to_distance_backward(p.in, grad.const_data_ptr(), pointer(grad_points, needs[0]),
                                            pointer(grad_boxes, needs[1]), stream);
    });
    return {grad_points, grad_boxes};
  }
#endif
  for_chunks(p.count(), kLocationsPerChunk, [&](int64_t begin, int64_t end) {
    cpu::box_to_distance_backward(p.in, grad.const_data_ptr(), pointer(grad_points, needs[0]),
                                  pointer(grad_boxes, needs[1]), begin, end);
  });
  return {grad_points, grad_boxes};
}

GFL_OPERATOR(box_to_distance_fwd, box_to_distance_forward)
GFL_OPERATOR(box_to_distance_bwd, box_to_distance_backward)
GFL_OPERATOR(distance_to_box_fwd, distance_to_box_forward)
GFL_OPERATOR(distance_to_box_bwd, distance_to_box_backward)

}  // namespace gfl::binding
