// SPDX-License-Identifier: Apache-2.0
// The head's loss on the CPU: one walk over the positives, one over the logits, in either memory layout.
//
//   cls, reg  maps of the levels  dtype  read      labels, matched [images, locations] int64 read
//   gradients of both kinds       dtype  write     gt_boxes        [images, gts, 4]    A     read
// The logits of a block come as a tile, classes by locations, so that layout and dtype are dealt with once, on the way in
// and out. A location's classes are summed in order in A, everything else in order in double: chunks are pieces whose
// bounds depend on shapes only, so that the same bits come out at any number of threads.
#include "gfl/gfl_loss.h"

#include <algorithm>
#include <cmath>

#include "focal.h"
#include "gfl_loss.h"
#include "scalar.h"

namespace gfl::cpu {
namespace {

constexpr int64_t kTile = 64;          // locations
constexpr int64_t kBlock = 4 * kTile;
constexpr int64_t kTileClasses = 128;  // so that a tile of doubles is 64 KiB
constexpr int64_t kNotCounted = -2;

int64_t element(const int64_t (&stride)[4], int64_t image, int64_t channel, int64_t row, int64_t column) {
  return image * stride[0] + channel * stride[1] + row * stride[2] + column * stride[3];
}

// Quality focal loss against 0 of n logits.
template <class A> void background_loss(const A* x, A beta, int64_t n, A* value) {
  for (int64_t i = 0; i < n; ++i) value[i] = qfl_term(x[i], A(0), beta, false).value;
}

// Replaces n logits by the scaled derivative of that.
template <class A> void background_gradient(A* x, A beta, A scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = scale * qfl_term(x[i], A(0), beta, false).grad_pred;
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
  A exponential[4][kMaxBins], total[4], distance[4];
  for (int side = 0; side < 4; ++side) {
    const BinSoftmax<A> s = bin_softmax<A>(
        logits.bins, [&](int j) { return logits(side, j); }, [&](int j, A e) { exponential[side][j] = e; });
    total[side] = s.total;
    distance[side] = s.mean();
  }
  const IouTerm<A> giou = head_iou(g, distance, IouKind::giou, in.legacy);
  const A by_box = static_cast<A>(scales.box * terms.weight), by_dfl = static_cast<A>(scales.dfl * terms.weight / 4);
  for (int side = 0; side < 4; ++side) {
    const A by_distance = by_box * (side < 2 ? -giou.grad_pred[side] : giou.grad_pred[side]);
    const TwoBins<A> b = head_bins(g, side, static_cast<int>(in.reg_max));
    for (int j = 0; j < logits.bins; ++j) {
      const A probability = exponential[side][j] / total[side];
      A value = by_distance * probability * (A(j) - distance[side]);
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

// Visits the elements of a tile in the order that suits the map's layout: visit(place in the map, place in the tile).
template <class Visit>
void for_elements(const Tile& tile, const Offsets& offsets, int64_t channel_stride, int64_t first, int64_t classes,
                  const Visit& visit) {
  if (offsets.adjacent) {
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t row = (first + c) * channel_stride + offsets.at[0];
      for (int64_t i = 0; i < tile.count; ++i) visit(row + i, c * kTile + i);
    }
    return;
  }
  for (int64_t i = 0; i < tile.count; ++i) {
    for (int64_t c = 0; c < classes; ++c) visit((first + c) * channel_stride + offsets.at[i], c * kTile + i);
  }
}

// What the positives of a tile have in the classes [first, first + classes): visit(index of the positive, place in the tile).
template <class Visit>
void for_labels(const Tile& tile, const HeadPositive* all, int64_t first, int64_t classes, const Visit& visit) {
  for (const HeadPositive* p = tile.first; p != tile.last; ++p) {
    if (p->label < first || p->label >= first + classes) continue;
    visit(p - all, (p->label - first) * kTile + (p->location - tile.location));
  }
}

template <class T>
double block_loss(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                  const HeadBlock& block) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(in.beta);
  alignas(64) A logits[kTileClasses * kTile];
  double sum = 0;
  for_tiles(in, positives, block, [&](const HeadLevel& level, const Tile& tile) {
    const T* map = static_cast<const T*>(level.cls);
    const Offsets offsets(tile, level.width, level.cls_stride);
    A row[kTile] = {};
    for (int64_t first = 0; first < in.classes; first += kTileClasses) {
      const int64_t classes = std::min(kTileClasses, in.classes - first);
      for_elements(tile, offsets, level.cls_stride[1], first, classes,
                   [&](int64_t from, int64_t to) { logits[to] = load(map + from); });
      const auto positive = [&](int64_t index, int64_t at) {
        return qfl_term(logits[at], static_cast<A>(terms[index].score), beta, false).value;
      };
      A values[kTile];
      for (int64_t c = 0; c < classes; ++c) {
        background_loss(logits + c * kTile, beta, tile.count, values);
        for_labels(tile, positives.data(), first + c, 1,
                   [&](int64_t index, int64_t at) { values[at] = positive(index, c * kTile + at); });
        for (int64_t i = 0; i < tile.count; ++i) row[i] += values[i];
      }
    }
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
  alignas(64) A tile_values[kTileClasses * kTile];
  T* const grad = static_cast<T*>(out.cls);
  for_tiles(in, positives, block, [&](const HeadLevel& level, const Tile& tile) {
    const T* map = static_cast<const T*>(level.cls);
    const Offsets offsets(tile, level.width, level.cls_stride), grad_offsets(tile, level.width, out.cls_stride);
    for (int64_t first = 0; first < in.classes; first += kTileClasses) {
      const int64_t classes = std::min(kTileClasses, in.classes - first);
      for_elements(tile, offsets, level.cls_stride[1], first, classes,
                   [&](int64_t from, int64_t to) { tile_values[to] = load(map + from); });
      for (int64_t c = 0; c < classes; ++c) {
        A* values = tile_values + c * kTile;
        A own[kTile];
        for_labels(tile, positives.data(), first + c, 1, [&](int64_t index, int64_t at) {
          own[at] = factor * qfl_term(values[at], static_cast<A>(terms[index].score), beta, false).grad_pred;
        });
        background_gradient(values, beta, factor, tile.count);
        for_labels(tile, positives.data(), first + c, 1, [&](int64_t, int64_t at) { values[at] = own[at]; });
      }
      for (int64_t i = 0; i < tile.count; ++i) {
        if (in.labels[tile.location + i] != kNotCounted) continue;
        for (int64_t c = 0; c < classes; ++c) tile_values[c * kTile + i] = 0;
      }
      for_elements(tile, grad_offsets, out.cls_stride[1], first, classes,
                   [&](int64_t to, int64_t from) { store(grad + to, tile_values[from]); });
    }
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

void gfl_loss_terms(const GflLossInput& in, const HeadPositive* positives, HeadTerms* terms, int64_t begin, int64_t end) {
  dispatch(in.reg_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) distribution_terms<decltype(t)>(in, positives[i], terms[i]);
  });
  dispatch(in.cls_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) terms[i].weight = largest_probability<decltype(t)>(in, positives[i]);
  });
}

void gfl_loss_scores(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                     const HeadBlock* blocks, double* sums, int64_t begin, int64_t end) {
  dispatch(in.cls_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) sums[i] = block_loss<decltype(t)>(in, positives, terms, blocks[i]);
  });
}

void gfl_loss_scores_backward(const GflLossInput& in, const std::vector<HeadPositive>& positives, const HeadTerms* terms,
                              const HeadBlock* blocks, double scale, const HeadGradients* gradients, int64_t begin,
                              int64_t end) {
  dispatch(in.cls_dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) {
      block_backward<decltype(t)>(in, positives, terms, blocks[i], scale, gradients[blocks[i].level]);
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
