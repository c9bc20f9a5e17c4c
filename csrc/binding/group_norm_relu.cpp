// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty_like.h>

#include "gfl/head.h"
#include "rows.h"
#include "steps.h"

namespace gfl::binding {
namespace {

// How a level is read and written: locations are contiguous, or channels are.
enum class Layout { none, planar, channels_last };

bool fits(const at::Tensor& map, Layout layout) {
  int64_t stride;
  if (!collapse(map, 2, 4, stride)) return false;
  if (layout == Layout::planar) return stride == 1 || map.size(2) * map.size(3) == 1;
  return map.size(1) == 1 || map.stride(1) == 1;
}

Layout layout_of(const at::Tensor& map) {
  if (map.size(2) * map.size(3) > 1 && fits(map, Layout::planar)) return Layout::planar;
  return fits(map, Layout::channels_last) ? Layout::channels_last : Layout::none;
}

// A dense map of the shape of `like`. Not empty_like, whose strides follow those of an expanded map.
at::Tensor empty_map(const at::Tensor& like, Layout layout) {
  return at::empty(like.sizes(), like.options(),
                   layout == Layout::planar ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

NormMap view_of(const at::Tensor& map, void* data) {
  int64_t stride;
  collapse(map, 2, 4, stride);
  return {data, map.stride(0), map.stride(1), stride};
}

// The launchers take one kind of map and write to results only.
NormMap to_read(const at::Tensor& map) { return view_of(map, const_cast<void*>(map.const_data_ptr())); }

// Checked arguments. `in` points into the other members and into the tensors of the call.
struct Arguments {
  const at::Tensor& first;
  std::vector<at::Tensor> maps;  // keeps copies alive
  std::vector<Layout> layouts;
  std::vector<NormLevel> levels;
  at::Tensor weight, bias;
  GroupNormInput in;

  Arguments(at::TensorList inputs, const at::Tensor& given_weight, const at::Tensor& given_bias, int64_t num_groups,
            double eps, bool relu)
      : first(check_first(inputs)) {
    const int64_t images = first.size(0), channels = first.size(1);
    TORCH_CHECK_VALUE(num_groups >= 1 && channels >= 1 && channels % num_groups == 0,
                      "gfl: `num_groups` must divide the ", channels, " channels, got ", num_groups);
    for (const at::Tensor& x : inputs) {
      check_dim(x, 4, "inputs");
      check_shape(x, {images, channels, x.size(2), x.size(3)}, "inputs");
      check_dtype(x, first.scalar_type(), "inputs");
      check_device(x, first, "inputs");
      at::Tensor map = x;
      if (layout_of(map) == Layout::none) map = x.contiguous();
      layouts.push_back(layout_of(map));
      levels.push_back({to_read(map), x.size(2) * x.size(3), layouts.back() == Layout::planar});
      maps.push_back(map);
    }
    for (const auto& [t, name] : {std::pair{&given_weight, "weight"}, std::pair{&given_bias, "bias"}}) {
      check_shape(*t, {channels}, name);
      check_device(*t, first, name);
      check_dtype(*t, given_weight.scalar_type(), name);
    }
    const at::ScalarType dtype = given_weight.scalar_type();
    TORCH_CHECK_TYPE(dtype == first.scalar_type() || dtype == accumulator_of(first), "gfl: `weight` must be ",
                     first.scalar_type(), " as `inputs` are, or ", accumulator_of(first), ", got ", dtype);
    weight = given_weight.contiguous();
    bias = given_bias.contiguous();
    in.levels = levels.data();
    in.level_count = static_cast<int64_t>(levels.size());
    in.dtype = dtype_of(first, "inputs");
    in.images = images;
    in.channels = channels;
    in.groups = num_groups;
    in.weight = weight.const_data_ptr();
    in.bias = bias.const_data_ptr();
    in.parameter_dtype = dtype_of(weight, "weight");
    in.eps = eps;
    in.relu = relu;
#if defined(GFL_WITH_CUDA)
    TORCH_CHECK_NOT_IMPLEMENTED(!first.is_cuda() || cuda::group_norm_relu_fits(in),
                                "gfl::group_norm_relu on CUDA takes up to ", cuda::kGroupNormReluMaxLevels,
                                " levels and ", cuda::kGroupNormReluMaxGroupChannels, " channels per group, got ",
                                in.level_count, " levels and ", in.group_channels(), " channels per group");
#endif
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

 private:
  static const at::Tensor& check_first(at::TensorList inputs) {
    TORCH_CHECK_VALUE(!inputs.empty(), "gfl: `inputs` must hold at least one level");
    check_dim(inputs[0], 4, "inputs");
    return inputs[0];
  }
};

// Results in the layouts of `inputs`, and the maps that kernels write: the same, unless a level is walked otherwise.
struct Results {
  std::vector<at::Tensor> given, written;
  std::vector<NormMap> maps;

  Results(const Arguments& a, at::TensorList inputs) {
    for (size_t l = 0; l < inputs.size(); ++l) {
      given.push_back(at::empty_like(inputs[l]));
      written.push_back(fits(given[l], a.layouts[l]) ? given[l] : empty_map(given[l], a.layouts[l]));
      maps.push_back(view_of(written[l], written[l].mutable_data_ptr()));
    }
  }
  std::vector<at::Tensor> finish() {
    for (size_t l = 0; l < given.size(); ++l) {
      if (!given[l].is_same(written[l])) given[l].copy_(written[l]);
    }
    return std::move(given);
  }
};

#if defined(GFL_WITH_CUDA)
at::Tensor workspace_for(const Arguments& a, bool backward) {
  const auto bytes = static_cast<int64_t>(cuda::group_norm_relu_workspace_bytes(a.in, backward));
  return at::empty({bytes}, a.first.options().dtype(at::kByte));
}
#endif

std::tuple<std::vector<at::Tensor>, at::Tensor> group_norm_relu_forward(at::TensorList inputs, const at::Tensor& weight,
                                                                        const at::Tensor& bias, int64_t num_groups,
                                                                        double eps, bool relu) {
  const Arguments a(inputs, weight, bias, num_groups, eps, relu);
  Results y(a, inputs);
  const at::Tensor statistics =
      at::empty({a.in.level_count, a.in.images, num_groups, 2}, a.first.options().dtype(accumulator_of(a.first)));
  void* const saved = statistics.mutable_data_ptr();
  run(a.first,
      GFL_CUDA_LAUNCH(group_norm_relu_forward, a.in, workspace_for(a, false).mutable_data_ptr(), y.maps.data(), saved),
      [&](const ParallelFor& parallel) { cpu::group_norm_relu_forward(a.in, y.maps.data(), saved, parallel); });
  return {y.finish(), statistics};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> group_norm_relu_backward(
    at::TensorList grad_outputs, const at::Tensor& statistics, at::TensorList inputs, const at::Tensor& weight,
    const at::Tensor& bias, int64_t num_groups, double eps, bool relu, Needs3 needs) {
  const Arguments a(inputs, weight, bias, num_groups, eps, relu);
  TORCH_CHECK_VALUE(grad_outputs.size() == inputs.size(), "gfl: `grad_outputs` must hold a tensor for each of ",
                    inputs.size(), " levels, got ", grad_outputs.size());
  check_shape(statistics, {a.in.level_count, a.in.images, num_groups, 2}, "statistics");
  check_dtype(statistics, accumulator_of(a.first), "statistics");
  check_device(statistics, a.first, "statistics");
  const at::Tensor dense_statistics = statistics.contiguous();
  const void* const saved = dense_statistics.const_data_ptr();
  std::vector<NormMap> grad_y;
  std::vector<at::Tensor> kept;
  for (size_t l = 0; l < inputs.size(); ++l) {
    const at::Tensor& grad = grad_outputs[l];
    check_shape(grad, inputs[l].sizes(), "grad_outputs");
    check_dtype(grad, inputs[l].scalar_type(), "grad_outputs");
    check_device(grad, inputs[l], "grad_outputs");
    kept.push_back(fits(grad, a.layouts[l]) ? grad : empty_map(grad, a.layouts[l]).copy_(grad));
    grad_y.push_back(to_read(kept.back()));
  }
  const at::Tensor grad_weight = wanted(needs[1], a.weight), grad_bias = wanted(needs[2], a.bias);
  void *const of_weight = pointer(grad_weight, needs[1]), *const of_bias = pointer(grad_bias, needs[2]);
  std::optional<Results> grad_x;
  if (needs[0]) grad_x.emplace(a, inputs);
  const NormMap* const of_x = needs[0] ? grad_x->maps.data() : nullptr;
  run(a.first,
      GFL_CUDA_LAUNCH(group_norm_relu_backward, a.in, saved, workspace_for(a, true).mutable_data_ptr(), grad_y.data(),
                      of_x, of_weight, of_bias),
      [&](const ParallelFor& parallel) {
        cpu::group_norm_relu_backward(a.in, saved, grad_y.data(), of_x, of_weight, of_bias, parallel);
      });
  std::vector<at::Tensor> grad_inputs;
  if (needs[0]) grad_inputs = grad_x->finish();
  else
    for (size_t l = 0; l < inputs.size(); ++l) grad_inputs.push_back(at::empty({0}, a.first.options()));
  return {std::move(grad_inputs), grad_weight, grad_bias};
}

GFL_OPERATOR(group_norm_relu_fwd, group_norm_relu_forward)
GFL_OPERATOR(group_norm_relu_bwd, group_norm_relu_backward)

}  // namespace
}  // namespace gfl::binding
