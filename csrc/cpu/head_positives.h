// SPDX-License-Identifier: Apache-2.0
// The positives of a head's loss on the CPU: which there are, what each adds, and the gradient of its sides.
#pragma once
#include <algorithm>
#include <vector>

#include "terms/gfl_loss.h"
#include "terms/scalar.h"

namespace gfl::cpu {

// What a positive adds before any weight, and w.
struct HeadTerms {
  double score;  // what its class learns
  double box;    // 1 − GIoU, 1 − CIoU
  double dfl;    // a quarter of the losses of its four sides
  double weight;
};

inline int64_t element(const int64_t (&stride)[4], int64_t image, int64_t channel, int64_t row, int64_t column) {
  return image * stride[0] + channel * stride[1] + row * stride[2] + column * stride[3];
}

// Largest class probability.
template <class T> double largest_probability(const HeadLossInput& in, const HeadPositive& p) {
  const HeadLevel& level = in.levels[p.level];
  const T* x = static_cast<const T*>(level.cls) + element(level.cls_stride, p.image, 0, p.row, p.column);
  acc_t<T> largest = load(x);
  for (int64_t c = 1; c < in.classes; ++c) {
    const acc_t<T> v = load(x + c * level.cls_stride[1]);
    if (v > largest || v != v) largest = v;
  }
  return static_cast<double>(bernoulli_from_logit<acc_t<T>>(largest, 0).p);
}

// In order of image, then location.
inline std::vector<HeadPositive> positives_of(const HeadLossInput& in) {
  std::vector<HeadPositive> found;
  int64_t location = 0;
  for (int64_t image = 0; image < in.images; ++image) {
    for (int64_t l = 0; l < in.level_count; ++l) {
      const HeadLevel& level = in.levels[l];
      for (int64_t i = 0; i < level.height * level.width; ++i, ++location) {
        const int64_t label = in.labels[location], slot = in.matched[location];
        if (is_positive(in, label, slot))
          found.push_back({image, l, i / level.width, i % level.width, location, label, slot});
      }
    }
  }
  return found;
}

// Σ max(positives of an image, 1).
inline int64_t positives_norm(const HeadLossInput& in, const std::vector<HeadPositive>& positives) {
  std::vector<int64_t> per_image(static_cast<size_t>(in.images), 0);
  for (const HeadPositive& p : positives) ++per_image[p.image];
  int64_t count = 0;
  for (const int64_t n : per_image) count += std::max<int64_t>(n, 1);
  return count;
}

template <class T> struct Distributions {
  using A = acc_t<T>;
  const T* data;
  int64_t stride;  // between bins; a side's bins follow those of the side before
  int bins;

  Distributions(const HeadLossInput& in, const HeadPositive& p) {
    const HeadLevel& level = in.levels[p.level];
    data = static_cast<const T*>(level.reg) + element(level.reg_stride, p.image, 0, p.row, p.column);
    stride = level.reg_stride[1];
    bins = static_cast<int>(in.reg_max + 1);
  }
  A raw(int side, int j) const { return load(data + (int64_t(side) * bins + j) * stride); }
  A operator()(int side, int j) const { return bounded_logit(raw(side, j)); }
};

template <class Head, class T> void distribution_terms(const HeadLossInput& in, const HeadPositive& p, HeadTerms& out) {
  using A = acc_t<T>;
  const HeadGeometry<A> g = head_geometry<Head, A>(in, in.levels[p.level], p);
  const Distributions<T> logits(in, p);
  A distance[4], dfl = 0;
  for (int side = 0; side < 4; ++side) {
    const A centre = head_centre(g, side);
    if (has_distances<Head>(in)) {
      distance[side] = logits.raw(side, 0);
      dfl += side_error<Head>(in, in.levels[p.level], centre, g.target[side], side, distance[side]).value;
      continue;
    }
    const auto logit = [&](int j) { return logits(side, j); };
    const BinSoftmax<A> s = bin_softmax<A>(logits.bins, logit);
    const TwoBins<A> b = head_bins<Head>(centre, g.target[side], side, static_cast<int>(in.reg_max));
    distance[side] = s.mean();
    if (b.counted) dfl += two_bin_loss(b, two_bin_entropy(s, b, logit));
  }
  if constexpr (Head::scores_given) {
    out.score = out.weight = static_cast<const A*>(in.scores)[p.location];
  } else {
    out.score = head_iou<Head>(g, distance, iou_kind::overlap{}, in.legacy).value;
  }
  out.box = head_iou<Head>(g, distance, typename Head::Box{}, in.legacy).value;
  out.dfl = dfl / A(4);
}

template <class Head, class T>
void distribution_backward(const HeadLossInput& in, const HeadPositive& p, const HeadTerms& terms,
                           const HeadScales& scales, const HeadGradients& out) {
  using A = acc_t<T>;
  const HeadGeometry<A> g = head_geometry<Head, A>(in, in.levels[p.level], p);
  const Distributions<T> logits(in, p);
  T* grad = static_cast<T*>(out.reg) + element(out.reg_stride, p.image, 0, p.row, p.column);
  A exponential[4][kMaxBins], distance[4];
  BinSoftmax<A> softmax[4];
  for (int side = 0; side < 4; ++side) {
    if (has_distances<Head>(in)) {
      distance[side] = logits.raw(side, 0);
      continue;
    }
    softmax[side] = bin_softmax<A>(
        logits.bins, [&](int j) { return logits(side, j); }, [&](int j, A e) { exponential[side][j] = e; });
    distance[side] = softmax[side].mean();
  }
  const IouTerm<A> box = head_iou<Head>(g, distance, typename Head::Box{}, in.legacy);
  const A by_box = static_cast<A>(scales.box * terms.weight), by_dfl = static_cast<A>(scales.dfl * terms.weight / 4);
  for (int side = 0; side < 4; ++side) {
    const A by_distance = by_box * side_sign<A>(side) * box.grad_pred[side], centre = head_centre(g, side);
    if (has_distances<Head>(in)) {
      const A slope = side_error<Head>(in, in.levels[p.level], centre, g.target[side], side, distance[side]).slope;
      store(grad + side * out.reg_stride[1], by_distance + by_dfl * slope);
      continue;
    }
    const TwoBins<A> b = head_bins<Head>(centre, g.target[side], side, static_cast<int>(in.reg_max));
    for (int j = 0; j < logits.bins; ++j) {
      const A probability = exponential[side][j] / softmax[side].total;
      A value = by_distance * softmax[side].mean_gradient(j, probability);
      if (b.counted) value += by_dfl * two_bin_gradient(b, j, probability);
      if (is_beyond(logits.raw(side, j))) value = 0;
      store(grad + (int64_t(side) * logits.bins + j) * out.reg_stride[1], value);
    }
  }
}

}  // namespace gfl::cpu
