// SPDX-License-Identifier: Apache-2.0
#include "gfl/dfl.h"

#include <algorithm>
#include <vector>

#include "gfl/score.h"
#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

struct Prepared {
  std::vector<at::Tensor> kept;  // contiguous, kept alive while `in` points into them
  DflInput in;

  const void* keep(const at::Tensor& t, const at::Tensor& pred, at::ScalarType dtype, const char* argument) {
    check_dtype(t, dtype, argument);
    check_device(t, pred, argument);
    check_shape(t, {pred.size(0)}, argument);
    kept.push_back(t.contiguous());
    return kept.back().const_data_ptr();
  }
};

Prepared prepare_rows(const at::Tensor& pred) {
  check_dim(pred, 2, "pred");
  check_bins(pred.size(1));
  Prepared p{};
  p.in.pred = BinRows{pred.const_data_ptr(), dtype_of(pred, "pred"), 1, pred.size(0), 1, pred.size(1),
                      {0, pred.stride(0)}, 0, pred.stride(1)};
  return p;
}

Prepared prepare(const at::Tensor& pred, const at::Tensor& target, bool ignore_out_of_range) {
  Prepared p = prepare_rows(pred);
  p.in.target = p.keep(target, pred, accumulator_of(pred), "target");
  p.in.ignore_out_of_range = ignore_out_of_range;
  return p;
}

Prepared prepare_two_bin(const at::Tensor& pred, const at::Tensor& left, const at::Tensor& weight_left,
                         const at::Tensor& weight_right) {
  Prepared p = prepare_rows(pred);
  p.in.left = static_cast<const int64_t*>(p.keep(left, pred, at::kLong, "left"));
  p.in.weight_left = p.keep(weight_left, pred, accumulator_of(pred), "weight_left");
  p.in.weight_right = p.keep(weight_right, pred, accumulator_of(pred), "weight_right");
  return p;
}

at::Tensor empty_rows(const at::Tensor& pred) {
  return at::empty({pred.size(0)}, pred.options().dtype(accumulator_of(pred)));
}

// Whole groups of rows a chunk, for all but the last.
constexpr int64_t kGroup = 16, kMostRows = 8192;
int64_t chunk_of_rows(const at::Tensor& pred) {
  return std::clamp(rows_per_chunk(pred.size(1)) / kGroup * kGroup, kGroup, kMostRows);
}
template <class Body> void for_row_chunks(const at::Tensor& pred, const Body& body) {
  for_chunks(pred.size(0), chunk_of_rows(pred), body);
}

void run_forward(const at::Tensor& pred, const DflInput& in, void* loss, void* distance) {
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred, [&](cudaStream_t stream) { return cuda::dfl_forward(in, loss, distance, stream); });
    return;
  }
#endif
  for_row_chunks(pred, [&](int64_t begin, int64_t end) { cpu::dfl_forward(in, loss, distance, begin, end); });
}

void run_backward(const at::Tensor& pred, Prepared& p, const at::Tensor& grad_loss, const at::Tensor* grad_distance,
                  const DflGradients& out) {
  const void* of_loss = p.keep(grad_loss, pred, accumulator_of(pred), "grad_loss");
  const void* of_distance =
      grad_distance != nullptr ? p.keep(*grad_distance, pred, accumulator_of(pred), "grad_distance") : nullptr;
#if defined(GFL_WITH_CUDA)
  if (pred.is_cuda()) {
    on_stream_of(pred,
                 [&](cudaStream_t stream) { return cuda::dfl_backward(p.in, of_loss, of_distance, out, stream); });
    return;
  }
#endif
  for_row_chunks(pred, [&](int64_t begin, int64_t end) {
    cpu::dfl_backward(p.in, of_loss, of_distance, out, begin, end);
  });
}

}  // namespace

at::Tensor dfl_forward(const at::Tensor& pred, const at::Tensor& target, bool ignore_out_of_range) {
  const Prepared p = prepare(pred, target, ignore_out_of_range);
  const at::Tensor loss = empty_rows(pred);
  run_forward(pred, p.in, loss.mutable_data_ptr(), nullptr);
  return loss;
}

std::tuple<at::Tensor, at::Tensor> dfl_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                const at::Tensor& target, bool ignore_out_of_range, Needs2 needs) {
  Prepared p = prepare(pred, target, ignore_out_of_range);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_target = wanted(needs[1], target);
  run_backward(pred, p, grad_loss, nullptr,
               {pointer(grad_pred, needs[0]), pointer(grad_target, needs[1]), nullptr, nullptr});
  return {grad_pred, grad_target};
}

at::Tensor dfl_two_bin_forward(const at::Tensor& pred, const at::Tensor& left, const at::Tensor& weight_left,
                               const at::Tensor& weight_right) {
  const Prepared p = prepare_two_bin(pred, left, weight_left, weight_right);
  const at::Tensor loss = empty_rows(pred);
  run_forward(pred, p.in, loss.mutable_data_ptr(), nullptr);
  return loss;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dfl_two_bin_backward(const at::Tensor& grad_loss, const at::Tensor& pred,
                                                                    const at::Tensor& left,
                                                                    const at::Tensor& weight_left,
                                                                    const at::Tensor& weight_right, Needs3 needs) {
  Prepared p = prepare_two_bin(pred, left, weight_left, weight_right);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_left = wanted(needs[1], weight_left),
                   grad_right = wanted(needs[2], weight_right);
  run_backward(pred, p, grad_loss, nullptr,
               {pointer(grad_pred, needs[0]), nullptr, pointer(grad_left, needs[1]), pointer(grad_right, needs[2])});
  return {grad_pred, grad_left, grad_right};
}

std::tuple<at::Tensor, at::Tensor> dfl_integral_forward(const at::Tensor& pred, const at::Tensor& target,
                                                        bool ignore_out_of_range) {
  const Prepared p = prepare(pred, target, ignore_out_of_range);
  const at::Tensor loss = empty_rows(pred), distance = empty_rows(pred);
  run_forward(pred, p.in, loss.mutable_data_ptr(), distance.mutable_data_ptr());
  return {loss, distance};
}

std::tuple<at::Tensor, at::Tensor> dfl_integral_backward(const at::Tensor& grad_loss, const at::Tensor& grad_distance,
                                                         const at::Tensor& pred, const at::Tensor& target,
                                                         bool ignore_out_of_range, Needs2 needs) {
  Prepared p = prepare(pred, target, ignore_out_of_range);
  const at::Tensor grad_pred = wanted(needs[0], pred), grad_target = wanted(needs[1], target);
  run_backward(pred, p, grad_loss, &grad_distance,
               {pointer(grad_pred, needs[0]), pointer(grad_target, needs[1]), nullptr, nullptr});
  return {grad_pred, grad_target};
}

namespace {

void check_kept(const at::Tensor& t, const at::Tensor& pred, at::IntArrayRef shape, const char* argument) {
  check_shape(t, shape, argument);
  check_dtype(t, at::kFloat, argument);
  check_device(t, pred, argument);
  TORCH_CHECK_VALUE(t.is_contiguous(), "gfl: `", argument, "` must be contiguous");
}

// How the losses of rows become one number: factor · Σ weight · loss, over norm + epsilon where there is a norm.
struct Reduction {
  const float* weight = nullptr;  // [rows], or null
  float scale = 1.0f;

  float of_row(int64_t row) const { return weight != nullptr ? weight[row] : 1.0f; }
};

Reduction reduction_of(Prepared& p, const at::Tensor& pred, const OptionalTensor& weight, const OptionalTensor& norm,
                       double factor) {
  Reduction by;
  if (weight.has_value()) by.weight = static_cast<const float*>(p.keep(*weight, pred, at::kFloat, "weight"));
  if (norm.has_value()) {
    check_kept(*norm, pred, {}, "norm");
    factor /= *norm->const_data_ptr<float>() + static_cast<float>(kScoreNormEps);
  }
  by.scale = static_cast<float>(factor);
  return by;
}

}  // namespace

// Exponentials and sums of fp32 logits on the CPU go with loss and distance, for dfl_finish.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> dfl_keep(const at::Tensor& pred, const at::Tensor& target,
                                                                    bool ignore_out_of_range, bool with_distance,
                                                                    const OptionalTensor& weight,
                                                                    const OptionalTensor& norm, double factor,
                                                                    bool reduced) {
  check_dtype(pred, at::kFloat, "pred");
  Prepared p = prepare(pred, target, ignore_out_of_range);
  const Reduction by = reduction_of(p, pred, weight, norm, factor);
  const int64_t rows = pred.size(0), step = chunk_of_rows(pred);
  const at::Tensor losses = reduced ? at::Tensor() : empty_rows(pred),
                   distance = at::empty({with_distance ? rows : 0}, pred.options()),
                   kept = at::empty(pred.sizes(), pred.options()), sums = at::empty({2, rows}, pred.options());
  const DflKept keep{kept.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>(), rows};
  float* const to_losses = reduced ? nullptr : losses.mutable_data_ptr<float>();
  float* const to_distance = with_distance ? distance.mutable_data_ptr<float>() : nullptr;
  std::vector<double> totals(reduced ? (rows + step - 1) / step : 0);
  for_chunks(rows, step, [&](int64_t begin, int64_t end) {
    if (!reduced) return cpu::dfl_forward_keeping(p.in, to_losses, to_distance, keep, begin, end);
    float of_chunk[kMostRows];
    // The kernel counts rows from the tensor's first.
    cpu::dfl_forward_keeping(p.in, of_chunk - begin, to_distance, keep, begin, end);
    double total = 0;
    for (int64_t row = begin; row < end; ++row) total += of_chunk[row - begin] * by.of_row(row);
    totals[begin / step] = total;
  });
  if (!reduced) return {losses, distance, kept, sums};
  double total = 0;
  for (const double of_chunk : totals) total += of_chunk;
  const at::Tensor loss = at::empty({}, pred.options());
  *loss.mutable_data_ptr<float>() = static_cast<float>(by.scale * total);
  return {loss, distance, kept, sums};
}

// Turns what was kept into the gradient of `pred`. `grad_loss` is one number where the loss is.
void dfl_finish(at::Tensor kept, const at::Tensor& sums, const at::Tensor& grad_loss,
                const OptionalTensor& grad_distance, const at::Tensor& pred, const at::Tensor& target,
                bool ignore_out_of_range, const OptionalTensor& weight, const OptionalTensor& norm, double factor,
                bool reduced) {
  check_dtype(pred, at::kFloat, "pred");
  Prepared p = prepare(pred, target, ignore_out_of_range);
  const Reduction by = reduction_of(p, pred, weight, norm, factor);
  check_kept(kept, pred, pred.sizes(), "kept");
  check_kept(sums, pred, {2, pred.size(0)}, "sums");
  if (reduced) check_kept(grad_loss, pred, {}, "grad_loss");
  const float* of_losses = reduced ? nullptr
                                   : static_cast<const float*>(p.keep(grad_loss, pred, at::kFloat, "grad_loss"));
  const float* of_distance = nullptr;
  if (grad_distance.has_value()) {
    of_distance = static_cast<const float*>(p.keep(*grad_distance, pred, at::kFloat, "grad_distance"));
  }
  const float arriving = reduced ? *grad_loss.const_data_ptr<float>() * by.scale : 0.0f;
  // Settling reads the sums alone.
  const DflKept keep{kept.mutable_data_ptr<float>(), const_cast<float*>(sums.const_data_ptr<float>()), pred.size(0)};
  for_chunks(pred.size(0), chunk_of_rows(pred), [&](int64_t begin, int64_t end) {
    if (!reduced) return cpu::dfl_finish(p.in, of_losses, of_distance, keep, begin, end);
    float of_chunk[kMostRows];
    for (int64_t row = begin; row < end; ++row) of_chunk[row - begin] = arriving * by.of_row(row);
    cpu::dfl_finish(p.in, of_chunk - begin, of_distance, keep, begin, end);
  });
}

GFL_OPERATOR_CPU(dfl_keep, dfl_keep)
GFL_OPERATOR_CPU(dfl_finish, dfl_finish)
GFL_OPERATOR(dfl_fwd, dfl_forward)
GFL_OPERATOR(dfl_bwd, dfl_backward)
GFL_OPERATOR(dfl_integral_fwd, dfl_integral_forward)
GFL_OPERATOR(dfl_integral_bwd, dfl_integral_backward)
GFL_OPERATOR(dfl_two_bin_fwd, dfl_two_bin_forward)
GFL_OPERATOR(dfl_two_bin_bwd, dfl_two_bin_backward)

}  // namespace gfl::binding
