// SPDX-License-Identifier: Apache-2.0
// Rows of bins, kLanes of them at a time, one a lane: reading them from any layout into a tile [bin][lane], the softmax
// of common/bins.h over a tile, and writing a tile of gradients back. Formulas are there.
//
// A lane does the same operations whatever the others hold and however many of them are rows: a row has the same bits
// wherever it is computed. Conv outputs are read in place: where locations lie side by side in memory, the lanes are
// neighbouring locations of one side; where bins do, blocks of 4×4 are transposed in registers.
#pragma once
#include "gfl/rows.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {

struct alignas(64) Lanes {
  float at[kLanes];
  float& operator[](int j) { return at[j]; }
  float operator[](int j) const { return at[j]; }
};

constexpr float kLargestLogit = std::numeric_limits<float>::max() / 4.0f;

template <class F> inline F bounded(F x) { return at_least(-kLargestLogit, at_most(kLargestLogit, x)); }

// The kWidth lanes from k on.
inline Floats lanes_at(const Lanes& lanes, int k) { return load_floats(lanes.at + k); }

// ---- rows in memory ----

// Up to kLanes rows: where each is, and its index. Lanes beyond `count` repeat the last row.
template <class T> struct RowGroup {
  const T* from[kLanes];
  int64_t row[kLanes];
  int count;

  void fill_up() {
    for (int k = count; k < kLanes; ++k) {
      from[k] = from[count - 1];
      row[k] = row[count - 1];
    }
  }
};

// Steps from row to row without a division at each.
struct RowCursor {
  const BinRows& rows;
  int64_t outer, inner, side;

  RowCursor(const BinRows& v, int64_t row) : rows(v) {
    const int64_t location = row / v.sides;
    side = row - location * v.sides;
    outer = location / v.count_inner;
    inner = location - outer * v.count_inner;
  }
  int64_t offset() const {
    return outer * rows.stride_location.outer + inner * rows.stride_location.inner + side * rows.stride_side;
  }
  void next_row() {
    if (++side < rows.sides) return;
    side = 0;
    next_location();
  }
  void next_location() {
    if (++inner < rows.count_inner) return;
    inner = 0;
    ++outer;
  }
};

// Neighbouring locations that are read side by side: as many cache lines of every bin's plane as it takes to be quick.
constexpr int kNeighbours = 8 * kLanes;

// Calls body(group) for all rows [begin, end), in an order that suits the layout.
template <class T, class Body> void for_row_groups(const BinRows& v, int64_t begin, int64_t end, const Body& body) {
  const T* data = static_cast<const T*>(v.data);
  RowGroup<T> group;
  const auto in_order = [&](int64_t first, int64_t last) {
    RowCursor cursor(v, first);
    for (int64_t row = first; row < last; row += kLanes) {
      group.count = static_cast<int>(last - row < kLanes ? last - row : kLanes);
      for (int k = 0; k < group.count; ++k, cursor.next_row()) {
        group.from[k] = data + cursor.offset();
        group.row[k] = row + k;
      }
      group.fill_up();
      body(group);
    }
  };
  if (begin >= end) return;
  const int64_t first = (begin + v.sides - 1) / v.sides, last = end / v.sides;
  if (v.sides == 1 || v.stride_bin == 1 || v.stride_location.inner != 1 || first >= last) {
    in_order(begin, end);
    return;
  }
  if (begin < first * v.sides) in_order(begin, first * v.sides);
  RowCursor cursor(v, first * v.sides);
  for (int64_t block = first; block < last; block += kNeighbours) {
    const int many = static_cast<int>(last - block < kNeighbours ? last - block : kNeighbours);
    const T* side_0[kNeighbours];
    for (int i = 0; i < many; ++i, cursor.next_location()) side_0[i] = data + cursor.offset();
    for (int64_t side = 0; side < v.sides; ++side) {
      for (int start = 0; start < many; start += kLanes) {
        group.count = many - start < kLanes ? many - start : kLanes;
        for (int k = 0; k < group.count; ++k) {
          group.from[k] = side_0[start + k] + side * v.stride_side;
          group.row[k] = (block + start + k) * v.sides + side;
        }
        group.fill_up();
        body(group);
      }
    }
  }
  if (last * v.sides < end) in_order(last * v.sides, end);
}

// ---- between memory and a tile ----

using Four = float __attribute__((vector_size(16)));
using FourIndex = int32_t __attribute__((vector_size(16)));

inline Four load_four(const float* from) {
  Four v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void store_four(Four v, float* to) { std::memcpy(to, &v, sizeof v); }

#if defined(__clang__)
#define GFL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GFL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourIndex{__VA_ARGS__})
#endif

inline void transpose(Four& a, Four& b, Four& c, Four& d) {
  const Four ab_low = GFL_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = GFL_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd_low = GFL_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = GFL_SHUFFLE(c, d, 2, 6, 3, 7);
  a = GFL_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  b = GFL_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  c = GFL_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  d = GFL_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}
#undef GFL_SHUFFLE

// Rows of `bins` floats -> tile, and back to the first `count` rows.
inline void gather_rows(const float* const (&rows)[kLanes], int bins, Lanes* tile) {
  int j = 0;
  for (; j + 4 <= bins; j += 4) {
    for (int k = 0; k < kLanes; k += 4) {
      Four a = load_four(rows[k] + j), b = load_four(rows[k + 1] + j), c = load_four(rows[k + 2] + j),
           d = load_four(rows[k + 3] + j);
      transpose(a, b, c, d);
      store_four(a, tile[j].at + k);
      store_four(b, tile[j + 1].at + k);
      store_four(c, tile[j + 2].at + k);
      store_four(d, tile[j + 3].at + k);
    }
  }
  for (; j < bins; ++j) {
    for (int k = 0; k < kLanes; ++k) tile[j][k] = rows[k][j];
  }
}

inline void scatter_rows(const Lanes* tile, int bins, int count, float* const (&rows)[kLanes]) {
  int j = 0;
  for (; j + 4 <= bins; j += 4) {
    for (int k = 0; k < count; k += 4) {
      Four v[4] = {load_four(tile[j].at + k), load_four(tile[j + 1].at + k), load_four(tile[j + 2].at + k),
                   load_four(tile[j + 3].at + k)};
      transpose(v[0], v[1], v[2], v[3]);
      const int here = count - k < 4 ? count - k : 4;
      for (int i = 0; i < here; ++i) store_four(v[i], rows[k + i] + j);
    }
  }
  for (; j < bins; ++j) {
    for (int k = 0; k < count; ++k) rows[k][j] = tile[j][k];
  }
}

// `count` elements of any dtype, and floats.
template <class T> inline void widen_row(const T* from, int count, float* to) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) load_lanes(from + j, kLanes, 0.0f, to + j);
  for (; j < count; ++j) to[j] = load(from + j);
}
template <class T> inline void narrow_row(const float* from, int count, T* to) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) store_lanes(from + j, kLanes, to + j);
  for (; j < count; ++j) store(to + j, from[j]);
}

// Where 16-bit rows pass as floats, row by row.
struct Staging {
  float values[kLanes * kMaxBins];
  float* row[kLanes];
  explicit Staging(int bins) {
    for (int k = 0; k < kLanes; ++k) row[k] = values + k * bins;
  }
};

// Whether element k of the pointers lies k · pitch after the first.
template <class P> inline bool evenly_spaced(P const (&at)[kLanes], int64_t pitch) {
  bool even = true;
  for (int k = 1; k < kLanes; ++k) even = even && at[k] == at[0] + k * pitch;
  return even;
}

template <class T> void load_tile(const RowGroup<T>& group, int64_t stride_bin, int bins, Lanes* tile) {
  if (stride_bin == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      gather_rows(group.from, bins, tile);
    } else {
      Staging staged(bins);
      if (evenly_spaced(group.from, bins)) widen_row(group.from[0], kLanes * bins, staged.values);
      else for (int k = 0; k < kLanes; ++k) widen_row(group.from[k], bins, staged.row[k]);
      const float* rows[kLanes];
      for (int k = 0; k < kLanes; ++k) rows[k] = staged.row[k];
      gather_rows(rows, bins, tile);
    }
  } else if (evenly_spaced(group.from, 1)) {
    for (int j = 0; j < bins; ++j) load_lanes(group.from[0] + j * stride_bin, kLanes, 0.0f, tile[j].at);
  } else {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < kLanes; ++k) tile[j][k] = load(group.from[k] + j * stride_bin);
    }
  }
}

// To `out` [rows, bins], contiguous.
template <class T> void store_tile(const Lanes* tile, const RowGroup<T>& group, int bins, T* out) {
  if constexpr (sizeof(T) == sizeof(float)) {
    float* rows[kLanes];
    for (int k = 0; k < kLanes; ++k) rows[k] = out + group.row[k] * bins;
    scatter_rows(tile, bins, group.count, rows);
  } else {
    Staging staged(bins);
    scatter_rows(tile, bins, group.count, staged.row);
    if (group.row[group.count - 1] - group.row[0] == group.count - 1) {
      narrow_row(staged.values, group.count * bins, out + group.row[0] * bins);
    } else {
      for (int k = 0; k < group.count; ++k) narrow_row(staged.row[k], bins, out + group.row[k] * bins);
    }
  }
}

// A number of each row, and back.
inline void load_rows(const float* from, const int64_t (&row)[kLanes], Lanes& lanes) {
  for (int k = 0; k < kLanes; ++k) lanes[k] = from[row[k]];
}
inline void store_rows(const Lanes& lanes, const int64_t (&row)[kLanes], int count, float* to) {
  for (int k = 0; k < count; ++k) to[row[k]] = lanes[k];
}

// ---- softmax ----

// What BinSoftmax of common/bins.h holds, of kLanes rows.
struct BinSums {
  Lanes max, peak, total, moment;

  // The expected bin.
  void mean(Lanes& to) const { GFL_LANES(k) to[k] = peak[k] + moment[k] / total[k]; }
};

// Of the logits in a tile; the exponentials go to `e`, if they are to be kept.
template <bool kKeep> inline void bin_softmax(const Lanes* tile, int bins, BinSums& s, Lanes* e) {
  for (int k = 0; k < kLanes; k += kWidth) {
    Floats max = bounded(lanes_at(tile[0], k)), peak{}, total{}, moment{};
    for (int j = 1; j < bins; ++j) {
      const Floats x = bounded(lanes_at(tile[j], k));
      peak = x > max ? splat<Floats>(static_cast<float>(j)) : peak;
      max = x > max ? x : max;
    }
    for (int j = 0; j < bins; ++j) {
      const Floats value = exp_of_negative(bounded(lanes_at(tile[j], k)) - max);
      total += value;
      moment += value * (static_cast<float>(j) - peak);
      if (kKeep) store_floats(value, e[j].at + k);
    }
    store_floats(max, s.max.at + k);
    store_floats(peak, s.peak.at + k);
    store_floats(total, s.total.at + k);
    store_floats(moment, s.moment.at + k);
  }
}

// The gradient by the logits, over the exponentials in place: what `gradient(k)` makes of the bin and its exponential
// for the lanes from k on, and 0 where a logit is beyond what counts.
template <class Gradient> inline void bin_gradients(const Lanes* tile, Lanes* e, int bins, const Gradient& gradient) {
  for (int k = 0; k < kLanes; k += kWidth) {
    const auto of_bin = gradient(k);
    for (int j = 0; j < bins; ++j) {
      const Floats value = of_bin(static_cast<float>(j), lanes_at(e[j], k));
      const Ints beyond = absolute_of(lanes_at(tile[j], k)) > kLargestLogit;
      store_floats((Floats)(~beyond & (Ints)value), e[j].at + k);
    }
  }
}

}  // namespace gfl::GFL_ISA
