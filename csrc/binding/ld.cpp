// SPDX-License-Identifier: Apache-2.0
#include "gfl/ld.h"

#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

LdInput prepare(const at::Tensor& pred, const at::Tensor& teacher, double temperature) {
  check_dim(pred, 2, "pred");
  TORCH_CHECK_VALUE(pred.size(1) >= 1, "gfl: `pred` must have at least 1 column, got ", pred.sizes());
  check_shape(teacher, pred.sizes(), "teacher");
  check_dtype(teacher, pred.scalar_type(), "teacher");
  check_device(teacher, pred, "teacher");
  TORCH_CHECK_VALUE(temperature > 0, "gfl: `temperature` must be > 0, got ", temperature);
  return {pred.const_data_ptr(), teacher.const_data_ptr(), dtype_of(pred, "pred"), pred.size(0), pred.size(1),
          pred.stride(0), pred.stride(1), teacher.stride(0), teacher.stride(1), temperature};
}

}  // namespace

at::Tensor ld_forward(const at::Tensor& pred, const at::Tensor& teacher, double temperature) {
  const LdInput in = prepare(pred, teacher, temperature);
  const at::Tensor result = at::empty({in.rows}, pred.options().dtype(accumulator_of(pred)));
  void* loss = result.mutable_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::ld_forward(in, loss, stream); });
    return result;
  }
#endif
  for_chunks(in.rows, rows_per_chunk(in.bins),
             [&](int64_t begin, int64_t end) { cpu::ld_forward(in, loss, begin, end); });
  return result;
}

at::Tensor ld_backward(const at::Tensor& grad_loss, const at::Tensor& pred, const at::Tensor& teacher,
                       double temperature, std::array<bool, 1> needs) {
  const LdInput in = prepare(pred, teacher, temperature);
  check_shape(grad_loss, {in.rows}, "grad_loss");
  check_dtype(grad_loss, accumulator_of(pred), "grad_loss");
  check_device(grad_loss, pred, "grad_loss");
  const at::Tensor result = wanted(needs[0], pred);
  if (!needs[0]) return result;
  const at::Tensor arriving = grad_loss.contiguous();
  const void* grad = arriving.const_data_ptr();
  void* grad_pred = result.mutable_data_ptr();
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::ld_backward(in, grad, grad_pred, stream); });
    return result;
  }
#endif
  for_chunks(in.rows, rows_per_chunk(in.bins),
             [&](int64_t begin, int64_t end) { cpu::ld_backward(in, grad, grad_pred, begin, end); });
  return result;
}

GFL_OPERATOR(ld_fwd, ld_forward)
GFL_OPERATOR(ld_bwd, ld_backward)

}  // namespace gfl::binding
