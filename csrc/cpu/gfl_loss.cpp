// SPDX-License-Identifier: Apache-2.0
// The head's loss on the CPU: one walk over the positives, one over the logits, in either memory layout.
//
//   cls, reg  maps of the levels  dtype  read      labels, matched [images, locations] int64 read
//   gradients of both kinds       dtype  write     gt_boxes        [images, gts, 4]    A     read
// The logits of up to 64 locations come as a tile in A, so that layout and dtype are dealt with once, on the way in and
// out. All of a tile is computed as background, with β = 2 by the vector code of simd/gfl_loss.cpp, and the few
// elements that belong to positives are put right. A location's classes are summed in order in A, everything else in
// order in double. The bounds of chunks depend on shapes only: the same bits come out at any number of threads.
#include "gfl/gfl_loss.h"

#include <algorithm>
#include <cmath>

#include "focal.h"
#include "gfl_loss.h"
#include "isa.h"
#include "scalar.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void head_background_loss(float* tile, int64_t count))
GFL_DECLARE_PER_ISA(void head_background_gradient(float* tile, float scale, int64_t count))
}  // namespace gfl

namespace gfl::cpu {
namespace {

constexpr int64_t kTile = 64;          // locations
constexpr int64_t kBlock = 4 * kTile;
constexpr int64_t kTileClasses = 128;  // so that a tile of doubles is 64 KiB
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
  out.score = head_iou(g, distance, IouKind::overlap, in.legacy).value;
  out.box = head_iou(g, distance, IouKind::giou, in.legacy).value;
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
  const IouTerm<A> giou = head_iou(g, distance, IouKind::giou, in.legacy);
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

// Up to kTile locations of one level of one image, and which of them are positive.
struct Tile {
  int64_t image, begin, count;  // by row-major index in the level
  int64_t location;             // of its first, as HeadPositive counts
  const HeadPositive* first;
  const HeadPositive* last;
};

// Walks the tiles of a block: visit(level, tile).
template <class Visit>
void for_tiles(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadBlock& block,
               const Visit& visit) {
  int64_t start = block.image * in.locations;
  for (int64_t l = 0; l < block.level; ++l) start += in.levels[l].height * in.levels[l].width;
  const HeadPositive* const all = positives.data();
  const auto before = [](const HeadPositive& p, int64_t location) { return p.location < location; };
  const HeadPositive* next = std::lower_bound(all, all + positives.size(), start + block.begin, before);
  for (int64_t begin = block.begin; begin < block.end; begin += kTile) {
    Tile tile{block.image, begin, std::min(kTile, block.end - begin), start + begin, next, next};
    while (next != all + positives.size() && next->location < tile.location + tile.count) ++next;
    tile.last = next;
    visit(in.levels[block.level], tile);
  }
}

// Where the tile's locations lie in a map, and whether they lie side by side.
struct Offsets {
  int64_t at[kTile];
  bool adjacent;

  Offsets(const Tile& tile, int64_t width, const int64_t (&stride)[4]) : adjacent(true) {
    int64_t row = tile.begin / width, column = tile.begin % width;
    for (int64_t i = 0; i < tile.count; ++i) {
      at[i] = element(stride, tile.image, 0, row, column);
      adjacent = adjacent && at[i] == at[0] + i;
      if (++column == width) column = 0, ++row;
    }
  }
};

// Classes [first, first + classes) of a tile: element (location i, class c) is at i·location + (c − first)·channel. The
// layout follows that of the map, so that copies run along the memory of both.
struct TileLayout { int64_t location, channel, first, classes; };

// Copies between a map and a tile: copy(place in the map, place in the tile).
template <class Copy>
void for_elements(const Tile& tile, const TileLayout& layout, const Offsets& offsets, int64_t channel_stride,
                  const Copy& copy) {
  if (offsets.adjacent && layout.location == 1) {
    for (int64_t c = 0; c < layout.classes; ++c) {
      const int64_t from = (layout.first + c) * channel_stride + offsets.at[0], to = c * layout.channel;
      for (int64_t i = 0; i < tile.count; ++i) copy(from + i, to + i);
    }
  } else if (channel_stride == 1 && layout.channel == 1) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t from = layout.first + offsets.at[i], to = i * layout.location;
      for (int64_t c = 0; c < layout.classes; ++c) copy(from + c, to + c);
    }
  } else {
    for (int64_t i = 0; i < tile.count; ++i) {
      for (int64_t c = 0; c < layout.classes; ++c) {
        copy((layout.first + c) * channel_stride + offsets.at[i], i * layout.location + c * layout.channel);
      }
    }
  }
}

// Everything of a tile as background; kTile · classes elements.
template <class A> void background_loss(A* tile, A beta, int64_t count) {
  for (int64_t i = 0; i < count; ++i) tile[i] = qfl_term(tile[i], A(0), beta, false).value;
}
template <class A> void background_gradient(A* tile, A beta, A scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) tile[i] = scale * qfl_term(tile[i], A(0), beta, false).grad_pred;
}
void vector_loss(float* tile, int64_t count) { GFL_BY_ISA(head_background_loss, tile, count); }
void vector_gradient(float* tile, float scale, int64_t count) {
  GFL_BY_ISA(head_background_gradient, tile, scale, count);
}
void background_loss(float* tile, float beta, int64_t count) {
  if (beta == 2.0f) return vector_loss(tile, count);
  background_loss<float>(tile, beta, count);
}
void background_gradient(float* tile, float beta, float scale, int64_t count) {
  if (beta == 2.0f) return vector_gradient(tile, scale, count);
  background_gradient<float>(tile, beta, scale, count);
}

// Walks a block tile by tile. `own(logit, positive's index)` is an element of a positive at its label,
// `background(values, count)` replaces logits, and `finish(level, tile, layout, values)` takes the result.
template <class T, class Own, class Background, class Finish>
void walk(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadBlock& block, const Own& own,
          const Background& background, const Finish& finish) {
  using A = acc_t<T>;
  alignas(64) A values[kTileClasses * kTile] = {};
  A at_label[kTile];
  for_tiles(in, positives, block, [&](const HeadLevel& level, const Tile& tile) {
    const T* map = static_cast<const T*>(level.cls);
    const Offsets offsets(tile, level.width, level.cls_stride);
    for (int64_t first = 0; first < in.classes; first += kTileClasses) {
      const int64_t classes = std::min(kTileClasses, in.classes - first);
      const bool channels_last = level.cls_stride[1] == 1 && !offsets.adjacent;
      const TileLayout layout{channels_last ? classes : 1, channels_last ? 1 : kTile, first, classes};
      for_elements(tile, layout, offsets, level.cls_stride[1],
                   [&](int64_t from, int64_t to) { values[to] = load(map + from); });
      const auto for_labels = [&](const auto& visit) {
        for (const HeadPositive* p = tile.first; p != tile.last; ++p) {
          if (p->label < first || p->label >= first + classes) continue;
          const int64_t place = p->location - tile.location;
          visit(values[place * layout.location + (p->label - first) * layout.channel], at_label[place], p);
        }
      };
      for_labels([&](A& value, A& kept, const HeadPositive* p) { kept = own(value, p - positives.data()); });
      background(values, kTile * classes);
      for_labels([&](A& value, A& kept, const HeadPositive*) { value = kept; });
      finish(level, tile, layout, values);
    }
  });
}

template <class T>
double block_loss(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                  const HeadBlock& block) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  double sum = 0;
  A row[kTile];
  walk<T>(
      in, positives, block,
      [&](A x, int64_t index) { return qfl_term(x, static_cast<A>(terms[index].score), beta, false).value; },
      [&](A* values, int64_t count) { background_loss(values, beta, count); },
      [&](const HeadLevel&, const Tile& tile, const TileLayout& layout, const A* values) {
        if (layout.first == 0) std::fill(row, row + kTile, A(0));
        for (int64_t c = 0; c < layout.classes; ++c) {
          const A* at = values + c * layout.channel;
          if (layout.location == 1) {
            for (int64_t i = 0; i < kTile; ++i) row[i] += at[i];
          } else {
            for (int64_t i = 0; i < tile.count; ++i) row[i] += at[i * layout.location];
          }
        }
        if (layout.first + layout.classes < in.classes) return;
        for (int64_t i = 0; i < tile.count; ++i) {
          if (in.labels[tile.location + i] != kNotCounted) sum += static_cast<double>(row[i]);
        }
      });
  return sum;
}

template <class T>
void block_backward(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                    const HeadBlock& block, double scale, const HeadGradients& out) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta), factor = static_cast<A>(scale);
  T* const grad = static_cast<T*>(out.cls);
  walk<T>(
      in, positives, block,
      [&](A x, int64_t index) {
        return factor * qfl_term(x, static_cast<A>(terms[index].score), beta, false).grad_pred;
      },
      [&](A* values, int64_t count) { background_gradient(values, beta, factor, count); },
      [&](const HeadLevel& level, const Tile& tile, const TileLayout& layout, A* values) {
        for (int64_t i = 0; i < tile.count; ++i) {
          if (in.labels[tile.location + i] != kNotCounted) continue;
          for (int64_t c = 0; c < layout.classes; ++c) values[i * layout.location + c * layout.channel] = 0;
        }
        const Offsets offsets(tile, level.width, out.cls_stride);
        for_elements(tile, layout, offsets, out.cls_stride[1],
                     [&](int64_t to, int64_t from) { store(grad + to, values[from]); });
      });
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
    using T = decltype(t);
    for (int64_t i = begin; i < end; ++i) {
      if (sums != nullptr) sums[i] = block_loss<T>(in, positives, terms, blocks[i]);
      if (gradients != nullptr) {
        block_backward<T>(in, positives, terms, blocks[i], scale, gradients[blocks[i].level]);
      }
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
