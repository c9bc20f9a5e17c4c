// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU over all levels on the CPU.
//
//   x, grad_y            maps of the levels   dtype  read      y, grad_x   the same   dtype  write
//   weight, bias         [channels]           dtype or A read  statistics  [levels, images, groups, 2] A write, read
// Where locations are contiguous, a block of work is some whole groups: each is read for its statistics and, while it
// is in cache, once more for its values. Where channels are, a block is some locations with all their channels, and the
// blocks of a level's image are combined, in order, between the two passes. fp32 and 16-bit maps use the vector code of
// simd/group_norm_relu.cpp; fp64 always has whole groups, in scalar code.
// Bytes per element: forward 2 reads and 1 write, backward twice 2 and 1. Accumulator: A within up to 512 values of a
// channel, double beyond. The bounds of blocks depend on the shapes only: the same bits at any number of threads.
#include "group_norm_relu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

constexpr int64_t kBlockElements = 32768;                       // of a block, about
constexpr int64_t kFewestLocations = 16, kMostLocations = 512;  // of a block with all channels
constexpr int64_t kVector = 16;                                 // floats of the widest vector
constexpr int64_t kPairsPerChunk = 16384;                       // channels times (level, image) pairs

// Groups [begin, end) of a level's image, or its locations [begin, end) with all their channels.
struct NormBlock {
  int64_t level, image, begin, end;
  bool whole;  // groups
};

// An element of a map.
char* element(const GroupNormInput& in, const NormMap& map, int64_t image, int64_t channel, int64_t location) {
  const int64_t size = dispatch(in.dtype, [](auto t) { return static_cast<int64_t>(sizeof(t)); });
  return static_cast<char*>(map.data) +
         size * (image * map.stride_image + channel * map.stride_channel + location * map.stride_location);
}

double parameter(const GroupNormInput& in, const void* values, int64_t channel) {
  return dispatch(in.parameter_dtype,
                  [&](auto t) { return static_cast<double>(load(static_cast<const decltype(t)*>(values) + channel)); });
}

// ---- statistics ----

struct Statistic { double mean, rstd; };

int64_t statistic_index(const GroupNormInput& in, int64_t level, int64_t image, int64_t group) {
  return ((level * in.images + image) * in.groups + group) * 2;
}

Statistic statistic_at(const GroupNormInput& in, const void* statistics, int64_t level, int64_t image, int64_t group) {
  const int64_t i = statistic_index(in, level, image, group);
  const auto* of_f64 = static_cast<const double*>(statistics);
  const auto* of_f32 = static_cast<const float*>(statistics);
  return in.dtype == DType::f64 ? Statistic{of_f64[i], of_f64[i + 1]} : Statistic{of_f32[i], of_f32[i + 1]};
}

void put_statistic(const GroupNormInput& in, void* statistics, int64_t level, int64_t image, int64_t group,
                   const NormMoments& m) {
  const int64_t i = statistic_index(in, level, image, group);
  const double rstd = m.count == 0 ? 0 : 1 / std::sqrt(m.squares / m.count + in.eps);
  dispatch(in.dtype, [&](auto t) {
    auto* to = static_cast<acc_t<decltype(t)>*>(statistics) + i;
    to[0] = static_cast<acc_t<decltype(t)>>(m.mean);
    to[1] = static_cast<acc_t<decltype(t)>>(rstd);
  });
}

// ---- coefficients ----

// Of a group, from its sums Σ γ·g and Σ γ·g·x̂: what backward subtracts from every element.
struct Correction { double level, slope; };

Correction correction_of(const GroupNormInput& in, const NormSums* sums, const Statistic& s, int64_t group,
                         int64_t locations) {
  const int64_t channels = in.group_channels();
  const double count = static_cast<double>(channels * locations);
  double grad = 0, product = 0;
  for (int64_t c = group * channels; c < (group + 1) * channels; ++c) {
    const double weight = parameter(in, in.weight, c);
    grad += weight * sums[c].grad;
    product += weight * sums[c].grad_xhat;
  }
  return {s.rstd * grad / count, s.rstd * s.rstd * product / count};
}

NormChannel channel_of(const GroupNormInput& in, const Statistic& s, const Correction& correction, int64_t channel) {
  const double weight = parameter(in, in.weight, channel);
  // Like the reference: the product of r and γ is rounded, then that with x − μ.
  const double scale =
      in.dtype == DType::f64 ? s.rstd * weight : static_cast<float>(s.rstd) * static_cast<float>(weight);
  return {s.mean, scale, parameter(in, in.bias, channel), correction.level, correction.slope};
}

// The coefficients of all channels per (level, image) pair, for blocks of locations.
class ChannelArrays {
 public:
  explicit ChannelArrays(const GroupNormInput& in)
      : room_((in.channels + kVector - 1) / kVector * kVector),
        values_(static_cast<size_t>(in.level_count * in.images * 5 * room_)) {}

  // Pairs [begin, end). Without `sums`, those of the forward value only.
  void fill(const GroupNormInput& in, const void* statistics, const NormSums* sums, int64_t begin, int64_t end) {
    const int64_t channels = in.group_channels();
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t level = pair / in.images, image = pair % in.images;
      for (int64_t group = 0; group < in.groups; ++group) {
        const Statistic s = statistic_at(in, statistics, level, image, group);
        Correction correction{0, 0};
        if (sums != nullptr) {
          correction = correction_of(in, sums + pair * in.channels, s, group, in.levels[level].locations);
        }
        for (int64_t c = group * channels; c < (group + 1) * channels; ++c) {
          const NormChannel k = channel_of(in, s, correction, c);
          float* to = values_.data() + pair * 5 * room_ + c;
          for (const double value : {k.mean, k.scale, k.bias, k.level, k.slope}) {
            *to = static_cast<float>(value);
            to += room_;
          }
        }
      }
    }
  }
  NormChannels at(int64_t pair) const {
    const float* v = values_.data() + pair * 5 * room_;
    return {v, v + room_, v + 2 * room_, v + 3 * room_, v + 4 * room_};
  }

 private:
  int64_t room_;
  std::vector<float> values_;
};

// A piece of the maps from (channel, location) on; null maps are left out. Strides are those between locations.
NormRows piece_of(const GroupNormInput& in, int64_t level, int64_t image, int64_t channel, int64_t location,
                  const NormMap* grad, const NormMap* out) {
  const NormMap& x = in.levels[level].x;
  NormRows piece{};
  piece.dtype = in.dtype;
  piece.x = element(in, x, image, channel, location);
  piece.x_stride = x.stride_location;
  if (grad != nullptr) {
    piece.grad = element(in, grad[level], image, channel, location);
    piece.grad_stride = grad[level].stride_location;
  }
  if (out != nullptr) {
    piece.out = element(in, out[level], image, channel, location);
    piece.out_stride = out[level].stride_location;
  }
  piece.floor = in.relu ? 0 : -std::numeric_limits<double>::infinity();
  return piece;
}

NormRows rows_of(const GroupNormInput& in, const NormBlock& b, const NormMap* grad, const NormMap* out) {
  NormRows rows = piece_of(in, b.level, b.image, 0, b.begin, grad, out);
  rows.rows = b.end - b.begin;
  rows.length = in.channels;
  return rows;
}

NormRows run_of(const GroupNormInput& in, int64_t level, int64_t image, int64_t channel, const NormMap* grad,
                const NormMap* out) {
  NormRows run = piece_of(in, level, image, channel, 0, grad, out);
  run.rows = 1;
  run.length = in.levels[level].locations;
  return run;
}

// ---- whole groups ----

NormMoments group_moments(const GroupNormInput& in, int64_t level, int64_t image, int64_t group) {
  const int64_t channels = in.group_channels();
  NormMoments all{0, 0, 0};
  NormRows run = run_of(in, level, image, group * channels, nullptr, nullptr);
  const NormMap& x = in.levels[level].x;
  if (x.stride_channel == run.length * x.stride_location) {  // the channels follow each other: one run
    run.length *= channels;
    run_moments(run, all);
    return all;
  }
  for (int64_t c = group * channels; c < (group + 1) * channels; ++c) {
    run_moments(run_of(in, level, image, c, nullptr, nullptr), all);
  }
  return all;
}

void forward_group(const GroupNormInput& in, int64_t level, int64_t image, int64_t group, const NormMap* y,
                   void* statistics) {
  put_statistic(in, statistics, level, image, group, group_moments(in, level, image, group));
  const Statistic s = statistic_at(in, statistics, level, image, group);
  for (int64_t c = group * in.group_channels(); c < (group + 1) * in.group_channels(); ++c) {
    run_forward(run_of(in, level, image, c, nullptr, y), channel_of(in, s, {0, 0}, c));
  }
}

void backward_group(const GroupNormInput& in, int64_t level, int64_t image, int64_t group, const void* statistics,
                    const NormMap* grad_y, const NormMap* grad_x, NormSums* sums) {
  const int64_t first = group * in.group_channels(), last = first + in.group_channels();
  const Statistic s = statistic_at(in, statistics, level, image, group);
  for (int64_t c = first; c < last; ++c) {
    sums[c] = {0, 0};
    run_sums(run_of(in, level, image, c, grad_y, nullptr), channel_of(in, s, {0, 0}, c), sums[c]);
    sums[c].grad_xhat *= s.rstd;
  }
  if (grad_x == nullptr) return;
  const Correction correction = correction_of(in, sums, s, group, in.levels[level].locations);
  for (int64_t c = first; c < last; ++c) {
    run_backward(run_of(in, level, image, c, grad_y, grad_x), channel_of(in, s, correction, c));
  }
}

// ---- blocks ----

// visit(block) for the blocks of a level's image, in order.
template <class Visit>
void for_blocks(const std::vector<NormBlock>& blocks, int64_t level, int64_t image, const Visit& visit) {
  const auto before = [](const NormBlock& b, const std::pair<int64_t, int64_t>& wanted) {
    return std::pair(b.level, b.image) < wanted;
  };
  auto block = std::lower_bound(blocks.begin(), blocks.end(), std::pair(level, image), before);
  for (; block != blocks.end() && block->level == level && block->image == image; ++block) visit(*block);
}

std::vector<NormBlock> cut_blocks(const GroupNormInput& in) {
  std::vector<NormBlock> blocks;
  for (int64_t l = 0; l < in.level_count; ++l) {
    const NormLevel& level = in.levels[l];
    const bool whole = level.planar || in.dtype == DType::f64 || level.locations == 0;
    const int64_t fewest = whole ? 1 : kFewestLocations, most = whole ? in.groups : kMostLocations;
    const int64_t step = whole ? std::max<int64_t>(1, in.group_channels() * level.locations) : in.channels;
    const int64_t size = std::min(std::max(kBlockElements / step, fewest), most);
    const int64_t end = whole ? in.groups : level.locations;
    for (int64_t image = 0; image < in.images; ++image) {
      for (int64_t begin = 0; begin < end; begin += size) {
        blocks.push_back({l, image, begin, std::min(end, begin + size), whole});
      }
    }
  }
  return blocks;
}

// The first pass forward over blocks [begin, end): whole groups are finished, the moments of the others' groups go to
// moments[block · groups + group].
void block_moments(const GroupNormInput& in, const NormBlock* blocks, NormMoments* moments, const NormMap* y,
                   void* statistics, int64_t begin, int64_t end) {
  const size_t room = static_cast<size_t>((in.channels + kVector - 1) / kVector * kVector);
  std::vector<float> values(3 * room);
  float *shift = values.data(), *sum = shift + room, *squares = sum + room;
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) {
      for (int64_t group = b.begin; group < b.end; ++group) forward_group(in, b.level, b.image, group, y, statistics);
      continue;
    }
    row_moments(rows_of(in, b, nullptr, nullptr), shift, sum, squares);
    const double count = static_cast<double>(b.end - b.begin), channels = static_cast<double>(in.group_channels());
    for (int64_t group = 0; group < in.groups; ++group) {
      // All channels have equally many values: means are averaged, and their distances from that are added to the
      // squares.
      const int64_t first = group * in.group_channels(), last = first + in.group_channels();
      NormMoments m{count * channels, 0, 0};
      double of_means = 0;
      for (int64_t c = first; c < last; ++c) {
        const double mean = shift[c] + sum[c] / count, within = squares[c] - double(sum[c]) * sum[c] / count;
        m.mean += mean;
        m.squares += within < 0 ? 0 : within;
      }
      m.mean /= channels;
      for (int64_t c = first; c < last; ++c) {
        const double difference = shift[c] + sum[c] / count - m.mean;
        of_means += difference * difference;
      }
      m.squares += count * of_means;
      moments[block * in.groups + group] = m;
    }
  }
}

// Combines the blocks of (level, image) pairs [begin, end), levels outermost.
void merge_moments(const GroupNormInput& in, const std::vector<NormBlock>& blocks, const NormMoments* moments,
                   void* statistics, int64_t begin, int64_t end) {
  std::vector<NormMoments> all;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t level = pair / in.images, image = pair % in.images;
    all.assign(static_cast<size_t>(in.groups), NormMoments{0, 0, 0});
    bool whole = false;
    for_blocks(blocks, level, image, [&](const NormBlock& b) {
      whole = b.whole;
      const NormMoments* part = moments + (&b - blocks.data()) * in.groups;
      for (int64_t group = 0; group < in.groups && !whole; ++group) merge(all[group], part[group]);
    });
    if (whole) continue;
    for (int64_t group = 0; group < in.groups; ++group) {
      put_statistic(in, statistics, level, image, group, all[group]);
    }
  }
}

void block_forward(const GroupNormInput& in, const NormBlock* blocks, const ChannelArrays& channels, const NormMap* y,
                   int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (!b.whole) row_forward(rows_of(in, b, nullptr, y), channels.at(b.level * in.images + b.image));
  }
}

// The first pass backward: whole groups are finished, with their sums in `sums` [levels, images, channels]; the sums of
// other blocks go to partial[block · channels + channel].
void block_sums(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                const ChannelArrays& channels, const NormMap* grad_y, const NormMap* grad_x, NormSums* partial,
                NormSums* sums, int64_t begin, int64_t end) {
  const size_t room = static_cast<size_t>((in.channels + kVector - 1) / kVector * kVector);
  std::vector<float> values(2 * room);
  float *sum = values.data(), *product = sum + room;
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) {
      NormSums* of_image = sums + (b.level * in.images + b.image) * in.channels;
      for (int64_t group = b.begin; group < b.end; ++group) {
        backward_group(in, b.level, b.image, group, statistics, grad_y, grad_x, of_image);
      }
      continue;
    }
    row_sums(rows_of(in, b, grad_y, nullptr), channels.at(b.level * in.images + b.image), sum, product);
    for (int64_t c = 0; c < in.channels; ++c) {
      const double rstd = statistic_at(in, statistics, b.level, b.image, c / in.group_channels()).rstd;
      partial[block * in.channels + c] = {sum[c], product[c] * rstd};
    }
  }
}

void merge_sums(const GroupNormInput& in, const std::vector<NormBlock>& blocks, const NormSums* partial, NormSums* sums,
                int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    NormSums* of_image = sums + pair * in.channels;
    bool first = true;
    for_blocks(blocks, pair / in.images, pair % in.images, [&](const NormBlock& b) {
      if (b.whole) return;
      if (first) std::fill(of_image, of_image + in.channels, NormSums{0, 0});
      first = false;
      const NormSums* part = partial + (&b - blocks.data()) * in.channels;
      for (int64_t c = 0; c < in.channels; ++c) {
        of_image[c].grad += part[c].grad;
        of_image[c].grad_xhat += part[c].grad_xhat;
      }
    });
  }
}

void block_backward(const GroupNormInput& in, const NormBlock* blocks, const ChannelArrays& channels,
                    const NormMap* grad_y, const NormMap* grad_x, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (!b.whole) row_backward(rows_of(in, b, grad_y, grad_x), channels.at(b.level * in.images + b.image));
  }
}

// Channels [begin, end); either result may be null.
void grad_parameters(const GroupNormInput& in, const NormSums* sums, void* grad_weight, void* grad_bias, int64_t begin,
                     int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    NormSums all{0, 0};
    for (int64_t pair = 0; pair < in.level_count * in.images; ++pair) {
      all.grad += sums[pair * in.channels + c].grad;
      all.grad_xhat += sums[pair * in.channels + c].grad_xhat;
    }
    dispatch(in.parameter_dtype, [&](auto t) {
      using T = decltype(t);
      if (grad_weight != nullptr) store(static_cast<T*>(grad_weight) + c, static_cast<acc_t<T>>(all.grad_xhat));
      if (grad_bias != nullptr) store(static_cast<T*>(grad_bias) + c, static_cast<acc_t<T>>(all.grad));
    });
  }
}

// Whether no blocks have to be combined between the two passes.
bool all_whole(const std::vector<NormBlock>& blocks) {
  return std::all_of(blocks.begin(), blocks.end(), [](const NormBlock& b) { return b.whole; });
}

}  // namespace

void group_norm_relu_forward(const GroupNormInput& in, const NormMap* y, void* statistics,
                             const ParallelFor& parallel) {
  const std::vector<NormBlock> blocks = cut_blocks(in);
  const auto count = static_cast<int64_t>(blocks.size());
  const bool whole = all_whole(blocks);
  std::vector<NormMoments> moments(whole ? 0 : blocks.size() * static_cast<size_t>(in.groups));
  parallel(count, 1, [&](int64_t begin, int64_t end) {
    block_moments(in, blocks.data(), moments.data(), y, statistics, begin, end);
  });
  if (whole) return;
  ChannelArrays channels(in);
  parallel(in.level_count * in.images, 1, [&](int64_t begin, int64_t end) {
    merge_moments(in, blocks, moments.data(), statistics, begin, end);
    channels.fill(in, statistics, nullptr, begin, end);
  });
  parallel(count, 1, [&](int64_t begin, int64_t end) { block_forward(in, blocks.data(), channels, y, begin, end); });
}

void group_norm_relu_backward(const GroupNormInput& in, const void* statistics, const NormMap* grad_y,
                              const NormMap* grad_x, void* grad_weight, void* grad_bias, const ParallelFor& parallel) {
  const std::vector<NormBlock> blocks = cut_blocks(in);
  const auto count = static_cast<int64_t>(blocks.size());
  const int64_t pairs = in.level_count * in.images;
  const bool whole = all_whole(blocks);
  std::vector<NormSums> partial(whole ? 0 : blocks.size() * static_cast<size_t>(in.channels));
  std::vector<NormSums> sums(static_cast<size_t>(pairs * in.channels));
  ChannelArrays channels(in);
  if (!whole) {
    parallel(pairs, 1, [&](int64_t begin, int64_t end) { channels.fill(in, statistics, nullptr, begin, end); });
  }
  parallel(count, 1, [&](int64_t begin, int64_t end) {
    block_sums(in, blocks.data(), statistics, channels, grad_y, grad_x, partial.data(), sums.data(), begin, end);
  });
  if (!whole) {
    parallel(pairs, 1, [&](int64_t begin, int64_t end) {
      merge_sums(in, blocks, partial.data(), sums.data(), begin, end);
      if (grad_x != nullptr) channels.fill(in, statistics, sums.data(), begin, end);
    });
    if (grad_x != nullptr) {
      parallel(count, 1, [&](int64_t begin, int64_t end) {
        block_backward(in, blocks.data(), channels, grad_y, grad_x, begin, end);
      });
    }
  }
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const int64_t step = std::max<int64_t>(1, kPairsPerChunk / std::max<int64_t>(1, pairs));
  parallel(in.channels, step,
           [&](int64_t begin, int64_t end) { grad_parameters(in, sums.data(), grad_weight, grad_bias, begin, end); });
}

}  // namespace gfl::cpu
