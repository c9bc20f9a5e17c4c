// SPDX-License-Identifier: Apache-2.0
// Group normalization and ReLU over levels, forward and backward, against plain loops in double.
#include "gfl/head.h"

#include <memory>

#include "float_buffer.h"
#include "gfl/parallel.h"

namespace {

using namespace gfl;
using gfl::testing::FloatBuffer;
using gfl::testing::Generator;

struct Shape {
  std::vector<int64_t> locations;  // per level
  int64_t images, channels, groups;
  std::vector<bool> planar;  // per level
  int64_t gap;               // unused elements after each row of the contiguous dimension
  bool relu;
  double mean, scale;
};

// Where a level's values lie.
struct Layout {
  int64_t image, channel, location, size;
  Layout(const Shape& s, size_t level) {
    const int64_t locations = s.locations[level];
    channel = s.planar[level] ? locations + s.gap : 1;
    location = s.planar[level] ? 1 : s.channels + s.gap;
    image = s.planar[level] ? channel * s.channels : location * locations;
    size = image * s.images;
  }
  size_t at(int64_t b, int64_t c, int64_t i) const {
    return static_cast<size_t>(b * image + c * channel + i * location);
  }
};

using Levels = std::vector<std::vector<double>>;

Levels drawn(Generator& generator, const Shape& s, DType dtype, double mean, double scale) {
  Levels all;
  for (size_t l = 0; l < s.locations.size(); ++l) {
    std::vector<double> values = gfl::testing::normals(generator, static_cast<size_t>(Layout(s, l).size), scale);
    for (double& value : values) value += mean;
    all.push_back(FloatBuffer(dtype, values).read());  // rounded
  }
  return all;
}

// visit(level, image, channel, place in the level) in order of the groups of images of levels.
template <class Visit> void for_values(const Shape& s, const Visit& visit) {
  for (size_t l = 0; l < s.locations.size(); ++l) {
    const Layout layout(s, l);
    for (int64_t b = 0; b < s.images; ++b)
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t i = 0; i < s.locations[l]; ++i) visit(l, b, c, layout.at(b, c, i));
  }
}

struct Results {
  Levels y, grad_x;
  std::vector<double> statistics, grad_weight, grad_bias;
};

size_t group_index(const Shape& s, size_t level, int64_t image, int64_t channel) {
  const int64_t pair = static_cast<int64_t>(level) * s.images + image;
  return static_cast<size_t>(pair * s.groups + channel / (s.channels / s.groups));
}

Levels normalised(const Shape& s, const Levels& x, const std::vector<double>& statistics) {
  Levels result = x;
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    const size_t g = 2 * group_index(s, l, b, c);
    result[l][at] = (x[l][at] - statistics[g]) * statistics[g + 1];
  });
  return result;
}

std::vector<double> statistics_by_loops(const Shape& s, const Levels& x, double eps) {
  const size_t count = s.locations.size() * static_cast<size_t>(s.images * s.groups);
  std::vector<double> n(count), result(2 * count);
  std::vector<long double> mean(count), squares(count);  // sums of tens of thousands
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    n[group_index(s, l, b, c)] += 1;
    mean[group_index(s, l, b, c)] += x[l][at];
  });
  for (size_t g = 0; g < count; ++g) mean[g] /= std::max(n[g], 1.0);
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    const size_t g = group_index(s, l, b, c);
    squares[g] += (x[l][at] - mean[g]) * (x[l][at] - mean[g]);
  });
  for (size_t g = 0; g < count; ++g) {
    result[2 * g] = static_cast<double>(mean[g]);
    result[2 * g + 1] = n[g] == 0 ? 0 : static_cast<double>(1 / std::sqrt(squares[g] / n[g] + eps));
  }
  return result;
}

// By how much a group magnifies the roundings of its values: they are of the size of the mean, what is left of them
// when that is taken away is of the size of the deviation. A group of two values can lie close together by chance.
double condition(const std::vector<double>& statistics, size_t group) {
  return std::max(1.0, std::fabs(statistics[2 * group]) * statistics[2 * group + 1]);
}

Results by_loops(const Shape& s, const Levels& x, const Levels& grad_y, const std::vector<double>& weight,
                 const std::vector<double>& bias, double eps) {
  Results r;
  r.statistics = statistics_by_loops(s, x, eps);
  const Levels xhat = normalised(s, x, r.statistics);
  Levels g = grad_y;
  r.y = x;
  r.grad_x = x;
  r.grad_weight.assign(weight.size(), 0);
  r.grad_bias.assign(weight.size(), 0);
  std::vector<double> n(r.statistics.size() / 2);
  std::vector<long double> sum(n.size()), product(n.size());
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    const size_t channel = static_cast<size_t>(c), group = group_index(s, l, b, c);
    const double value = xhat[l][at] * weight[channel] + bias[channel];
    r.y[l][at] = s.relu && value < 0 ? 0 : value;
    if (s.relu && value <= 0) g[l][at] = 0;
    r.grad_weight[channel] += g[l][at] * xhat[l][at];
    r.grad_bias[channel] += g[l][at];
    n[group] += 1;
    sum[group] += weight[channel] * g[l][at];
    product[group] += weight[channel] * g[l][at] * xhat[l][at];
  });
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    const size_t group = group_index(s, l, b, c);
    const long double without = (sum[group] + xhat[l][at] * product[group]) / n[group];
    r.grad_x[l][at] =
        static_cast<double>(r.statistics[2 * group + 1] * (weight[static_cast<size_t>(c)] * g[l][at] - without));
  });
  return r;
}

// Draws biases until no value lies so close to 0 that a rounding decides what the ReLU does.
std::vector<double> clear_biases(Generator& generator, const Shape& s, const Levels& x, DType dtype,
                                 const std::vector<double>& weight, double eps) {
  const std::vector<double> statistics = statistics_by_loops(s, x, eps);
  const Levels xhat = normalised(s, x, statistics);
  std::vector<double> bias(weight.size());
  std::vector<bool> clear(weight.size(), false);
  for (int round = 0; round < 100; ++round) {
    std::vector<double> fresh = FloatBuffer(dtype, gfl::testing::normals(generator, bias.size(), 0.5)).read();
    for (size_t c = 0; c < bias.size(); ++c) {
      if (!clear[c]) bias[c] = fresh[c];
    }
    clear.assign(bias.size(), true);
    for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
      const size_t channel = static_cast<size_t>(c);
      const double close = std::max(1e-5, 1e-6 * condition(statistics, group_index(s, l, b, c)));
      if (std::fabs(xhat[l][at] * weight[channel] + bias[channel]) < close) clear[channel] = false;
    });
  }
  return bias;
}

// The memory of a level's map.
struct Maps {
  std::vector<std::unique_ptr<FloatBuffer>> buffers;
  std::vector<NormMap> maps;
  Maps(const Shape& s, DType dtype, const Levels* values) {
    for (size_t l = 0; l < s.locations.size(); ++l) {
      const Layout layout(s, l);
      buffers.push_back(values != nullptr ? std::make_unique<FloatBuffer>(dtype, (*values)[l])
                                          : std::make_unique<FloatBuffer>(dtype, static_cast<size_t>(layout.size)));
      maps.push_back({buffers[l]->data(), layout.image, layout.channel, layout.location});
    }
  }
  Levels read() const {
    Levels all;
    for (const auto& buffer : buffers) all.push_back(buffer->read());
    return all;
  }
};

void run(const GroupNormInput& in, const Maps& grad_y, Maps& y, Maps& grad_x, FloatBuffer& statistics,
         FloatBuffer& grad_weight, FloatBuffer& grad_bias) {
#if defined(GFL_TEST_CUDA)
  CHECK(cuda::group_norm_relu_fits(in), "the kernels refuse the input");
  gfl::testing::Buffer<unsigned char> forward(cuda::group_norm_relu_workspace_bytes(in, false));
  gfl::testing::Buffer<unsigned char> backward(cuda::group_norm_relu_workspace_bytes(in, true));
  CHECK_CUDA(cuda::group_norm_relu_forward(in, forward.data(), y.maps.data(), statistics.data(), nullptr));
  CHECK_CUDA(cuda::group_norm_relu_backward(in, statistics.data(), backward.data(), grad_y.maps.data(),
                                            grad_x.maps.data(), grad_weight.data(), grad_bias.data(), nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
#else
  const ParallelFor parallel = [](int64_t count, int64_t chunk, const auto& body) { for_chunks(count, chunk, body); };
  cpu::group_norm_relu_forward(in, y.maps.data(), statistics.data(), parallel);
  cpu::group_norm_relu_backward(in, statistics.data(), grad_y.maps.data(), grad_x.maps.data(), grad_weight.data(),
                                grad_bias.data(), parallel);
#endif
}

void test(Generator& generator, const Shape& s, DType dtype, DType parameter_dtype) {
  const double eps = 1e-5;
  const Levels x = drawn(generator, s, dtype, s.mean, s.scale), grad = drawn(generator, s, dtype, 0, 1);
  std::vector<double> weight = gfl::testing::normals(generator, static_cast<size_t>(s.channels), 0.5);
  for (double& w : weight) w += 1;
  weight = FloatBuffer(parameter_dtype, weight).read();
  const std::vector<double> bias = clear_biases(generator, s, x, parameter_dtype, weight, eps);
  const Results want = by_loops(s, x, grad, weight, bias, eps);

  const Maps given(s, dtype, &x), grad_y(s, dtype, &grad);
  Maps y(s, dtype, nullptr), grad_x(s, dtype, nullptr);
  FloatBuffer weights(parameter_dtype, weight), biases(parameter_dtype, bias);
  FloatBuffer statistics(gfl::testing::accumulator_of(dtype), want.statistics.size());
  FloatBuffer grad_weight(parameter_dtype, weight.size()), grad_bias(parameter_dtype, weight.size());
  std::vector<NormLevel> levels;
  for (size_t l = 0; l < s.locations.size(); ++l) levels.push_back({given.maps[l], s.locations[l], s.planar[l]});
  const GroupNormInput in{levels.data(),   static_cast<int64_t>(levels.size()),
                          dtype,           s.images,
                          s.channels,      s.groups,
                          weights.data(),  biases.data(),
                          parameter_dtype, eps,
                          s.relu};
  run(in, grad_y, y, grad_x, statistics, grad_weight, grad_bias);

  // Roundings of a dozen operations and of sums in blocks, as the group magnifies them.
  const double arithmetic = 64 * gfl::testing::rounding(gfl::testing::accumulator_of(dtype));
  const Levels got_y = y.read(), got_grad = grad_x.read();
  for_values(s, [&](size_t l, int64_t b, int64_t c, size_t at) {
    const double of_maps = arithmetic * condition(want.statistics, group_index(s, l, b, c)) +
                           gfl::testing::rounding(dtype) * (dtype == DType::f64 ? 0 : 1);
    CHECK(gfl::testing::close(got_y[l][at], want.y[l][at], of_maps, of_maps),
          "%s level %zu image %d channel %d: y %.9g, expected %.9g", gfl::testing::name_of(dtype), l, int(b), int(c),
          got_y[l][at], want.y[l][at]);
    const double rstd = std::max(1.0, want.statistics[2 * group_index(s, l, b, c) + 1]);
    CHECK(gfl::testing::close(got_grad[l][at], want.grad_x[l][at], of_maps, of_maps * rstd),
          "%s level %zu image %d channel %d: grad_x %.9g, expected %.9g", gfl::testing::name_of(dtype), l, int(b),
          int(c), got_grad[l][at], want.grad_x[l][at]);
  });
  // The gaps between a map's rows are not written: they still hold NaN.
  for (size_t l = 0; l < s.locations.size() && s.gap > 0 && s.images * s.locations[l] > 0; ++l) {
    const Layout layout(s, l);
    const size_t beyond = static_cast<size_t>(s.planar[l] ? s.locations[l] : s.channels);
    CHECK(got_y[l][beyond] != got_y[l][beyond] && got_grad[l][beyond] != got_grad[l][beyond], "a gap was written");
  }
  const std::vector<double> got_statistics = statistics.read();
  double worst = 1;
  for (size_t at = 0; at < got_statistics.size(); ++at) {
    const double magnified = condition(want.statistics, at / 2), tolerance = arithmetic * magnified;
    worst = std::max(worst, magnified);
    CHECK(gfl::testing::close(got_statistics[at], want.statistics[at], tolerance, tolerance),
          "statistics %zu: %.9g, expected %.9g", at, got_statistics[at], want.statistics[at]);
  }
  // Sums of up to a thousand terms of both signs.
  const double of_parameters = 16 * arithmetic * worst + gfl::testing::rounding(parameter_dtype);
  gfl::testing::expect_close(grad_weight.read(), want.grad_weight, of_parameters, "grad_weight");
  gfl::testing::expect_close(grad_bias.read(), want.grad_bias, of_parameters, "grad_bias");
}

}  // namespace

int main() {
  Generator generator(gfl::testing::fresh_seed());
  std::vector<Shape> shapes = {
      {{6, 1}, 1, 4, 2, {true, true}, 0, true, 0.3, 1.5},
      {{6, 1, 0}, 2, 4, 2, {false, false, false}, 0, true, 0.3, 1.5},
      // The head's groups; more locations than one piece has, a number that 16 bytes divide and one that they don't.
      {{96, 35, 4}, 2, 96, 12, {true, true, true}, 0, true, 0.3, 1.5},
      {{96, 35, 4}, 2, 96, 12, {false, false, false}, 0, true, 0.3, 1.5},
      {{600, 75}, 1, 16, 2, {true, true}, 0, true, -1, 2},
      {{600, 75}, 1, 16, 2, {false, false}, 0, true, -1, 2},
      // A layout per level, odd channels, gaps between rows, no ReLU.
      {{70, 35}, 2, 21, 7, {true, false}, 3, true, 0.3, 1.5},
      {{70, 130}, 1, 24, 3, {false, true}, 8, false, 0.3, 1.5},
      // Several turns of a warp over a channel, with a remainder, and of a thread over its locations.
      {{2400, 300}, 1, 6, 3, {true, true}, 0, true, 0.3, 1.5},
      {{1501, 299}, 1, 8, 2, {true, false}, 0, true, 0.3, 1.5},
      {{33000}, 1, 2, 1, {true}, 0, true, 0.3, 1.5},
      {{33000}, 1, 8, 2, {false}, 0, true, 0.3, 1.5},
      // A channel per group, and one group of more channels than a slab or a warp has.
      {{33}, 1, 72, 72, {false}, 0, true, 0.3, 1.5},
      {{33}, 1, 136, 1, {true}, 0, true, 0.3, 1.5},
      {{17}, 1, 300, 1, {false}, 0, true, 0.3, 1.5},
      {{5}, 0, 4, 2, {true}, 0, true, 0.3, 1.5},
  };
  // Turns of the unrolled loops: of single elements, of 16 bytes, of 16 bytes with a rest, of a row per block.
  std::vector<Shape> turns;
  for (const bool relu : {true, false}) {
    turns.push_back({{6001}, 1, 2, 1, {true}, 0, relu, 0.3, 1.5});
    turns.push_back({{9600}, 1, 2, 1, {true}, 0, relu, 0.3, 1.5});
    turns.push_back({{70}, 1, 16, 2, {true}, 2, relu, 0.3, 1.5});
    turns.push_back({{70}, 1, 512, 1, {false}, 0, relu, 0.3, 1.5});
    turns.push_back({{43}, 1, 512, 1, {false}, 1, relu, 0.3, 1.5});
    turns.push_back({{9}, 1, 1024, 1, {false}, 1, relu, 0.3, 1.5});
    turns.push_back({{9}, 1, 1024, 1, {true}, 1, relu, 0.3, 1.5});
  }
  turns.push_back({{33000}, 1, 2, 1, {true}, 0, false, 0.3, 1.5});
  shapes.insert(shapes.end(), turns.begin(), turns.end());
  for (const DType dtype : gfl::testing::kDTypes) {
    for (const Shape& shape : shapes) {
      // The tolerance of the parameters' gradients is for sums of a thousand terms.
      if (dtype == DType::f64 && shape.locations[0] > 10000) continue;
      test(generator, shape, dtype, gfl::testing::accumulator_of(dtype));
    }
    // Parameters of another dtype than the maps', in either layout.
    for (const DType parameters : gfl::testing::kDTypes) {
      if (gfl::testing::accumulator_of(parameters) != gfl::testing::accumulator_of(dtype)) continue;
      for (const size_t shape : {2, 3, 6}) test(generator, shapes[shape], dtype, parameters);
    }
  }
  // A mean of a thousand deviations: E[x²] − E[x]² in fp32 would lose 6 % of the variance.
  for (const bool planar : {true, false}) {
    test(generator, {{333, 20}, 1, 16, 4, {planar, planar}, 0, true, 2000, 2}, DType::f32, DType::f32);
  }
  return gfl::testing::result("group_norm_relu");
}
