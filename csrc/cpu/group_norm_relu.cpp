// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU over all levels on the CPU.
//
//   x, grad_y            maps of the levels   dtype  read      y, grad_x   the same   dtype  write
//   weight, bias         [channels]           dtype or A read  statistics  [levels, images, groups, 2] A write, read
// Where locations lie side by side, a piece of the work is some whole groups, each read for its statistics and, while it
// is in the cache, once more for its values. Where channels do, a piece is some locations with all their channels, and
// pieces are put together, in their order, between the two readings. fp32 and 16-bit maps go through the vector code of
// simd/group_norm_relu.cpp; here is what finds its pieces, and all of fp64.
// Bytes an element: forward 2 readings and 1 writing, backward twice 2 and 1. Accumulator: A within a piece of up to 512
// values of a channel, double beyond. Bounds depend on shapes only: the same bits at any number of threads.
#include "group_norm_relu.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "terms/scalar.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void norm_row_moments(const cpu::NormRows& in, float* shift, float* sum, float* squares))
GFL_DECLARE_PER_ISA(void norm_row_forward(const cpu::NormRows& in, const cpu::NormChannels& channels))
GFL_DECLARE_PER_ISA(void norm_row_sums(const cpu::NormRows& in, const cpu::NormChannels& channels, float* sum,
                                       float* product))
GFL_DECLARE_PER_ISA(void norm_row_backward(const cpu::NormRows& in, const cpu::NormChannels& channels))
GFL_DECLARE_PER_ISA(void norm_run_moments(const cpu::NormRows& in, cpu::NormMoments& all))
GFL_DECLARE_PER_ISA(void norm_run_forward(const cpu::NormRows& in, const cpu::NormChannel& channel))
GFL_DECLARE_PER_ISA(void norm_run_sums(const cpu::NormRows& in, const cpu::NormChannel& channel, cpu::NormSums& all))
GFL_DECLARE_PER_ISA(void norm_run_backward(const cpu::NormRows& in, const cpu::NormChannel& channel))
}  // namespace gfl

namespace gfl::cpu {
namespace {

constexpr int64_t kBlockElements = 32768;                 // of a piece, about
constexpr int64_t kFewestLocations = 16, kMostLocations = 512;  // of a piece that has all channels
constexpr int64_t kVector = 16;                           // floats of the widest vector

void row_moments(const NormRows& in, float* shift, float* sum, float* squares) {
  GFL_BY_ISA(norm_row_moments, in, shift, sum, squares);
}
void row_forward(const NormRows& in, const NormChannels& channels) { GFL_BY_ISA(norm_row_forward, in, channels); }
void row_sums(const NormRows& in, const NormChannels& channels, float* sum, float* product) {
  GFL_BY_ISA(norm_row_sums, in, channels, sum, product);
}
void row_backward(const NormRows& in, const NormChannels& channels) { GFL_BY_ISA(norm_row_backward, in, channels); }
void run_moments(const NormRows& in, NormMoments& all) { GFL_BY_ISA(norm_run_moments, in, all); }
void run_forward(const NormRows& in, const NormChannel& channel) { GFL_BY_ISA(norm_run_forward, in, channel); }
void run_sums(const NormRows& in, const NormChannel& channel, NormSums& all) {
  GFL_BY_ISA(norm_run_sums, in, channel, all);
}
void run_backward(const NormRows& in, const NormChannel& channel) { GFL_BY_ISA(norm_run_backward, in, channel); }

bool in_double(const GroupNormInput& in) { return in.dtype == DType::f64; }

// Where a map's element lies.
const void* at(const GroupNormInput& in, const NormMap& map, int64_t image, int64_t channel, int64_t location) {
  const int64_t size = dispatch(in.dtype, [](auto t) { return static_cast<int64_t>(sizeof(t)); });
  return static_cast<const char*>(map.data) +
         size * (image * map.stride_image + channel * map.stride_channel + location * map.stride_location);
}
void* place(const GroupNormInput& in, const NormMap& map, int64_t image, int64_t channel, int64_t location) {
  return const_cast<void*>(at(in, map, image, channel, location));
}

double parameter(const GroupNormInput& in, const void* values, int64_t channel) {
  return dispatch(in.parameter_dtype, [&](auto t) {
    return static_cast<double>(load(static_cast<const decltype(t)*>(values) + channel));
  });
}

// ---- statistics ----

struct Statistic { double mean, rstd; };

int64_t statistic_index(const GroupNormInput& in, int64_t level, int64_t image, int64_t group) {
  return ((level * in.images + image) * in.groups + group) * 2;
}

Statistic statistic_at(const GroupNormInput& in, const void* statistics, int64_t level, int64_t image, int64_t group) {
  const int64_t i = statistic_index(in, level, image, group);
  if (in_double(in)) return {static_cast<const double*>(statistics)[i], static_cast<const double*>(statistics)[i + 1]};
  return {static_cast<const float*>(statistics)[i], static_cast<const float*>(statistics)[i + 1]};
}

void put_statistic(const GroupNormInput& in, void* statistics, int64_t level, int64_t image, int64_t group,
                   const NormMoments& m) {
  const int64_t i = statistic_index(in, level, image, group);
  const double rstd = m.count == 0 ? 0 : 1 / std::sqrt(m.squares / m.count + in.eps);
  if (in_double(in)) {
    static_cast<double*>(statistics)[i] = m.mean;
    static_cast<double*>(statistics)[i + 1] = rstd;
  } else {
    static_cast<float*>(statistics)[i] = static_cast<float>(m.mean);
    static_cast<float*>(statistics)[i + 1] = static_cast<float>(rstd);
  }
}

// ---- coefficients ----

// Of a group, from its sums Σ γ·g and Σ γ·g·x̂ over `count` values: what backward takes off every element.
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
  // Like the reference: the product of r and γ is rounded, then that with x − μ.
  return {static_cast<float>(s.mean),
          static_cast<float>(s.rstd) * static_cast<float>(parameter(in, in.weight, channel)),
          static_cast<float>(parameter(in, in.bias, channel)), static_cast<float>(correction.level),
          static_cast<float>(correction.slope)};
}

// Arrays of all channels' coefficients. `sums` of the level's image, null forward.
class ChannelArrays {
 public:
  ChannelArrays(const GroupNormInput& in, const void* statistics, const NormSums* sums, int64_t level, int64_t image)
      : room_((in.channels + kVector - 1) / kVector * kVector), values_(static_cast<size_t>(5 * room_)) {
    const int64_t channels = in.group_channels();
    for (int64_t group = 0; group < in.groups; ++group) {
      const Statistic s = statistic_at(in, statistics, level, image, group);
      Correction correction{0, 0};
      if (sums != nullptr) correction = correction_of(in, sums, s, group, in.levels[level].locations);
      for (int64_t c = group * channels; c < (group + 1) * channels; ++c) {
        const NormChannel k = channel_of(in, s, correction, c);
        float* to = values_.data() + c;
        for (const float value : {k.mean, k.scale, k.bias, k.level, k.slope}) *to = value, to += room_;
      }
    }
  }
  NormChannels view() const {
    const float* v = values_.data();
    return {v, v + room_, v + 2 * room_, v + 3 * room_, v + 4 * room_};
  }

 private:
  int64_t room_;
  std::vector<float> values_;
};

float floor_of(const GroupNormInput& in) { return in.relu ? 0.0f : -std::numeric_limits<float>::infinity(); }

// A block's locations as rows; null maps are left out.
NormRows rows_of(const GroupNormInput& in, const NormBlock& b, const NormMap* grad, const NormMap* out) {
  const NormLevel& level = in.levels[b.level];
  NormRows rows{in.dtype, at(in, level.x, b.image, 0, b.begin), nullptr, nullptr, level.x.stride_location, 0, 0,
                b.end - b.begin, in.channels, floor_of(in)};
  if (grad != nullptr) {
    rows.grad = at(in, grad[b.level], b.image, 0, b.begin);
    rows.grad_stride = grad[b.level].stride_location;
  }
  if (out != nullptr) {
    rows.out = place(in, out[b.level], b.image, 0, b.begin);
    rows.out_stride = out[b.level].stride_location;
  }
  return rows;
}

// One channel of a level's image as a run.
NormRows run_of(const GroupNormInput& in, int64_t level, int64_t image, int64_t channel, const NormMap* grad,
                const NormMap* out) {
  const NormLevel& l = in.levels[level];
  return {in.dtype,
          at(in, l.x, image, channel, 0),
          grad == nullptr ? nullptr : at(in, grad[level], image, channel, 0),
          out == nullptr ? nullptr : place(in, out[level], image, channel, 0),
          0, 0, 0, 1, l.locations, floor_of(in)};
}

// ---- whole groups of fp32 and 16 bits ----

NormMoments group_moments(const GroupNormInput& in, int64_t level, int64_t image, int64_t group) {
  const int64_t channels = in.group_channels();
  NormMoments all{0, 0, 0};
  NormRows run = run_of(in, level, image, group * channels, nullptr, nullptr);
  if (in.levels[level].x.stride_channel == run.length) {  // the channels follow each other: one run
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

// ---- whole groups of fp64 ----

// visit(channel, location) for all values of a group.
template <class Visit>
void for_group(const GroupNormInput& in, int64_t level, int64_t group, const Visit& visit) {
  for (int64_t c = group * in.group_channels(); c < (group + 1) * in.group_channels(); ++c) {
    for (int64_t i = 0; i < in.levels[level].locations; ++i) visit(c, i);
  }
}

void forward_group_in_double(const GroupNormInput& in, int64_t level, int64_t image, int64_t group, const NormMap* y,
                             void* statistics) {
  const auto x = [&](int64_t c, int64_t i) {
    return *static_cast<const double*>(at(in, in.levels[level].x, image, c, i));
  };
  NormMoments m{static_cast<double>(in.group_channels() * in.levels[level].locations), 0, 0};
  for_group(in, level, group, [&](int64_t c, int64_t i) { m.mean += x(c, i); });
  m.mean /= std::max(m.count, 1.0);
  for_group(in, level, group, [&](int64_t c, int64_t i) { m.squares += (x(c, i) - m.mean) * (x(c, i) - m.mean); });
  put_statistic(in, statistics, level, image, group, m);
  const Statistic s = statistic_at(in, statistics, level, image, group);
  for_group(in, level, group, [&](int64_t c, int64_t i) {
    const double value = (x(c, i) - s.mean) * (s.rstd * parameter(in, in.weight, c)) + parameter(in, in.bias, c);
    *static_cast<double*>(place(in, y[level], image, c, i)) = in.relu && value < 0 ? 0 : value;
  });
}

void backward_group_in_double(const GroupNormInput& in, int64_t level, int64_t image, int64_t group,
                              const void* statistics, const NormMap* grad_y, const NormMap* grad_x, NormSums* sums) {
  const Statistic s = statistic_at(in, statistics, level, image, group);
  // visit(channel, location, x − μ, γ, gradient behind the ReLU).
  const auto for_gradients = [&](const auto& visit) {
    for_group(in, level, group, [&](int64_t c, int64_t i) {
      const double distance = *static_cast<const double*>(at(in, in.levels[level].x, image, c, i)) - s.mean;
      const double weight = parameter(in, in.weight, c);
      const double value = distance * (s.rstd * weight) + parameter(in, in.bias, c);
      const double grad = *static_cast<const double*>(at(in, grad_y[level], image, c, i));
      visit(c, i, distance, weight, in.relu && value <= 0 ? 0 : grad);
    });
  };
  for (int64_t c = group * in.group_channels(); c < (group + 1) * in.group_channels(); ++c) sums[c] = {0, 0};
  for_gradients([&](int64_t c, int64_t, double distance, double, double grad) {
    sums[c].grad += grad;
    sums[c].grad_xhat += grad * distance * s.rstd;
  });
  if (grad_x == nullptr) return;
  const Correction k = correction_of(in, sums, s, group, in.levels[level].locations);
  for_gradients([&](int64_t c, int64_t i, double distance, double weight, double grad) {
    *static_cast<double*>(place(in, grad_x[level], image, c, i)) =
        s.rstd * weight * grad - (k.level + k.slope * distance);
  });
}

// visit(block) for the blocks of a level's image, in order.
template <class Visit>
void for_blocks(const std::vector<NormBlock>& blocks, int64_t level, int64_t image, const Visit& visit) {
  const auto before = [](const NormBlock& b, const std::pair<int64_t, int64_t>& wanted) {
    return std::pair(b.level, b.image) < wanted;
  };
  auto block = std::lower_bound(blocks.begin(), blocks.end(), std::pair(level, image), before);
  for (; block != blocks.end() && block->level == level && block->image == image; ++block) visit(*block);
}

}  // namespace

std::vector<NormBlock> group_norm_relu_blocks(const GroupNormInput& in) {
  std::vector<NormBlock> blocks;
  for (int64_t l = 0; l < in.level_count; ++l) {
    const NormLevel& level = in.levels[l];
    const bool whole = level.planar || in_double(in) || level.locations == 0;
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

void group_norm_relu_moments(const GroupNormInput& in, const NormBlock* blocks, NormMoments* moments,
                             const NormMap* y, void* statistics, int64_t begin, int64_t end) {
  const size_t room = static_cast<size_t>((in.channels + kVector - 1) / kVector * kVector);
  std::vector<float> values(3 * room);
  float *shift = values.data(), *sum = shift + room, *squares = sum + room;
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) {
      const auto forward = in_double(in) ? forward_group_in_double : forward_group;
      for (int64_t group = b.begin; group < b.end; ++group) forward(in, b.level, b.image, group, y, statistics);
      continue;
    }
    row_moments(rows_of(in, b, nullptr, nullptr), shift, sum, squares);
    const double count = static_cast<double>(b.end - b.begin), channels = static_cast<double>(in.group_channels());
    for (int64_t group = 0; group < in.groups; ++group) {
      // All channels have as many values: means are averaged, and their distances from that are added to the squares.
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

void group_norm_relu_statistics(const GroupNormInput& in, const std::vector<NormBlock>& blocks,
                                const NormMoments* moments, void* statistics, int64_t begin, int64_t end) {
  std::vector<NormMoments> all;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t level = pair / in.images, image = pair % in.images;
    all.assign(static_cast<size_t>(in.groups), NormMoments{0, 0, 0});
    bool whole = false;
    for_blocks(blocks, level, image, [&](const NormBlock& b) {
      whole = b.whole;
      const NormMoments* part = moments + (&b - blocks.data()) * in.groups;
      if (!whole) for (int64_t group = 0; group < in.groups; ++group) merge(all[static_cast<size_t>(group)], part[group]);
    });
    if (whole) continue;
    for (int64_t group = 0; group < in.groups; ++group) {
      put_statistic(in, statistics, level, image, group, all[static_cast<size_t>(group)]);
    }
  }
}

void group_norm_relu_normalise(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                               const NormMap* y, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) continue;
    const ChannelArrays channels(in, statistics, nullptr, b.level, b.image);
    row_forward(rows_of(in, b, nullptr, y), channels.view());
  }
}

void group_norm_relu_sums(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                          const NormMap* grad_y, const NormMap* grad_x, NormSums* partial, NormSums* sums,
                          int64_t begin, int64_t end) {
  const size_t room = static_cast<size_t>((in.channels + kVector - 1) / kVector * kVector);
  std::vector<float> values(2 * room);
  float *sum = values.data(), *product = sum + room;
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) {
      const auto backward = in_double(in) ? backward_group_in_double : backward_group;
      NormSums* of_image = sums + (b.level * in.images + b.image) * in.channels;
      for (int64_t group = b.begin; group < b.end; ++group) {
        backward(in, b.level, b.image, group, statistics, grad_y, grad_x, of_image);
      }
      continue;
    }
    const ChannelArrays channels(in, statistics, nullptr, b.level, b.image);
    row_sums(rows_of(in, b, grad_y, nullptr), channels.view(), sum, product);
    for (int64_t c = 0; c < in.channels; ++c) {
      const double rstd = statistic_at(in, statistics, b.level, b.image, c / in.group_channels()).rstd;
      partial[block * in.channels + c] = {sum[c], product[c] * rstd};
    }
  }
}

void group_norm_relu_gather(const GroupNormInput& in, const std::vector<NormBlock>& blocks, const NormSums* partial,
                            NormSums* sums, int64_t begin, int64_t end) {
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

void group_norm_relu_grad_x(const GroupNormInput& in, const NormBlock* blocks, const void* statistics,
                            const NormSums* sums, const NormMap* grad_y, const NormMap* grad_x, int64_t begin,
                            int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const NormBlock& b = blocks[block];
    if (b.whole) continue;
    const NormSums* of_image = sums + (b.level * in.images + b.image) * in.channels;
    const ChannelArrays channels(in, statistics, of_image, b.level, b.image);
    row_backward(rows_of(in, b, grad_y, grad_x), channels.view());
  }
}

void group_norm_relu_grad_parameters(const GroupNormInput& in, const NormSums* sums, void* grad_weight,
                                     void* grad_bias, int64_t begin, int64_t end) {
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

}  // namespace gfl::cpu
