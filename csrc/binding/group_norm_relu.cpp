// SPDX-License-Identifier: Apache-2.0
#include "gfl/group_norm_relu.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "rows.h"

#include "operator.h"

namespace gfl::binding {
namespace {

using cpu::NormBlock;
using cpu::NormMoments;
using cpu::NormSums;

// How a level is walked: with its locations side by side, or its channels.
enum class Walk { none, planar, channels_last };

// `stride`: between locations, where there is one.
Walk walk_of(const at::Tensor& map, int64_t& stride) {
  if (!collapse(map, 2, 4, stride)) return Walk::none;
  if (stride == 1 && map.size(2) * map.size(3) > 1) return Walk::planar;
  return map.size(1) == 1 || map.stride(1) == 1 ? Walk::channels_last : Walk::none;
}

bool fits(const at::Tensor& map, Walk walk) {
  int64_t stride;
  if (!collapse(map, 2, 4, stride)) return false;
  if (walk == Walk::planar) return stride == 1 || map.size(2) * map.size(3) == 1;
  return map.size(1) == 1 || map.stride(1) == 1;
}

NormMap view_of(const at::Tensor& map, void* data) {
  int64_t stride;
  collapse(map, 2, 4, stride);
  return {data, map.stride(0), map.stride(1), stride};
}

// The launchers take one kind of map, and do not write to those that they read.
NormMap to_read(const at::Tensor& map) { return view_of(map, const_cast<void*>(map.const_data_ptr())); }

// `in` points into the other members and into the tensors of the call.
struct Prepared {
  std::vector<at::Tensor> maps;  // keeps alive what was copied
  std::vector<Walk> walks;
  std::vector<NormLevel> levels;
  at::Tensor weight, bias;
  GroupNormInput in;

  int64_t pairs() const { return in.level_count * in.images; }
};

void prepare(Prepared& p, at::TensorList inputs, const at::Tensor& weight, const at::Tensor& bias, int64_t num_groups,
             double eps, bool relu) {
  TORCH_CHECK_VALUE(!inputs.empty(), "gfl: `inputs` must hold at least one level");
  const at::Tensor& first = inputs[0];
  check_dim(first, 4, "inputs");
  const int64_t images = first.size(0), channels = first.size(1);
  TORCH_CHECK_VALUE(num_groups >= 1 && channels >= 1 && channels % num_groups == 0,
                    "gfl: `num_groups` must divide the ", channels, " channels, got ", num_groups);
  for (const at::Tensor& x : inputs) {
    check_dim(x, 4, "inputs");
    check_shape(x, {images, channels, x.size(2), x.size(3)}, "inputs");
    check_dtype(x, first.scalar_type(), "inputs");
    check_device(x, first, "inputs");
    int64_t stride;
    at::Tensor map = x;
    Walk walk = walk_of(map, stride);
    if (walk == Walk::none) {
      map = x.contiguous();
      walk = walk_of(map, stride);
    }
    p.levels.push_back({to_read(map), x.size(2) * x.size(3), walk == Walk::planar});
    p.walks.push_back(walk);
    p.maps.push_back(map);
  }
  for (const auto& [t, name] : {std::pair{&weight, "weight"}, std::pair{&bias, "bias"}}) {
    check_shape(*t, {channels}, name);
    check_device(*t, first, name);
    check_dtype(*t, weight.scalar_type(), name);
  }
  TORCH_CHECK_TYPE(weight.scalar_type() == first.scalar_type() || weight.scalar_type() == accumulator_of(first),
                   "gfl: `weight` must be ", first.scalar_type(), " as `inputs` are, or ", accumulator_of(first),
                   ", got ", weight.scalar_type());
  p.weight = weight.contiguous();
  p.bias = bias.contiguous();
  p.in = GroupNormInput{p.levels.data(),
                        static_cast<int64_t>(p.levels.size()),
                        dtype_of(first, "inputs"),
                        images,
                        channels,
                        num_groups,
                        p.weight.const_data_ptr(),
                        p.bias.const_data_ptr(),
                        dtype_of(weight, "weight"),
                        eps,
                        relu};
}

// Results in the layout of `inputs`, and the maps that kernels write: the same, but where a level is walked otherwise.
struct Results {
  std::vector<at::Tensor> given, written;
  std::vector<NormMap> maps;

  Results(const Prepared& p, at::TensorList inputs) {
    for (size_t l = 0; l < inputs.size(); ++l) {
      given.push_back(at::empty_like(inputs[l]));
      written.push_back(fits(given[l], p.walks[l]) ? given[l] : at::empty_like(p.maps[l]));
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

// Whether there is anything to put together between the two readings.
bool are_whole(const std::vector<NormBlock>& blocks) {
  return std::all_of(blocks.begin(), blocks.end(), [](const NormBlock& b) { return b.whole; });
}

void forward_on_cpu(const Prepared& p, const NormMap* y, void* statistics) {
  const std::vector<NormBlock> blocks = cpu::group_norm_relu_blocks(p.in);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const bool whole = are_whole(blocks);
  std::vector<NormMoments> moments(whole ? 0 : static_cast<size_t>(count * p.in.groups));
  for_chunks(count, 1, [&](int64_t begin, int64_t end) {
    cpu::group_norm_relu_moments(p.in, blocks.data(), moments.data(), y, statistics, begin, end);
  });
  if (whole) return;
  for_chunks(p.pairs(), 1, [&](int64_t begin, int64_t end) {
    cpu::group_norm_relu_statistics(p.in, blocks, moments.data(), statistics, begin, end);
  });
  for_chunks(count, 1, [&](int64_t begin, int64_t end) {
    cpu::group_norm_relu_normalise(p.in, blocks.data(), statistics, y, begin, end);
  });
}

void backward_on_cpu(const Prepared& p, const void* statistics, const NormMap* grad_y, const NormMap* grad_x,
                     void* grad_weight, void* grad_bias) {
  const std::vector<NormBlock> blocks = cpu::group_norm_relu_blocks(p.in);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const bool whole = are_whole(blocks);
  std::vector<NormSums> partial(whole ? 0 : static_cast<size_t>(count * p.in.channels));
  std::vector<NormSums> sums(static_cast<size_t>(p.pairs() * p.in.channels));
  for_chunks(count, 1, [&](int64_t begin, int64_t end) {
    cpu::group_norm_relu_sums(p.in, blocks.data(), statistics, grad_y, grad_x, partial.data(), sums.data(), begin, end);
  });
  if (!whole) {
    for_chunks(p.pairs(), 1, [&](int64_t begin, int64_t end) {
      cpu::group_norm_relu_gather(p.in, blocks, partial.data(), sums.data(), begin, end);
    });
  }
  if (!whole && grad_x != nullptr) {
    for_chunks(count, 1, [&](int64_t begin, int64_t end) {
      cpu::group_norm_relu_grad_x(p.in, blocks.data(), statistics, sums.data(), grad_y, grad_x, begin, end);
    });
  }
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  for_chunks(p.in.channels, rows_per_chunk(p.pairs()), [&](int64_t begin, int64_t end) {
    cpu::group_norm_relu_grad_parameters(p.in, sums.data(), grad_weight, grad_bias, begin, end);
  });
}

#if defined(GFL_WITH_CUDA)
at::Tensor workspace_for(const Prepared& p, const at::Tensor& like, bool backward) {
  TORCH_CHECK_NOT_IMPLEMENTED(cuda::group_norm_relu_fits(p.in), "gfl::group_norm_relu on CUDA takes up to ",
                              cuda::kGroupNormReluMaxLevels, " levels and ", cuda::kGroupNormReluMaxGroupChannels,
                              " channels a group, got ", p.in.level_count, " levels and ", p.in.group_channels(),
                              " channels a group");
  const int64_t bytes = static_cast<int64_t>(cuda::group_norm_relu_workspace_bytes(p.in, backward));
  return at::empty({bytes}, like.options().dtype(at::kByte));
}
#endif

void run_forward(const Prepared& p, const at::Tensor& like, const NormMap* y, void* statistics) {
#if defined(GFL_WITH_CUDA)
  if (like.is_cuda()) {
    const at::Tensor workspace = workspace_for(p, like, false);
    return on_stream_of(like, [&](cudaStream_t stream) {
      return cuda::group_norm_relu_forward(p.in, workspace.mutable_data_ptr(), y, statistics, stream);
    });
  }
#endif
  forward_on_cpu(p, y, statistics);
}

// Any of the results may be null.
void run_backward(const Prepared& p, const at::Tensor& like, const void* statistics, const NormMap* grad_y,
                  const NormMap* grad_x, void* grad_weight, void* grad_bias) {
#if defined(GFL_WITH_CUDA)
  if (like.is_cuda()) {
    const at::Tensor workspace = workspace_for(p, like, true);
    return on_stream_of(like, [&](cudaStream_t stream) {
      return cuda::group_norm_relu_backward(p.in, statistics, workspace.mutable_data_ptr(), grad_y, grad_x, grad_weight,
                                            grad_bias, stream);
    });
  }
#endif
  backward_on_cpu(p, statistics, grad_y, grad_x, grad_weight, grad_bias);
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor> group_norm_relu_forward(at::TensorList inputs, const at::Tensor& weight,
                                                                        const at::Tensor& bias, int64_t num_groups,
                                                                        double eps, bool relu) {
  Prepared p;
  prepare(p, inputs, weight, bias, num_groups, eps, relu);
  Results y(p, inputs);
  const at::Tensor statistics = at::empty({p.in.level_count, p.in.images, num_groups, 2},
                                          inputs[0].options().dtype(accumulator_of(inputs[0])));
  run_forward(p, inputs[0], y.maps.data(), statistics.mutable_data_ptr());
  return {y.finish(), statistics};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> group_norm_relu_backward(
    at::TensorList grad_outputs, const at::Tensor& statistics, at::TensorList inputs, const at::Tensor& weight,
    const at::Tensor& bias, int64_t num_groups, double eps, bool relu, Needs3 needs) {
  Prepared p;
  prepare(p, inputs, weight, bias, num_groups, eps, relu);
  TORCH_CHECK_VALUE(grad_outputs.size() == inputs.size(), "gfl: `grad_outputs` must hold a tensor for each of ",
                    inputs.size(), " levels, got ", grad_outputs.size());
  check_shape(statistics, {p.in.level_count, p.in.images, num_groups, 2}, "statistics");
  check_dtype(statistics, accumulator_of(inputs[0]), "statistics");
  check_device(statistics, inputs[0], "statistics");
  const at::Tensor saved = statistics.contiguous();
  std::vector<NormMap> grad_y;
  std::vector<at::Tensor> kept;
  for (size_t l = 0; l < inputs.size(); ++l) {
    const at::Tensor& grad = grad_outputs[l];
    check_shape(grad, inputs[l].sizes(), "grad_outputs");
    check_dtype(grad, inputs[l].scalar_type(), "grad_outputs");
    check_device(grad, inputs[l], "grad_outputs");
    kept.push_back(fits(grad, p.walks[l]) ? grad : at::empty_like(p.maps[l]).copy_(grad));
    grad_y.push_back(to_read(kept.back()));
  }
  const at::Tensor grad_weight = wanted(needs[1], p.weight), grad_bias = wanted(needs[2], p.bias);
  std::optional<Results> grad_x;
  if (needs[0]) grad_x.emplace(p, inputs);
  run_backward(p, inputs[0], saved.const_data_ptr(), grad_y.data(), needs[0] ? grad_x->maps.data() : nullptr,
               pointer(grad_weight, needs[1]), pointer(grad_bias, needs[2]));
  std::vector<at::Tensor> grad_inputs(inputs.size());
  if (needs[0]) grad_inputs = grad_x->finish();
  else for (at::Tensor& grad : grad_inputs) grad = at::empty({0}, inputs[0].options());
  return {std::move(grad_inputs), grad_weight, grad_bias};
}

GFL_OPERATOR(group_norm_relu_fwd, group_norm_relu_forward)
GFL_OPERATOR(group_norm_relu_bwd, group_norm_relu_backward)

}  // namespace gfl::binding
