// SPDX-License-Identifier: Apache-2.0
// The losses of heads on the CPU: one pass over the positives and one over the logits, in either layout.
//
//   cls, reg  maps of the levels  dtype  read      labels, matched [images, locations] int64 read
//   gradients of both kinds       dtype  write     gt_boxes        [images, gts, 4]    A     read
// The logits are read in place: a tile of evenly spaced locations is computed as background, with β = 2 by the vector
// code of simd/background.h, and then what belongs to positives is corrected. The classes of a location are summed in
// A, everything else in order in double. The bounds of chunks depend on the shapes only, so the results are the same
// bits at any number of threads.
#include "gfl/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "head_positives.h"
#include "head_tile.h"
#include "isa.h"
#include "terms/gfl_loss.h"
#include "terms/scalar.h"
#include "terms/score.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void head_background(HeadLossKind kind, DType dtype, HeadTile<const void> in, int64_t count,
                                         int64_t classes, float scale, float* sums, HeadTile<void> out))
GFL_DECLARE_PER_ISA(float head_background_without(HeadLossKind kind, DType dtype, const void* cls, int64_t channel,
                                                  int64_t classes, int64_t label))
}  // namespace gfl

namespace gfl::cpu {
namespace {

constexpr int64_t kBlock = kHeadTile;  // locations
constexpr int64_t kPositivesPerChunk = 16;

// Locations [begin, end) of one level of one image, in row-major order.
struct HeadBlock { int64_t image, level, begin, end; };

// ---- logits ----

template <class T, class M>
HeadTile<T> tile_at(M* map, const int64_t (&stride)[4], int64_t image, int64_t width, int64_t cell) {
  if (map == nullptr) return {nullptr, 0, 0};
  return {static_cast<T*>(map) + element(stride, image, 0, cell / width, cell % width), stride[3], stride[1]};
}

// A tile as background: losses to `sums`, `scale` times their gradients to `out`; either may be null. The classes of a
// location are summed in order.
template <class Loss, class T, class A = acc_t<T>>
void general_background(HeadTile<const T> in, int64_t count, int64_t classes, A beta, A scale, A* sums,
                        HeadTile<T> out) {
  if (sums != nullptr) std::fill(sums, sums + count, A(0));
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const A x = load(in.data + i * in.location + c * in.channel);
      const Term<A> term = Loss::term(GeneralParams<A>{beta, A(0), A(0), false}, x, A(0));
      if (sums != nullptr) sums[i] += term.value;
      if (out.data != nullptr) store(out.data + i * out.location + c * out.channel, scale * term.grad_pred);
    }
  }
}
// The loss of a single location without that of one class.
template <class Loss, class T, class A = acc_t<T>>
A general_background_without(const T* cls, int64_t channel, int64_t classes, int64_t label, A beta) {
  A sum = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (c == label) continue;
    sum += Loss::term(GeneralParams<A>{beta, A(0), A(0), false}, load(cls + c * channel), A(0)).value;
  }
  return sum;
}

void vector_background(const HeadLossInput& of, HeadTile<const void> in, int64_t count, float scale, float* sums,
                       HeadTile<void> out) {
  GFL_BY_ISA(head_background, of.kind, of.cls_dtype, in, count, of.classes, scale, sums, out);
}
float vector_background_without(const HeadLossInput& of, const void* cls, int64_t channel, int64_t label) {
  GFL_BY_ISA(head_background_without, of.kind, of.cls_dtype, cls, channel, of.classes, label);
}

// Whether the exponent, if there is one, is that of the vector code.
template <class Loss> bool is_vectorised(const HeadLossInput& in) {
  return Loss::params == 0 || in.beta == static_cast<double>(Loss::fast_exponent);
}

template <class Loss, class T>
void background(const HeadLossInput& in, HeadTile<const T> from, int64_t count, acc_t<T> scale, acc_t<T>* sums,
                HeadTile<T> to) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (is_vectorised<Loss>(in)) {
      return vector_background(in, {from.data, from.location, from.channel}, count, scale, sums,
                               {to.data, to.location, to.channel});
    }
  }
  general_background<Loss, T>(from, count, in.classes, static_cast<acc_t<T>>(in.beta), scale, sums, to);
}

template <class Loss, class T>
acc_t<T> background_without(const HeadLossInput& in, const T* cls, int64_t channel, int64_t label) {
  if constexpr (sizeof(T) < sizeof(double)) {
    if (is_vectorised<Loss>(in)) return vector_background_without(in, cls, channel, label);
  }
  return general_background_without<Loss, T>(cls, channel, in.classes, label, static_cast<acc_t<T>>(in.beta));
}

// Whether the rows of a map follow each other at the spacing of the locations.
bool rows_join(const HeadLevel& level, const int64_t (&stride)[4]) { return stride[2] == level.width * stride[3]; }

// The sum of a block's class losses, if `loss`, and its gradient, if `out.cls` is not null: everything as background
// first, then what belongs to positives or is not counted.
template <class Loss, class T>
double block_scores(const HeadLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                    const HeadBlock& block, bool loss, double scale, const HeadGradients& out) {
  using A = acc_t<T>;
  const HeadLevel& level = in.levels[block.level];
  const A beta = static_cast<A>(in.beta), factor = static_cast<A>(scale);
  const bool joined = rows_join(level, level.cls_stride) && (out.cls == nullptr || rows_join(level, out.cls_stride));

  int64_t start = block.image * in.locations;
  for (int64_t l = 0; l < block.level; ++l) start += in.levels[l].height * in.levels[l].width;
  const HeadPositive* const last = positives.data() + positives.size();
  const auto before = [](const HeadPositive& p, int64_t location) { return p.location < location; };
  const HeadPositive* next = std::lower_bound(positives.data(), last, start + block.begin, before);

  double total = 0;
  A sums[kHeadTile];
  for (int64_t begin = block.begin, end = begin; begin < block.end; begin = end) {
    end = std::min(begin + kHeadTile, block.end);
    if (!joined) end = std::min(end, (begin / level.width + 1) * level.width);
    const HeadTile<const T> from = tile_at<const T>(level.cls, level.cls_stride, block.image, level.width, begin);
    const HeadTile<T> to = tile_at<T>(out.cls, out.cls_stride, block.image, level.width, begin);
    background<Loss, T>(in, from, end - begin, factor, loss ? sums : nullptr, to);
    for (; next != last && next->location < start + end; ++next) {
      const int64_t i = next->location - start - begin;
      const T* const cls = from.data + i * from.location;
      const Term<A> own = Loss::term(GeneralParams<A>{beta, A(0), A(0), false}, load(cls + next->label * from.channel),
                                     static_cast<A>(terms[next - positives.data()].score));
      if (loss) sums[i] = background_without<Loss, T>(in, cls, from.channel, next->label) + own.value;
      if (to.data != nullptr) {
        store(to.data + i * to.location + next->label * to.channel, factor * own.grad_pred);
      }
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      if (in.labels[start + begin + i] != kHeadNotCounted) {
        if (loss) total += static_cast<double>(sums[i]);
      } else if (to.data != nullptr) {
        for (int64_t c = 0; c < in.classes; ++c) store(to.data + i * to.location + c * to.channel, A(0));
      }
    }
  }
  return total;
}

// Zeros a block of a distribution map. Zero is all zero bits in every dtype.
void clear_block(const HeadLossInput& in, const HeadBlock& block, const HeadGradients& out) {
  const HeadLevel& level = in.levels[block.level];
  const int64_t channels = 4 * (in.reg_max + 1),
                size = dispatch(in.reg_dtype, [](auto t) { return int64_t{sizeof t}; });
  const auto at = [&](int64_t channel, int64_t i) {
    const int64_t offset = element(out.reg_stride, block.image, channel, i / level.width, i % level.width);
    return static_cast<char*>(out.reg) + offset * size;
  };
  const auto clear = [&](char* to, int64_t count) { std::memset(to, 0, static_cast<size_t>(count * size)); };
  if (out.reg_stride[3] == 1 && rows_join(level, out.reg_stride)) {
    for (int64_t c = 0; c < channels; ++c) clear(at(c, block.begin), block.end - block.begin);
    return;
  }
  const bool dense = out.reg_stride[1] == 1;
  for (int64_t i = block.begin; i < block.end; ++i) {
    if (dense) clear(at(0, i), channels);
    else
      for (int64_t c = 0; c < channels; ++c) clear(at(c, i), 1);
  }
}

// ---- the whole loss ----

double number(const HeadLossInput& in, const void* value) {
  return in.cls_dtype == DType::f64 ? *static_cast<const double*>(value)
                                    : static_cast<double>(*static_cast<const float*>(value));
}
void put_number(const HeadLossInput& in, void* to, double value) {
  if (in.cls_dtype == DType::f64) *static_cast<double*>(to) = value;
  else *static_cast<float*>(to) = static_cast<float>(value);
}

// One call: the positives with their terms, and the blocks of the pass over the logits.
template <class Head> class HeadPass {
 public:
  HeadPass(const HeadLossInput& in, const ParallelFor& parallel)
      : in_(in), parallel_(parallel), positives_(positives_of(in)) {
    cut_blocks();
    terms_.resize(positives_.size());
    for_positives([this](int64_t begin, int64_t end) {
      dispatch(in_.reg_dtype, [&](auto t) {
        for (int64_t i = begin; i < end; ++i) distribution_terms<Head, decltype(t)>(in_, positives_[i], terms_[i]);
      });
      if (Head::scores_given) return;
      dispatch(in_.cls_dtype, [&](auto t) {
        for (int64_t i = begin; i < end; ++i) terms_[i].weight = largest_probability<decltype(t)>(in_, positives_[i]);
      });
    });
    for (const HeadTerms& t : terms_) weight_ += t.weight;
  }

  // The factors of the gradients if 1 arrives.
  HeadScales scales(const HeadLossScalars& scalars) const {
    const double* w = scalars.loss_weights;
    // Not std::max, which would hide a NaN.
    const double weight = weight_ < 1 ? 1 : weight_;
    const double count =
        Head::scores_given ? weight : static_cast<double>(std::max<int64_t>(positives_norm(in_, positives_), 1));
    const double cls_norm = scalars.cls_norm != nullptr ? number(in_, scalars.cls_norm) : count;
    const double box_norm = scalars.box_norm != nullptr ? number(in_, scalars.box_norm) : weight;
    return {w[0] / cls_norm, w[1] / box_norm, w[2] / box_norm};
  }

  // Losses, if `losses` is not null, and gradients, if `gradients` is not null.
  void run(const HeadScales& scales, const HeadLossOutput* losses, const HeadGradients* gradients) const {
    std::vector<double> sums(blocks_.size());
    const auto count = static_cast<int64_t>(blocks_.size());
    parallel_(count, 1, [&](int64_t begin, int64_t end) {
      dispatch(in_.cls_dtype, [&](auto t) {
        for (int64_t i = begin; i < end; ++i) {
          const HeadBlock& block = blocks_[i];
          const HeadGradients out = gradients != nullptr ? gradients[block.level] : HeadGradients{};
          if (losses != nullptr || out.cls != nullptr) {
            sums[i] = block_scores<typename Head::Score, decltype(t)>(in_, positives_, terms_.data(), block,
                                                                      losses != nullptr, scales.cls, out);
          }
          if (out.reg != nullptr) clear_block(in_, block, out);
        }
      });
    });
    if (gradients != nullptr) {
      for_positives([&](int64_t begin, int64_t end) {
        dispatch(in_.reg_dtype, [&](auto t) {
          for (int64_t i = begin; i < end; ++i) {
            const HeadGradients& out = gradients[positives_[i].level];
            if (out.reg != nullptr)
              distribution_backward<Head, decltype(t)>(in_, positives_[i], terms_[i], scales, out);
          }
        });
      });
    }
    if (losses != nullptr) put_losses(scales, sums, *losses);
  }

 private:
  void cut_blocks() {
    for (int64_t image = 0; image < in_.images; ++image) {
      for (int64_t l = 0; l < in_.level_count; ++l) {
        const int64_t cells = in_.levels[l].height * in_.levels[l].width;
        for (int64_t begin = 0; begin < cells; begin += kBlock) {
          blocks_.push_back({image, l, begin, std::min(cells, begin + kBlock)});
        }
      }
    }
  }

  void for_positives(const std::function<void(int64_t, int64_t)>& body) const {
    parallel_(static_cast<int64_t>(positives_.size()), kPositivesPerChunk, body);
  }

  void put_losses(const HeadScales& scales, const std::vector<double>& sums, const HeadLossOutput& out) const {
    double cls = 0, box = 0, dfl = 0;
    for (const double sum : sums) cls += sum;
    for (const HeadTerms& t : terms_) {
      box += t.weight * t.box;
      dfl += t.weight * t.dfl;
    }
    put_number(in_, out.cls, scales.cls * cls);
    put_number(in_, out.box, scales.box * box);
    put_number(in_, out.dfl, scales.dfl * dfl);
    put_number(in_, out.num_pos, static_cast<double>(positives_.size()));
    put_number(in_, out.box_weight, weight_);
  }

  const HeadLossInput& in_;
  const ParallelFor& parallel_;
  std::vector<HeadPositive> positives_;
  std::vector<HeadTerms> terms_;
  std::vector<HeadBlock> blocks_;
  double weight_ = 0;
};

HeadScales times(const HeadScales& scales, const HeadLossInput& in, const HeadLossGrads& grads) {
  const auto arriving = [&](const void* grad) { return grad != nullptr ? number(in, grad) : 1.0; };
  return {arriving(grads.cls) * scales.cls, arriving(grads.box) * scales.box, arriving(grads.dfl) * scales.dfl};
}

}  // namespace

void gfl_loss_forward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossOutput& out,
                      const ParallelFor& parallel) {
  dispatch_head(in, [&](auto head) {
    const HeadPass<decltype(head)> pass(in, parallel);
    pass.run(pass.scales(scalars), &out, nullptr);
  });
}

void gfl_loss_forward_and_gradient(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossOutput& out,
                                   HeadScales* scales, const HeadGradients* gradients, const ParallelFor& parallel) {
  dispatch_head(in, [&](auto head) {
    const HeadPass<decltype(head)> pass(in, parallel);
    *scales = pass.scales(scalars);
    pass.run(*scales, &out, gradients);
  });
}

void gfl_loss_finish(const HeadLossInput& in, const HeadScales* scales, const HeadLossGrads& grads,
                     const HeadGradients* gradients, const ParallelFor& parallel) {
  const HeadScales ones = times({1, 1, 1}, in, grads);
  if (ones.cls == 1 && ones.box == 1 && ones.dfl == 1) return;
  dispatch_head(in, [&](auto head) {
    HeadPass<decltype(head)>(in, parallel).run(times(*scales, in, grads), nullptr, gradients);
  });
}

void gfl_loss_backward(const HeadLossInput& in, const HeadLossScalars& scalars, const HeadLossGrads& grads,
                       const HeadGradients* gradients, const ParallelFor& parallel) {
  dispatch_head(in, [&](auto head) {
    const HeadPass<decltype(head)> pass(in, parallel);
    pass.run(times(pass.scales(scalars), in, grads), nullptr, gradients);
  });
}

void head_loss_norms(const HeadLossInput& in, const HeadNorms& norms, const ParallelFor& parallel) {
  const std::vector<HeadPositive> positives = positives_of(in);
  std::vector<double> weights(positives.size());
  parallel(static_cast<int64_t>(positives.size()), kPositivesPerChunk, [&](int64_t begin, int64_t end) {
    dispatch(in.cls_dtype, [&](auto t) {
      for (int64_t i = begin; i < end; ++i) weights[i] = largest_probability<decltype(t)>(in, positives[i]);
    });
  });
  put_number(in, norms.cls, static_cast<double>(positives_norm(in, positives)));
  put_number(in, norms.box, std::accumulate(weights.begin(), weights.end(), 0.0));
}

}  // namespace gfl::cpu
