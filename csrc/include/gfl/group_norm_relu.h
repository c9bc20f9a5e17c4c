// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU over all levels of a pyramid                                       (arXiv 1803.08494, eq. 1)
//
//   y = max(0, γ[c]·(x − μ)·r + β[c]),   r = 1/√(σ² + eps),   μ and σ² of a group of channels of one level and image
// Backward, with g = grad_y where y > 0 and else 0, x̂ = (x − μ)·r, means over the group:
//   grad_x = r·(γ[c]·g − mean(γ·g) − x̂·mean(γ·g·x̂)),   grad_γ[c] = Σ g·x̂,   grad_β[c] = Σ g
#pragma once
#include <vector>

#include "gfl/types.h"

namespace gfl {

// A level's map [images, channels, locations] in memory; strides in elements. In all maps of a level locations lie side
// by side (stride_location 1: `planar`), or in all of them channels do (stride_channel 1).
struct NormMap {
  void* data;  // the launchers do not write where they read
  int64_t stride_image, stride_channel, stride_location;
};

struct NormLevel {
  NormMap x;
  int64_t locations;
  bool planar;
};

// `A` below is double where the maps are f64, else float.
struct GroupNormInput {
  const NormLevel* levels;
  int64_t level_count;
  DType dtype;                // of every map
  int64_t images, channels, groups;
  const void* weight;         // [channels] γ
  const void* bias;           // [channels] β
  DType parameter_dtype;      // f64 only where the maps are
  double eps;
  bool relu;

  constexpr int64_t group_channels() const { return channels / groups; }  // constexpr: device code may call it
};

// `statistics` is [levels, images, groups, 2] of A: μ and r.

namespace cpu {

// A piece of the work: groups [begin, end) of a level's image, or its locations [begin, end) with all their channels.
struct NormBlock {
  int64_t level, image, begin, end;
  bool whole;  // of groups
};

// Of a block's share of a group, or of all of it.
struct NormMoments { double count, mean, squares; };  // squares: Σ (x − mean)²

// Of a channel: Σ g and Σ g·x̂.
struct NormSums { double grad, grad_xhat; };

// Pieces whose bounds depend on the shapes alone; sums in their order are the same at any number of threads.
std::vector<NormBlock> group_norm_relu_blocks(const GroupNormInput& in);

// Forward in three steps, each to be finished before the next. Blocks [begin, end): those of whole groups are done with
// here, the moments of the others go to moments[block · groups + group].
void group_norm_relu_moments(const GroupNormInput& in, const NormBlock* blocks, NormMoments* moments,
                             const NormMap* y, void* statistics, int64_t begin, int64_t end);
// (level, image) pairs [begin, end), levels outermost.
void group_norm_relu_statistics(const GroupNormInput& in, const std::vector<NormBlock>& blocks,
                                const NormMoments* moments, void* statistics, int64_t begin, int64_t end);
// Blocks [begin, end).
void group_norm_relu_normalise(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                               const NormMap* y, int64_t begin, int64_t end);

// Backward in the same steps. A null `grad_x` is not wanted. Blocks' sums go to partial[block · channels + channel], those
// of blocks of whole groups to their place in `sums`, [levels, images, channels].
void group_norm_relu_sums(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                          const NormMap* grad_y, const NormMap* grad_x, NormSums* partial, NormSums* sums,
                          int64_t begin, int64_t end);
void group_norm_relu_gather(const GroupNormInput& in, const std::vector<NormBlock>& blocks, const NormSums* partial,
                            NormSums* sums, int64_t begin, int64_t end);
void group_norm_relu_grad_x(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                            const NormSums* sums, const NormMap* grad_y, const NormMap* grad_x, int64_t begin,
                            int64_t end);
// Channels [begin, end), after the second step; either result may be null. Of the parameters' dtype.
void group_norm_relu_grad_parameters(const GroupNormInput& in, const NormSums* sums, void* grad_weight,
                                     void* grad_bias, int64_t begin, int64_t end);

}  // namespace cpu

#if defined(GFL_WITH_CUDA)
namespace cuda {
constexpr int kGroupNormReluMaxLevels = 16;
constexpr int64_t kGroupNormReluMaxGroupChannels = 1024;
// Whether the kernels can: up to so many levels and channels a group, and blocks that 31 bits count.
bool group_norm_relu_fits(const GroupNormInput& in);
// Memory that a direction needs for the time of the call; what is in it does not matter.
size_t group_norm_relu_workspace_bytes(const GroupNormInput& in, bool backward);
// Two launches each. cudaErrorInvalidValue where `group_norm_relu_fits` says no. Backward, any of the results may be null.
cudaError_t group_norm_relu_forward(const GroupNormInput& in, void* workspace, const NormMap* y, void* statistics,
                                    cudaStream_t stream);
cudaError_t group_norm_relu_backward(const GroupNormInput& in, const void* statistics, void* workspace,
                                     const NormMap* grad_y, const NormMap* grad_x, void* grad_weight, void* grad_bias,
                                     cudaStream_t stream);
}  // namespace cuda
#endif

}  // namespace gfl
