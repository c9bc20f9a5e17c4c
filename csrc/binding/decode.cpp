// SPDX-License-Identifier: Apache-2.0
#include "gfl/decode.h"

#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

struct Prepared {
  at::Tensor pred, points, stride, limit;  // kept alive while `in` points into them
  std::vector<int64_t> shape;              // of the boxes
  DecodeInput in;
};

Prepared prepare(const at::Tensor& pred, const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                 const OptionalTensor& max_shape) {
  check_four_sides(pred, reg_max);
  Prepared p{pred, points, stride, max_shape.value_or(points), pred.sizes().vec(), {}};
  std::vector<int64_t> pairs = p.shape;
  pairs.back() = 2;
  p.shape.back() = 4;
  check_coordinates(p.points, pairs, accumulator_of(pred), pred, "points");
  check_coordinates(p.limit, pairs, accumulator_of(pred), pred, "max_shape");
  check_shape(stride, pred.sizes().slice(0, pred.dim() - 1), "stride");
  check_dtype(stride, accumulator_of(pred), "stride");
  check_device(stride, pred, "stride");
  const Locations locations = locations_of({{&p.pred, 1}, {&p.points, 1}, {&p.stride, 0}, {&p.limit, 1}});
  p.in.pred = bin_rows(p.pred, 4, reg_max + 1, locations);
  p.in.points = p.points.const_data_ptr();
  p.in.scale = p.stride.const_data_ptr();
  p.in.limit = max_shape.has_value() ? p.limit.const_data_ptr() : nullptr;
  p.in.stride_points = locations.strides[1];
  p.in.stride_scale = locations.strides[2];
  p.in.stride_limit = locations.strides[3];
  return p;
}

}  // namespace

at::Tensor decode_forward(const at::Tensor& pred, const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                          const OptionalTensor& max_shape) {
  const Prepared p = prepare(pred, points, stride, reg_max, max_shape);
  const at::Tensor boxes = at::empty(p.shape, pred.options().dtype(accumulator_of(pred)));
  void* out = boxes.mutable_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::decode_forward(p.in, out, stream); });
    return boxes;
  }
#endif
  for_chunks(p.in.pred.locations(), rows_per_chunk(4 * p.in.pred.bins),
             [&](int64_t begin, int64_t end) { cpu::decode_forward(p.in, out, begin, end); });
  return boxes;
}

std::tuple<at::Tensor, at::Tensor> decode_backward(const at::Tensor& grad_boxes, const at::Tensor& pred,
                                                   const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                                                   const OptionalTensor& max_shape, Needs2 needs) {
  const Prepared p = prepare(pred, points, stride, reg_max, max_shape);
  check_shape(grad_boxes, p.shape, "grad_boxes");
  check_dtype(grad_boxes, accumulator_of(pred), "grad_boxes");
  check_device(grad_boxes, pred, "grad_boxes");
  const at::Tensor grad = grad_boxes.contiguous();
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_points = wanted(needs[1], points);
  void* out = pointer(grad_pred, needs[0]);
  void* out_points = pointer(grad_points, needs[1]);
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::decode_backward(p.in, grad.const_data_ptr(), out, out_points, stream);
    });
    return {grad_pred, grad_points};
  }
#endif
  for_chunks(p.in.pred.locations(), rows_per_chunk(4 * p.in.pred.bins), [&](int64_t begin, int64_t end) {
    cpu::decode_backward(p.in, grad.const_data_ptr(), out, out_points, begin, end);
  });
  return {grad_pred, grad_points};
}

GFL_OPERATOR(decode_fwd, decode_forward)
GFL_OPERATOR(decode_bwd, decode_backward)

}  // namespace gfl::binding
