// SPDX-License-Identifier: Apache-2.0
// Operators on distributions over bins: integral, decode, distribution focal loss in its three forms, distillation.
#include "gfl/bins.h"

#include <algorithm>
#include <vector>

#include "operator.h"
#include "rows.h"

namespace gfl::binding {
namespace {

// `t`, checked to lie beside `pred` with that shape and dtype, contiguous.
at::Tensor checked(const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, const at::Tensor& pred,
                   const char* argument) {
  check_shape(t, shape, argument);
  check_dtype(t, dtype, argument);
  check_device(t, pred, argument);
  return t.contiguous();
}

at::Tensor empty_results(const at::Tensor& pred, at::IntArrayRef shape) {
  return at::empty(shape, pred.options().dtype(accumulator_of(pred)));
}

// The shape of `pred` with another last dimension.
std::vector<int64_t> shape_with_last(const at::Tensor& pred, int64_t last) {
  std::vector<int64_t> shape = pred.sizes().vec();
  shape.back() = last;
  return shape;
}

}  // namespace

// ---- integral ----

namespace {

// Rows of a prediction, or of a copy of it.
struct Sides {
  at::Tensor pred;  // kept alive while `rows` points into it
  BinRows rows;

  Sides(const at::Tensor& given, int64_t reg_max) : pred(given) {
    check_four_sides(given, reg_max);
    const Locations locations = locations_of({{&pred, 1}});
    rows = bin_rows(pred, 4, reg_max + 1, locations);
  }
  int64_t chunk() const { return rows_per_chunk(rows.bins); }
};

}  // namespace

at::Tensor integral_forward(const at::Tensor& pred, int64_t reg_max) {
  const Sides sides(pred, reg_max);
  const at::Tensor distance = empty_results(pred, shape_with_last(pred, 4));
  void* const out = distance.mutable_data_ptr();
  run(pred, sides.rows.rows(), sides.chunk(), GFL_CUDA_LAUNCH(integral_forward, sides.rows, out),
      [&](int64_t begin, int64_t end) { cpu::integral_forward(sides.rows, out, begin, end); });
  return distance;
}

at::Tensor integral_backward(const at::Tensor& grad_distance, const at::Tensor& pred, int64_t reg_max,
                             std::array<bool, 1> needs) {
  const Sides sides(pred, reg_max);
  const at::Tensor grads =
      checked(grad_distance, shape_with_last(pred, 4), accumulator_of(pred), pred, "grad_distance");
  const at::Tensor grad_pred = wanted(needs[0], pred);
  if (!needs[0]) return grad_pred;
  const void* const grad = grads.const_data_ptr();
  void* const out = grad_pred.mutable_data_ptr();
  run(pred, sides.rows.rows(), sides.chunk(), GFL_CUDA_LAUNCH(integral_backward, sides.rows, grad, out),
      [&](int64_t begin, int64_t end) { cpu::integral_backward(sides.rows, grad, out, begin, end); });
  return grad_pred;
}

// ---- decode ----

namespace {

struct Decode {
  at::Tensor pred, points, stride, limit;  // kept alive while `in` points into them
  DecodeInput in;

  Decode(const at::Tensor& given, const at::Tensor& given_points, const at::Tensor& given_stride, int64_t reg_max,
         const OptionalTensor& max_shape)
      : pred(given), points(given_points), stride(given_stride), limit(max_shape.value_or(given_points)), in{} {
    check_four_sides(pred, reg_max);
    const std::vector<int64_t> pairs = shape_with_last(pred, 2);
    check_coordinates(points, pairs, accumulator_of(pred), pred, "points");
    check_coordinates(limit, pairs, accumulator_of(pred), pred, "max_shape");
    check_shape(stride, pred.sizes().slice(0, pred.dim() - 1), "stride");
    check_dtype(stride, accumulator_of(pred), "stride");
    check_device(stride, pred, "stride");
    const Locations locations = locations_of({{&pred, 1}, {&points, 1}, {&stride, 0}, {&limit, 1}});
    in.pred = bin_rows(pred, 4, reg_max + 1, locations);
    in.points = points.const_data_ptr();
    in.scale = stride.const_data_ptr();
    in.limit = max_shape.has_value() ? limit.const_data_ptr() : nullptr;
    in.stride_points = locations.strides[1];
    in.stride_scale = locations.strides[2];
    in.stride_limit = locations.strides[3];
  }
  int64_t chunk() const { return rows_per_chunk(4 * in.pred.bins); }
};

}  // namespace

at::Tensor decode_forward(const at::Tensor& pred, const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                          const OptionalTensor& max_shape) {
  const Decode decode(pred, points, stride, reg_max, max_shape);
  const at::Tensor boxes = empty_results(pred, shape_with_last(pred, 4));
  void* const out = boxes.mutable_data_ptr();
  run(pred, decode.in.pred.locations(), decode.chunk(), GFL_CUDA_LAUNCH(decode_forward, decode.in, out),
      [&](int64_t begin, int64_t end) { cpu::decode_forward(decode.in, out, begin, end); });
  return boxes;
}

std::tuple<at::Tensor, at::Tensor> decode_backward(const at::Tensor& grad_boxes, const at::Tensor& pred,
                                                   const at::Tensor& points, const at::Tensor& stride, int64_t reg_max,
                                                   const OptionalTensor& max_shape, Needs2 needs) {
  const Decode decode(pred, points, stride, reg_max, max_shape);
  const at::Tensor grads = checked(grad_boxes, shape_with_last(pred, 4), accumulator_of(pred), pred, "grad_boxes");
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_points = wanted(needs[1], points);
  const void* const grad = grads.const_data_ptr();
  void* const out = pointer(grad_pred, needs[0]);
  void* const out_points = pointer(grad_points, needs[1]);
  run(pred, decode.in.pred.locations(), decode.chunk(),
      GFL_CUDA_LAUNCH(decode_backward, decode.in, grad, out, out_points),
      [&](int64_t begin, int64_t end) { cpu::decode_backward(decode.in, grad, out, out_points, begin, end); });
  return {grad_pred, grad_points};
}

// ---- distribution focal loss ----

namespace {

struct Dfl {
  const at::Tensor& pred;
  std::vector<at::Tensor> kept_alive;  // contiguous, while `in` points into them
  DflInput in{};

  explicit Dfl(const at::Tensor& pred) : pred(pred) {
    check_dim(pred, 2, "pred");
    check_bins(pred.size(1));
    in.pred = BinRows{pred.const_data_ptr(), dtype_of(pred, "pred"), 1, pred.size(0),  1,
                      pred.size(1),          {0, pred.stride(0)},    0, pred.stride(1)};
  }
  Dfl(const at::Tensor& pred, const at::Tensor& target, bool ignore_out_of_range) : Dfl(pred) {
    in.target = rows_of(target, "target");
    in.ignore_out_of_range = ignore_out_of_range;
  }
  Dfl(const at::Tensor& pred, const at::Tensor& left, const at::Tensor& weight_left, const at::Tensor& weight_right)
      : Dfl(pred) {
    kept_alive.push_back(checked(left, {pred.size(0)}, at::kLong, pred, "left"));
    in.left = kept_alive.back().const_data_ptr<int64_t>();
    in.weight_left = rows_of(weight_left, "weight_left");
    in.weight_right = rows_of(weight_right, "weight_right");
  }

  // One number of the accumulator's dtype per row.
  const void* rows_of(const at::Tensor& t, const char* argument) {
    kept_alive.push_back(checked(t, {pred.size(0)}, accumulator_of(pred), pred, argument));
    return kept_alive.back().const_data_ptr();
  }
  at::Tensor empty_rows() const { return empty_results(pred, {pred.size(0)}); }

  // The vector code takes rows in groups: all chunks but the last hold whole ones.
  int64_t chunk() const {
    constexpr int64_t kGroup = 16, kLargest = 8192;
    return std::clamp(rows_per_chunk(pred.size(1)) / kGroup * kGroup, kGroup, kLargest);
  }

  void forward(void* loss, void* distance) const {
    run(pred, pred.size(0), chunk(), GFL_CUDA_LAUNCH(dfl_forward, in, loss, distance),
        [&](int64_t begin, int64_t end) { cpu::dfl_forward(in, loss, distance, begin, end); });
  }
  void backward(const at::Tensor& grad_loss, const at::Tensor* grad_distance, const DflGradients& out) {
    const void* const of_loss = rows_of(grad_loss, "grad_loss");
    const void* const of_distance = grad_distance != nullptr ? rows_of(*grad_distance, "grad_distance") : nullptr;
    run(pred, pred.size(0), chunk(), GFL_CUDA_LAUNCH(dfl_backward, in, of_loss, of_distance, out),
        [&](int64_t begin, int64_t end) { cpu::dfl_backward(in, of_loss, of_distance, out, begin, end); });
  }
};

}  // namespace

at::Tensor dfl_forward(const at::Tensor& pred, const at::Tensor& target, bool ignore_out_of_range) {
  const Dfl dfl(pred, target, ignore_out_of_range);
  const at::Tensor loss = dfl.empty_rows();
  dfl.forward(loss.mutable_data_ptr(), nullptr);
  return loss;
}

std::tuple<at::Tensor, at::Tensor> dfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, bool ignore_out_of_range, Needs2 needs) {
  Dfl dfl(pred, target, ignore_out_of_range);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_target = wanted(needs[1], target);
  dfl.backward(grad_loss, nullptr, {pointer(grad_pred, needs[0]), pointer(grad_target, needs[1]), nullptr, nullptr});
  return {grad_pred, grad_target};
}

at::Tensor dfl_two_bin_forward(const at::Tensor& pred, const at::Tensor& left, const at::Tensor& weight_left,
                               const at::Tensor& weight_right) {
  const Dfl dfl(pred, left, weight_left, weight_right);
  const at::Tensor loss = dfl.empty_rows();
  dfl.forward(loss.mutable_data_ptr(), nullptr);
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dfl_two_bin_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                                    const at::Tensor& left,
                                                                    const at::Tensor& weight_left,
                                                                    const at::Tensor& weight_right, Needs3 needs) {
  Dfl dfl(pred, left, weight_left, weight_right);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_left = wanted(needs[1], weight_left),
                   grad_right = wanted(needs[2], weight_right);
  dfl.backward(grad_loss, nullptr,
               {pointer(grad_pred, needs[0]), nullptr, pointer(grad_left, needs[1]), pointer(grad_right, needs[2])});
  return {grad_pred, grad_left, grad_right};
}

std::tuple<at::Tensor, at::Tensor> dfl_integral_forward(const at::Tensor& pred, const at::Tensor& target,
                                                        bool ignore_out_of_range) {
  const Dfl dfl(pred, target, ignore_out_of_range);
  const at::Tensor loss = dfl.empty_rows(), distance = dfl.empty_rows();
  dfl.forward(loss.mutable_data_ptr(), distance.mutable_data_ptr());
  return {loss, distance};
}

std::tuple<at::Tensor, at::Tensor> dfl_integral_backward(const at::Tensor& grad_loss, const at::Tensor& grad_distance,
                                                         const at::Tensor& pred, const at::Tensor& target,
                                                         bool ignore_out_of_range, Needs2 needs) {
  Dfl dfl(pred, target, ignore_out_of_range);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_target = wanted(needs[1], target);
  dfl.backward(grad_loss, &grad_distance,
               {pointer(grad_pred, needs[0]), pointer(grad_target, needs[1]), nullptr, nullptr});
  return {grad_pred, grad_target};
}

// ---- distribution focal loss that keeps its softmax: fp32 on the CPU ----

namespace {

// A tensor that is read or written in place.
const at::Tensor& checked_in_place(const at::Tensor& t, const at::Tensor& pred, at::IntArrayRef shape,
                                   const char* argument) {
  check_shape(t, shape, argument);
  check_dtype(t, at::kFloat, argument);
  check_device(t, pred, argument);
  TORCH_CHECK_VALUE(t.is_contiguous(), "gfl: `", argument, "` must be contiguous");
  return t;
}

DflReduction reduction_of(Dfl& dfl, const OptionalTensor& weight, const OptionalTensor& norm, double factor) {
  DflReduction reduction{nullptr, nullptr, factor};
  if (weight.has_value()) reduction.weight = static_cast<const float*>(dfl.rows_of(*weight, "weight"));
  if (norm.has_value()) reduction.norm = checked_in_place(*norm, dfl.pred, {}, "norm").const_data_ptr<float>();
  return reduction;
}

}  // namespace

// Returns the losses, or with `reduced` their one number, the distances if wanted, and what dfl_finish needs.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dfl_keep(const at::Tensor& pred, const at::Tensor& target,
                                                                    bool ignore_out_of_range, bool with_distance,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& norm, double factor,
                                                                    bool reduced) {
  check_dtype(pred, at::kFloat, "pred");
  Dfl dfl(pred, target, ignore_out_of_range);
  const DflReduction reduction = reduction_of(dfl, weight, norm, factor);
  const int64_t rows = pred.size(0), step = dfl.chunk();
  const at::Tensor loss = reduced ? at::empty({}, pred.options()) : dfl.empty_rows(),
                   distance = at::empty({with_distance ? rows : 0}, pred.options()),
                   exponentials = at::empty(pred.sizes(), pred.options()), sums = at::empty({2, rows}, pred.options());
  const DflKept kept{exponentials.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>(), rows};
  float* const to_loss = loss.mutable_data_ptr<float>();
  float* const to_distance = with_distance ? distance.mutable_data_ptr<float>() : nullptr;
  if (!reduced) {
    for_chunks(rows, step, [&](int64_t begin, int64_t end) {
      cpu::dfl_forward_keeping(dfl.in, to_loss, to_distance, kept, begin, end);
    });
    return {loss, distance, exponentials, sums};
  }
  std::vector<double> of_chunk((rows + step - 1) / step);
  for_chunks(rows, step, [&](int64_t begin, int64_t end) {
    of_chunk[begin / step] = cpu::dfl_sum_keeping(dfl.in, reduction, to_distance, kept, begin, end);
  });
  *to_loss = cpu::dfl_reduce(reduction, of_chunk.data(), static_cast<int64_t>(of_chunk.size()));
  return {loss, distance, exponentials, sums};
}

// Turns what was kept into the gradient of `pred`. `grad_loss` is one number where the loss is.
void dfl_finish(at::Tensor kept, const at::Tensor& sums, const at::Tensor& grad_loss,
                const OptionalTensor& grad_distance, const at::Tensor& pred, const at::Tensor& target,
                bool ignore_out_of_range, const OptionalTensor& weight, const OptionalTensor& norm, double factor,
                bool reduced) {
  check_dtype(pred, at::kFloat, "pred");
  Dfl dfl(pred, target, ignore_out_of_range);
  const DflReduction reduction = reduction_of(dfl, weight, norm, factor);
  checked_in_place(kept, pred, pred.sizes(), "kept");
  checked_in_place(sums, pred, {2, pred.size(0)}, "sums");
  const void* const of_loss = reduced ? checked_in_place(grad_loss, pred, {}, "grad_loss").const_data_ptr()
                                      : dfl.rows_of(grad_loss, "grad_loss");
  const void* const of_distance = grad_distance.has_value() ? dfl.rows_of(*grad_distance, "grad_distance") : nullptr;
  // The sums are only read.
  const DflKept in_place{kept.mutable_data_ptr<float>(), const_cast<float*>(sums.const_data_ptr<float>()),
                         pred.size(0)};
  for_chunks(pred.size(0), dfl.chunk(), [&](int64_t begin, int64_t end) {
    cpu::dfl_finish(dfl.in, reduced ? &reduction : nullptr, static_cast<const float*>(of_loss),
                    static_cast<const float*>(of_distance), in_place, begin, end);
  });
}

// ---- distillation ----

namespace {

LdInput ld_input(const at::Tensor& pred, const at::Tensor& teacher, double temperature) {
  check_dim(pred, 2, "pred");
  TORCH_CHECK_VALUE(pred.size(1) >= 1, "gfl: `pred` must have at least 1 column, got ", pred.sizes());
  check_shape(teacher, pred.sizes(), "teacher");
  check_dtype(teacher, pred.scalar_type(), "teacher");
  check_device(teacher, pred, "teacher");
  TORCH_CHECK_VALUE(temperature > 0, "gfl: `temperature` must be > 0, got ", temperature);
  return {pred.const_data_ptr(), teacher.const_data_ptr(), dtype_of(pred, "pred"), pred.size(0),      pred.size(1),
          pred.stride(0),        pred.stride(1),           teacher.stride(0),      teacher.stride(1), temperature};
}

}  // namespace

at::Tensor ld_forward(const at::Tensor& pred, const at::Tensor& teacher, double temperature) {
  const LdInput in = ld_input(pred, teacher, temperature);
  const at::Tensor loss = empty_results(pred, {in.rows});
  void* const out = loss.mutable_data_ptr();
  run(pred, in.rows, rows_per_chunk(in.bins), GFL_CUDA_LAUNCH(ld_forward, in, out),
      [&](int64_t begin, int64_t end) { cpu::ld_forward(in, out, begin, end); });
  return loss;
}

at::Tensor ld_backward(const at::Tensor& grad_loss, const at::Tensor& pred, const at::Tensor& teacher,
                       double temperature, std::array<bool, 1> needs) {
  const LdInput in = ld_input(pred, teacher, temperature);
  const at::Tensor grads = checked(grad_loss, {in.rows}, accumulator_of(pred), pred, "grad_loss");
  const at::Tensor grad_pred = wanted(needs[0], pred);
  if (!needs[0]) return grad_pred;
  const void* const grad = grads.const_data_ptr();
  void* const out = grad_pred.mutable_data_ptr();
  run(pred, in.rows, rows_per_chunk(in.bins), GFL_CUDA_LAUNCH(ld_backward, in, grad, out),
      [&](int64_t begin, int64_t end) { cpu::ld_backward(in, grad, out, begin, end); });
  return grad_pred;
}

GFL_OPERATOR(integral_fwd, integral_forward)
GFL_OPERATOR(integral_bwd, integral_backward)
GFL_OPERATOR(decode_fwd, decode_forward)
GFL_OPERATOR(decode_bwd, decode_backward)
GFL_OPERATOR(dfl_fwd, dfl_forward)
GFL_OPERATOR(dfl_bwd, dfl_backward)
GFL_OPERATOR(dfl_integral_fwd, dfl_integral_forward)
GFL_OPERATOR(dfl_integral_bwd, dfl_integral_backward)
GFL_OPERATOR(dfl_two_bin_fwd, dfl_two_bin_forward)
GFL_OPERATOR(dfl_two_bin_bwd, dfl_two_bin_backward)
GFL_OPERATOR_CPU(dfl_keep, dfl_keep)
GFL_OPERATOR_CPU(dfl_finish, dfl_finish)
GFL_OPERATOR(ld_fwd, ld_forward)
GFL_OPERATOR(ld_bwd, ld_backward)

}  // namespace gfl::binding
