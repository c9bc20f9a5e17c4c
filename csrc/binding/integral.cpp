// SPDX-License-Identifier: Apache-2.0
#include "gfl/integral.h"

#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

std::vector<int64_t> distances_shape(const at::Tensor& pred) {
  std::vector<int64_t> shape = pred.sizes().vec();
  shape.back() = 4;
  return shape;
}

}  // namespace

at::Tensor integral_forward(const at::Tensor& pred, int64_t reg_max) {
  check_four_sides(pred, reg_max);
  at::Tensor read = pred;
  const Locations locations = locations_of({{&read, 1}});
  const BinRows rows = bin_rows(read, 4, reg_max + 1, locations);
  const at::Tensor distance = at::empty(distances_shape(pred), pred.options().dtype(accumulator_of(pred)));
  void* out = distance.mutable_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::integral_forward(rows, out, stream); });
    return distance;
  }
#endif
  for_chunks(rows.rows(), rows_per_chunk(rows.bins),
             [&](int64_t begin, int64_t end) { cpu::integral_forward(rows, out, begin, end); });
  return distance;
}

at::Tensor integral_backward(const at::Tensor& grad_distance, const at::Tensor& pred, int64_t reg_max,
                             std::array<bool, 1> needs) {
  check_four_sides(pred, reg_max);
  check_shape(grad_distance, distances_shape(pred), "grad_distance");
  check_dtype(grad_distance, accumulator_of(pred), "grad_distance");
  check_device(grad_distance, pred, "grad_distance");
  const at::Tensor grad_pred = wanted(needs[0], pred);
  if (!needs[0]) return grad_pred;
  at::Tensor read = pred;
  const Locations locations = locations_of({{&read, 1}});
  const BinRows rows = bin_rows(read, 4, reg_max + 1, locations);
  const at::Tensor grad = grad_distance.contiguous();
  void* out = grad_pred.mutable_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) {
      return cuda::integral_backward(rows, grad.const_data_ptr(), out, stream);
    });
    return grad_pred;
  }
#endif
  for_chunks(rows.rows(), rows_per_chunk(rows.bins), [&](int64_t begin, int64_t end) {
    cpu::integral_backward(rows, grad.const_data_ptr(), out, begin, end);
  });
  return grad_pred;
}

GFL_OPERATOR(integral_fwd, integral_forward)
GFL_OPERATOR(integral_bwd, integral_backward)

}  // namespace gfl::binding
