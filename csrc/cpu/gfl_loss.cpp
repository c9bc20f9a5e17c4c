// SPDX-License-Identifier: Apache-2.0
// The head's loss on the CPU: one walk over the positives, one over the logits, in either memory layout.
//
//   cls, reg  maps of the levels  dtype  read      labels, matched [images, locations] int64 read
//   gradients of both kinds       dtype  write     gt_boxes        [images, gts, 4]    A     read
// The logits are read where they are: a tile of locations at an even pitch is computed as background, with β = 2 by the
// vector code of simd/background.h, and what belongs to positives is put right. A location's classes are summed in A,
// everything else in order in double. The bounds of chunks depend on shapes only: the same bits come out at any number of
// threads.
#include "gfl/gfl_loss.h"

#include <algorithm>
#include <cmath>

#include "terms/focal.h"
#include "terms/gfl_loss.h"
#include "head_tile.h"
#include "isa.h"
#include "terms/scalar.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void head_background(DType dtype, HeadTile<const void> in, int64_t count, int64_t classes,
                                         float scale, float* sums, HeadTile<void> out))
GFL_DECLARE_PER_ISA(float head_background_without(DType dtype, const void* cls, int64_t channel, int64_t classes,
                                                  int64_t label))
}  // namespace gfl

namespace gfl::cpu {
namespace {

constexpr int64_t kBlock = 2 * kHeadTile;
constexpr int64_t kNotCounted = -2;

int64_t element(const int64_t (&stride)[4], int64_t image, int64_t channel, int64_t row, int64_t column) {
  return image * stride[0] + channel * stride[1] + row * stride[2] + column * stride[3];
}

// ---- positives ----

// Largest class probability.
template <class T> double largest_probability(const GflLossInput& in, const HeadPositive& p) {
  const HeadLevel& level = in.levels[p.level];
  const T* x = static_cast<const T*>(level.cls) + element(level.cls_stride, p.image, 0, p.row, p.column);
  acc_t<T> largest = load(x);
  for (int64_t c = 1; c < in.classes; ++c) {
    const acc_t<T> v = load(x + c * level.cls_stride[1]);
    if (v > largest || v != v) largest = v;
  }
  return static_cast<double>(bernoulli_from_logit<acc_t<T>>(largest, 0).p);
}

template <class T> struct Distributions {
  using A = acc_t<T>;
  const T* data;
  int64_t stride;  // between bins; a side's bins follow those of the side before
  int bins;

  Distributions(const GflLossInput& in, const HeadPositive& p) {
    const HeadLevel& level = in.levels[p.level];
    data = static_cast<const T*>(level.reg) + element(level.reg_stride, p.image, 0, p.row, p.column);
    stride = level.reg_stride[1];
    bins = static_cast<int>(in.reg_max + 1);
  }
  A raw(int side, int j) const { return load(data + (int64_t(side) * bins + j) * stride); }
  A operator()(int side, int j) const { return bounded_logit(raw(side, j)); }
};

template <class T> void distribution_terms(const GflLossInput& in, const HeadPositive& p, HeadTerms& out) {
  using A = acc_t<T>;
  const HeadGeometry<A> g = head_geometry<A>(in, in.levels[p.level], p);
  const Distributions<T> logits(in, p);
  A distance[4], dfl = 0;
  for (int side = 0; side < 4; ++side) {
    const auto logit = [&](int j) { return logits(side, j); };
    const BinSoftmax<A> s = bin_softmax<A>(logits.bins, logit);
    const TwoBins<A> b = head_bins(g, side, static_cast<int>(in.reg_max));
    distance[side] = s.mean();
    if (b.counted) dfl += two_bin_loss(b, two_bin_entropy(s, b, logit));
  }
  out.score = head_iou(g, distance, iou_kind::overlap{}, in.legacy).value;
  out.box = head_iou(g, distance, iou_kind::giou{}, in.legacy).value;
  out.dfl = dfl / A(4);
}

template <class T>
void distribution_backward(const GflLossInput& in, const HeadPositive& p, const HeadTerms& terms,
                           const HeadScales& scales, const HeadGradients& out) {
  using A = acc_t<T>;
  const HeadGeometry<A> g = head_geometry<A>(in, in.levels[p.level], p);
  const Distributions<T> logits(in, p);
  T* grad = static_cast<T*>(out.reg) + element(out.reg_stride, p.image, 0, p.row, p.column);
  A exponential[4][kMaxBins], distance[4];
  BinSoftmax<A> softmax[4];
  for (int side = 0; side < 4; ++side) {
    softmax[side] = bin_softmax<A>(
        logits.bins, [&](int j) { return logits(side, j); }, [&](int j, A e) { exponential[side][j] = e; });
    distance[side] = softmax[side].mean();
  }
  const IouTerm<A> giou = head_iou(g, distance, iou_kind::giou{}, in.legacy);
  const A by_box = static_cast<A>(scales.box * terms.weight), by_dfl = static_cast<A>(scales.dfl * terms.weight / 4);
  for (int side = 0; side < 4; ++side) {
    const A by_distance = by_box * (side < 2 ? -giou.grad_pred[side] : giou.grad_pred[side]);
    const TwoBins<A> b = head_bins(g, side, static_cast<int>(in.reg_max));
    for (int j = 0; j < logits.bins; ++j) {
      const A probability = exponential[side][j] / softmax[side].total;
      A value = by_distance * softmax[side].mean_gradient(j, probability);
      if (b.counted) value += by_dfl * two_bin_gradient(b, j, probability);
      if (is_beyond(logits.raw(side, j))) value = 0;
      store(grad + (int64_t(side) * logits.bins + j) * out.reg_stride[1], value);
    }
  }
}

// ---- logits ----

template <class T, class M>
HeadTile<T> tile_at(M* map, const int64_t (&stride)[4], int64_t image, int64_t width, int64_t cell) {
  if (map == nullptr) return {nullptr, 0, 0};
  return {static_cast<T*>(map) + element(stride, image, 0, cell / width, cell % width), stride[3], stride[1]};
}

// A tile as background: losses to `sums`, `scale` times their gradients to `out`; either may be null. The classes of a
// location are added up in order. Then the same of a single location but for one class, without a gradient.
template <class T, class A = acc_t<T>>
void any_background(HeadTile<const T> in, int64_t count, int64_t classes, A beta, A scale, A* sums, HeadTile<T> out) {
  if (sums != nullptr) std::fill(sums, sums + count, A(0));
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const Term<A> term = qfl_term(load(in.data + i * in.location + c * in.channel), A(0), beta, false);
      if (sums != nullptr) sums[i] += term.value;
      if (out.data != nullptr) store(out.data + i * out.location + c * out.channel, scale * term.grad_pred);
    }
  }
}
template <class T, class A = acc_t<T>>
A any_background_without(const T* cls, int64_t channel, int64_t classes, int64_t label, A beta) {
  A sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (c != label) sum += qfl_term(load(cls + c * channel), A(0), beta, false).value;
  }
  return sum;
}

void vector_background(DType dtype, HeadTile<const void> in, int64_t count, int64_t classes, float scale, float* sums,
                       HeadTile<void> out) {
  GFL_BY_ISA(head_background, dtype, in, count, classes, scale, sums, out);
}
float vector_background_without(DType dtype, const void* cls, int64_t channel, int64_t classes, int64_t label) {
  GFL_BY_ISA(head_background_without, dtype, cls, channel, classes, label);
}

template <class T>
void background(const GflLossInput& in, HeadTile<const T> from, int64_t count, acc_t<T> scale, acc_t<T>* sums,
                HeadTile<T> to) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (in.beta == 2.0) {
      return vector_background(in.cls_dtype, {from.data, from.location, from.channel}, count, in.classes, scale, sums,
                               {to.data, to.location, to.channel});
    }
  }
  any_background<T>(from, count, in.classes, static_cast<acc_t<T>>(in.beta), scale, sums, to);
}

template <class T>
acc_t<T> background_without(const GflLossInput& in, const T* cls, int64_t channel, int64_t label) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (in.beta == 2.0) return vector_background_without(in.cls_dtype, cls, channel, in.classes, label);
  }
  return any_background_without<T>(cls, channel, in.classes, label, static_cast<acc_t<T>>(in.beta));
}

// Σ QFL of a block, if `loss`, and its gradient, if `gradients` is not null: everything as background first, then right
// what belongs to positives and what is not counted.
template <class T>
double block_scores(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                    const HeadBlock& block, bool loss, double scale, const HeadGradients* gradients) {
  using A = acc_t<T>;
  const HeadLevel& level = in.levels[block.level];
  const A beta = static_cast<A>(in.beta), factor = static_cast<A>(scale);
  static const HeadGradients none{};
  const HeadGradients& out = gradients != nullptr ? gradients[block.level] : none;
  // One row of the map follows the other at the pitch of the locations.
  const auto rows_run_on = [&](const int64_t (&stride)[4]) { return stride[2] == level.width * stride[3]; };
  const bool run_on = rows_run_on(level.cls_stride) && (gradients == nullptr || rows_run_on(out.cls_stride));

  int64_t start = block.image * in.locations;
  for (int64_t l = 0; l < block.level; ++l) start += in.levels[l].height * in.levels[l].width;
  const HeadPositive* const last = positives.data() + positives.size();
  const auto before = [](const HeadPositive& p, int64_t location) { return p.location < location; };
  const HeadPositive* next = std::lower_bound(positives.data(), last, start + block.begin, before);

  double total = 0;
  A sums[kHeadTile];
  for (int64_t begin = block.begin, end = begin; begin < block.end; begin = end) {
    end = std::min(begin + kHeadTile, block.end);
    if (!run_on) end = std::min(end, (begin / level.width + 1) * level.width);
    const HeadTile<const T> from = tile_at<const T>(level.cls, level.cls_stride, block.image, level.width, begin);
    const HeadTile<T> to = tile_at<T>(out.cls, out.cls_stride, block.image, level.width, begin);
    background<T>(in, from, end - begin, factor, loss ? sums : nullptr, to);
    for (; next != last && next->location < start + end; ++next) {
      const int64_t i = next->location - start - begin;
      const T* const cls = from.data + i * from.location;
      const Term<A> own = qfl_term(load(cls + next->label * from.channel),
                                   static_cast<A>(terms[next - positives.data()].score), beta, false);
      if (loss) sums[i] = background_without<T>(in, cls, from.channel, next->label) + own.value;
      if (to.data != nullptr) {
        store(to.data + i * to.location + next->label * to.channel, factor * own.grad_pred);
      }
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      if (in.labels[start + begin + i] != kNotCounted) {
        if (loss) total += static_cast<double>(sums[i]);
      } else if (to.data != nullptr) {
        for (int64_t c = 0; c < in.classes; ++c) store(to.data + i * to.location + c * to.channel, A(0));
      }
    }
  }
  return total;
}

}  // namespace

std::vector<HeadPositive> gfl_loss_positives(const GflLossInput& in) {
  std::vector<HeadPositive> found;
  int64_t location = 0;
  for (int64_t image = 0; image < in.images; ++image) {
    for (int64_t l = 0; l < in.level_count; ++l) {
      const HeadLevel& level = in.levels[l];
      for (int64_t i = 0; i < level.height * level.width; ++i, ++location) {
        const int64_t label = in.labels[location], slot = in.matched[location];
        if (label < 0 || label >= in.classes || slot < 0 || slot >= in.gts) continue;
        found.push_back({image, l, i / level.width, i % level.width, location, label, slot});
      }
    }
  }
  return found;
}

std::vector<HeadBlock> gfl_loss_blocks(const GflLossInput& in) {
  std::vector<HeadBlock> blocks;
  for (int64_t image = 0; image < in.images; ++image) {
    for (int64_t l = 0; l < in.level_count; ++l) {
      const int64_t cells = in.levels[l].height * in.levels[l].width;
      for (int64_t begin = 0; begin < cells; begin += kBlock) {
        blocks.push_back({image, l, begin, std::min(cells, begin + kBlock)});
      }
    }
  }
  return blocks;
}

void gfl_loss_terms(const GflLossInput& in, const HeadPositive* positives, HeadTerms* terms, int64_t begin,
                    int64_t end) {
  dispatch(in.reg_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) distribution_terms<decltype(t)>(in, positives[i], terms[i]);
  });
  dispatch(in.cls_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) terms[i].weight = largest_probability<decltype(t)>(in, positives[i]);
  });
}

void gfl_loss_scores(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                     const HeadBlock* blocks, double* sums, double scale, const HeadGradients* gradients, int64_t begin,
                     int64_t end) {
  dispatch(in.cls_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) {
      const double sum =
          block_scores<decltype(t)>(in, positives, terms, blocks[i], sums != nullptr, scale, gradients);
      if (sums != nullptr) sums[i] = sum;
    }
  });
}

void gfl_loss_terms_backward(const GflLossInput& in, const HeadPositive* positives, const HeadTerms* terms,
                             const HeadScales& scales, const HeadGradients* gradients, int64_t begin, int64_t end) {
  dispatch(in.reg_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) {
      distribution_backward<decltype(t)>(in, positives[i], terms[i], scales, gradients[positives[i].level]);
    }
  });
}

}  // namespace gfl::cpu
