// SPDX-License-Identifier: Apache-2.0
#include "gfl/boxes.h"

#include "operator.h"
#include "rows.h"

namespace gfl::binding {
namespace {

constexpr int64_t kLocationsPerChunk = 4096;
constexpr int64_t kPairsPerChunk = 2048;

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

at::Tensor prepare_gradient(const at::Tensor& grad, at::IntArrayRef shape, const at::Tensor& like,
                            const char* argument) {
  check_shape(grad, shape, argument);
  check_dtype(grad, accumulator_of(like), argument);
  check_device(grad, like, argument);
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
  p.in = DistanceToBoxInput{dtype_of(distance, "distance"),
                            locations.outer,
                            locations.inner,
                            p.points.const_data_ptr(),
                            p.distance.const_data_ptr(),
                            max_shape.has_value() ? p.limit.const_data_ptr() : nullptr,
                            locations.strides[1],
                            locations.strides[0],
                            locations.strides[2]};
  return p;
}

at::Tensor distance_to_box_forward(const at::Tensor& points, const at::Tensor& distance,
                                   const OptionalTensor& max_shape) {
  const ToBox p = prepare_to_box(points, distance, max_shape);
  const at::Tensor boxes = at::empty(distance.sizes(), distance.options());
  void* out = boxes.mutable_data_ptr();
  run(distance, p.count(), kLocationsPerChunk, GFL_CUDA_LAUNCH(distance_to_box_forward, p.in, out),
      [&](int64_t begin, int64_t end) { cpu::distance_to_box_forward(p.in, out, begin, end); });
  return boxes;
}

std::tuple<at::Tensor, at::Tensor> distance_to_box_backward(const at::Tensor& grad_boxes, const at::Tensor& points,
                                                            const at::Tensor& distance, const OptionalTensor& max_shape,
                                                            Needs2 needs) {
  const ToBox p = prepare_to_box(points, distance, max_shape);
  const at::Tensor grad = prepare_gradient(grad_boxes, distance.sizes(), distance, "grad");
  const at::Tensor grad_points = wanted(needs[0], points), grad_distance = wanted(needs[1], distance);
  const void* from = grad.const_data_ptr();
  void* to_points = pointer(grad_points, needs[0]);
  void* to_distance = pointer(grad_distance, needs[1]);
  run(distance, p.count(), kLocationsPerChunk,
      GFL_CUDA_LAUNCH(distance_to_box_backward, p.in, from, to_points, to_distance), [&](int64_t begin, int64_t end) {
        cpu::distance_to_box_backward(p.in, from, to_points, to_distance, begin, end);
      });
  return {grad_points, grad_distance};
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
  p.in = BoxToDistanceInput{dtype_of(boxes, "boxes"),  locations.outer,          locations.inner,
                            p.points.const_data_ptr(), p.boxes.const_data_ptr(), locations.strides[1],
                            locations.strides[0],      max_distance.has_value(), max_distance.value_or(0) - eps};
  return p;
}

at::Tensor box_to_distance_forward(const at::Tensor& points, const at::Tensor& boxes,
                                   std::optional<double> max_distance, double eps) {
  const ToDistance p = prepare_to_distance(points, boxes, max_distance, eps);
  const at::Tensor distance = at::empty(boxes.sizes(), boxes.options());
  void* out = distance.mutable_data_ptr();
  run(boxes, p.count(), kLocationsPerChunk, GFL_CUDA_LAUNCH(box_to_distance_forward, p.in, out),
      [&](int64_t begin, int64_t end) { cpu::box_to_distance_forward(p.in, out, begin, end); });
  return distance;
}

std::tuple<at::Tensor, at::Tensor> box_to_distance_backward(const at::Tensor& grad_distance, const at::Tensor& points,
                                                            const at::Tensor& boxes, std::optional<double> max_distance,
                                                            double eps, Needs2 needs) {
  const ToDistance p = prepare_to_distance(points, boxes, max_distance, eps);
  const at::Tensor grad = prepare_gradient(grad_distance, boxes.sizes(), boxes, "grad");
  const at::Tensor grad_points = wanted(needs[0], points), grad_boxes = wanted(needs[1], boxes);
  const void* from = grad.const_data_ptr();
  void* to_points = pointer(grad_points, needs[0]);
  void* to_boxes = pointer(grad_boxes, needs[1]);
  run(boxes, p.count(), kLocationsPerChunk, GFL_CUDA_LAUNCH(box_to_distance_backward, p.in, from, to_points, to_boxes),
      [&](int64_t begin, int64_t end) { cpu::box_to_distance_backward(p.in, from, to_points, to_boxes, begin, end); });
  return {grad_points, grad_boxes};
}

struct Pairs {
  at::Tensor target;  // contiguous, kept alive while `in` points into it
  IouInput in;
};

Pairs prepare_pairs(const at::Tensor& pred, const at::Tensor& target, const std::string& kind, double eps,
                    double parameter) {
  check_dim(pred, 2, "pred");
  TORCH_CHECK_VALUE(pred.size(1) == 4, "gfl: `pred` must have shape [N, 4], got ", pred.sizes());
  TORCH_CHECK_VALUE(is_iou_kind(kind.c_str()), "gfl: `kind` is not known, got ", kind);
  check_dtype(target, accumulator_of(pred), "target");
  check_device(target, pred, "target");
  check_shape(target, pred.sizes(), "target");
  Pairs p{target.contiguous(), {}};
  p.in = IouInput{pred.const_data_ptr(),
                  dtype_of(pred, "pred"),
                  pred.stride(0),
                  pred.stride(1),
                  p.target.const_data_ptr(),
                  pred.size(0),
                  kind.c_str(),
                  eps,
                  parameter};
  return p;
}

at::Tensor iou_forward(const at::Tensor& pred, const at::Tensor& target, std::string kind, double eps,
                       double parameter) {
  const Pairs p = prepare_pairs(pred, target, kind, eps, parameter);
  const at::Tensor loss = at::empty({pred.size(0)}, pred.options().dtype(accumulator_of(pred)));
  void* out = loss.mutable_data_ptr();
  run(pred, p.in.rows, kPairsPerChunk, GFL_CUDA_LAUNCH(iou_forward, p.in, out),
      [&](int64_t begin, int64_t end) { cpu::iou_forward(p.in, out, begin, end); });
  return loss;
}

std::tuple<at::Tensor, at::Tensor> iou_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, std::string kind, double eps,
                                                double parameter, Needs2 needs) {
  const Pairs p = prepare_pairs(pred, target, kind, eps, parameter);
  const at::Tensor grad = prepare_gradient(grad_loss, {pred.size(0)}, pred, "grad_loss");
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_target = wanted(needs[1], target);
  const void* from = grad.const_data_ptr();
  void* to_pred = pointer(grad_pred, needs[0]);
  void* to_target = pointer(grad_target, needs[1]);
  run(pred, p.in.rows, kPairsPerChunk, GFL_CUDA_LAUNCH(iou_backward, p.in, from, to_pred, to_target),
      [&](int64_t begin, int64_t end) { cpu::iou_backward(p.in, from, to_pred, to_target, begin, end); });
  return {grad_pred, grad_target};
}

GFL_OPERATOR(distance_to_box_fwd, distance_to_box_forward)
GFL_OPERATOR(distance_to_box_bwd, distance_to_box_backward)
GFL_OPERATOR(box_to_distance_fwd, box_to_distance_forward)
GFL_OPERATOR(box_to_distance_bwd, box_to_distance_backward)
GFL_OPERATOR(iou_fwd, iou_forward)
GFL_OPERATOR(iou_bwd, iou_backward)

}  // namespace
}  // namespace gfl::binding
