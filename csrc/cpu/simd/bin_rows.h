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
  bool consecutive;  // kLanes rows, each the next of the one before

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
  const bool plain = v.sides == 1 && v.count_outer == 1;
  const auto in_order = [&](int64_t first, int64_t last) {
    RowCursor cursor(v, first);
    for (int64_t row = first; row < last; row += kLanes) {
      group.count = static_cast<int>(last - row < kLanes ? last - row : kLanes);
      group.consecutive = group.count == kLanes;
      if (plain && group.consecutive) {
        for (int k = 0; k < kLanes; ++k) {
          group.from[k] = data + (row + k) * v.stride_location.inner;
          group.row[k] = row + k;
        }
        body(group);
        continue;
      }
      if (plain) cursor.inner = row;
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
        group.consecutive = false;
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

// Four columns of several rows: the halves of a register, where it has two, hold different rows and are transposed each
// by itself.
#if defined(__AVX__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
using Block = float __attribute__((vector_size(4 * kBlockRows)));
using BlockIndex = int32_t __attribute__((vector_size(4 * kBlockRows)));

// Four columns of the rows 0 and 4 of `rows`; of narrow registers, of row 0.
inline Block load_block(const float* const* rows, int column) {
#if defined(__AVX__)
  const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(rows[0] + column));
  return _mm256_insertf128_ps(low, _mm_loadu_ps(rows[4] + column), 1);
#else
  Block v;
  std::memcpy(&v, rows[0] + column, sizeof v);
  return v;
#endif
}
inline void store_block(Block v, float* const* rows, int column, int count) {
  if (count <= 0) return;
#if defined(__AVX__)
  _mm_storeu_ps(rows[0] + column, _mm256_castps256_ps128(v));
  if (count > 4) _mm_storeu_ps(rows[4] + column, _mm256_extractf128_ps(v, 1));
#else
  std::memcpy(rows[0] + column, &v, sizeof v);
#endif
}

#if defined(__clang__)
#define GFL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GFL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, BlockIndex{__VA_ARGS__})
#endif
#if defined(__AVX__)
#define GFL_LOW_SINGLES 0, 8, 1, 9, 4, 12, 5, 13
#define GFL_HIGH_SINGLES 2, 10, 3, 11, 6, 14, 7, 15
#define GFL_LOW_PAIRS 0, 1, 8, 9, 4, 5, 12, 13
#define GFL_HIGH_PAIRS 2, 3, 10, 11, 6, 7, 14, 15
#else
#define GFL_LOW_SINGLES 0, 4, 1, 5
#define GFL_HIGH_SINGLES 2, 6, 3, 7
#define GFL_LOW_PAIRS 0, 1, 4, 5
#define GFL_HIGH_PAIRS 2, 3, 6, 7
#endif

inline void transpose(Block& a, Block& b, Block& c, Block& d) {
  const Block ab_low = GFL_SHUFFLE(a, b, GFL_LOW_SINGLES), ab_high = GFL_SHUFFLE(a, b, GFL_HIGH_SINGLES);
  const Block cd_low = GFL_SHUFFLE(c, d, GFL_LOW_SINGLES), cd_high = GFL_SHUFFLE(c, d, GFL_HIGH_SINGLES);
  a = GFL_SHUFFLE(ab_low, cd_low, GFL_LOW_PAIRS);
  b = GFL_SHUFFLE(ab_low, cd_low, GFL_HIGH_PAIRS);
  c = GFL_SHUFFLE(ab_high, cd_high, GFL_LOW_PAIRS);
  d = GFL_SHUFFLE(ab_high, cd_high, GFL_HIGH_PAIRS);
}
#undef GFL_SHUFFLE
#undef GFL_LOW_SINGLES
#undef GFL_HIGH_SINGLES
#undef GFL_LOW_PAIRS
#undef GFL_HIGH_PAIRS

// Calls body(first column) for blocks of four columns: the last moves back, over columns that were there before.
template <class Body> inline void for_four_columns(int bins, const Body& body) {
  for (int j = 0; j + 4 < bins; j += 4) body(j);
  body(bins - 4);
}

// Rows of `bins` floats -> tile, and back to the first `count` rows.
inline void gather_rows(const float* const (&rows)[kLanes], int bins, Lanes* tile) {
  if (bins < 4) {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < kLanes; ++k) tile[j][k] = rows[k][j];
    }
    return;
  }
  for_four_columns(bins, [&](int j) {
    for (int k = 0; k < kLanes; k += kBlockRows) {
      Block a = load_block(rows + k, j), b = load_block(rows + k + 1, j), c = load_block(rows + k + 2, j),
            d = load_block(rows + k + 3, j);
      transpose(a, b, c, d);
      std::memcpy(tile[j].at + k, &a, sizeof a);
      std::memcpy(tile[j + 1].at + k, &b, sizeof b);
      std::memcpy(tile[j + 2].at + k, &c, sizeof c);
      std::memcpy(tile[j + 3].at + k, &d, sizeof d);
    }
  });
}

inline void scatter_rows(const Lanes* tile, int bins, int count, float* const (&rows)[kLanes]) {
  if (bins < 4) {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < count; ++k) rows[k][j] = tile[j][k];
    }
    return;
  }
  for_four_columns(bins, [&](int j) {
    for (int k = 0; k < count; k += kBlockRows) {
      Block a, b, c, d;
      std::memcpy(&a, tile[j].at + k, sizeof a);
      std::memcpy(&b, tile[j + 1].at + k, sizeof b);
      std::memcpy(&c, tile[j + 2].at + k, sizeof c);
      std::memcpy(&d, tile[j + 3].at + k, sizeof d);
      transpose(a, b, c, d);
      store_block(a, rows + k, j, count - k);
      store_block(b, rows + k + 1, j, count - k - 1);
      store_block(c, rows + k + 2, j, count - k - 2);
      store_block(d, rows + k + 3, j, count - k - 3);
    }
  });
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
template <class T> inline void load_rows(const float* from, const RowGroup<T>& group, Lanes& lanes) {
  if (group.consecutive) {
    std::memcpy(&lanes, from + group.row[0], sizeof lanes);
    return;
  }
  for (int k = 0; k < kLanes; ++k) lanes[k] = from[group.row[k]];
}
template <class T> inline void store_rows(const Lanes& lanes, const RowGroup<T>& group, float* to) {
  if (group.consecutive) {
    std::memcpy(to + group.row[0], &lanes, sizeof lanes);
    return;
  }
  for (int k = 0; k < group.count; ++k) to[group.row[k]] = lanes[k];
}

// ---- softmax ----

// What BinSoftmax of common/bins.h holds, of kLanes rows.
struct BinSums {
  Lanes max, peak, total, moment;
  bool beyond;  // a logit is beyond what counts

  // The expected bin.
  void mean(Lanes& to) const { GFL_LANES(k) to[k] = peak[k] + moment[k] / total[k]; }
};

inline Floats larger_of(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
inline bool any_of(Ints condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)condition) != 0;
#else
  return (condition[0] | condition[1] | condition[2] | condition[3]) != 0;
#endif
}

// Highest logits and their bins. Without kBounded the logits count as they are, and it returns whether one is beyond what
// counts; it is only then that each has to be looked at.
template <bool kBounded> inline bool bin_peaks(const Lanes* tile, int bins, BinSums& s) {
  Floats max[kParts], peak[kParts] = {}, largest[kParts] = {};
  for (int part = 0; part < kParts; ++part) {
    max[part] = lanes_at(tile[0], part * kWidth);
    if (kBounded) max[part] = bounded(max[part]);
    else largest[part] = larger_of(absolute_of(max[part]), largest[part]);
  }
  for (int j = 1; j < bins; ++j) {
    for (int part = 0; part < kParts; ++part) {
      Floats x = lanes_at(tile[j], part * kWidth);
      if (kBounded) x = bounded(x);
      else largest[part] = larger_of(absolute_of(x), largest[part]);
      peak[part] = x > max[part] ? splat<Floats>(static_cast<float>(j)) : peak[part];
      max[part] = larger_of(x, max[part]);
    }
  }
  Ints beyond{};
  for (int part = 0; part < kParts; ++part) {
    beyond |= largest[part] > kLargestLogit;
    store_floats(max[part], s.max.at + part * kWidth);
    store_floats(peak[part], s.peak.at + part * kWidth);
  }
  return !kBounded && any_of(beyond);
}

template <bool kKeep, bool kBounded> inline void bin_exponentials(const Lanes* tile, int bins, BinSums& s, float* e) {
  // One register after the other: two at once, whose constants and sums are more than AVX2's registers, are no faster.
  for (int k = 0; k < kLanes; k += kWidth) {
    Floats total{}, moment{}, from_peak = -lanes_at(s.peak, k);
    const Floats max = lanes_at(s.max, k);
    for (int j = 0; j < bins; ++j) {
      Floats x = lanes_at(tile[j], k);
      if (kBounded) x = bounded(x);
      const Floats value = exp_of_negative(x - max);
      total += value;
      moment = multiply_add(value, from_peak, moment);
      from_peak += 1.0f;
      if (kKeep) store_floats(value, e + j * kLanes + k);
    }
    store_floats(total, s.total.at + k);
    store_floats(moment, s.moment.at + k);
  }
}

// Of the logits in a tile; the exponentials go to `e` [bins, kLanes], if they are to be kept.
template <bool kKeep> inline void bin_softmax(const Lanes* tile, int bins, BinSums& s, float* e) {
  s.beyond = bin_peaks<false>(tile, bins, s);
  if (!s.beyond) return bin_exponentials<kKeep, false>(tile, bins, s, e);
  bin_peaks<true>(tile, bins, s);
  bin_exponentials<kKeep, true>(tile, bins, s, e);
}

// The gradient by the logits: what `gradient(k)` makes of the bin and its exponential, of `e` [bins, kLanes], for the
// lanes from k on, and 0 where a logit is beyond what counts. `out` may be where `e` is.
template <class Gradient>
inline void bin_gradients(const Lanes* tile, const float* e, int bins, const BinSums& s, const Gradient& gradient,
                          Lanes* out) {
  for (int k = 0; k < kLanes; k += kWidth) {
    const auto of_bin = gradient(k);
    for (int j = 0; j < bins; ++j) {
      store_floats(of_bin(static_cast<float>(j), load_floats(e + j * kLanes + k)), out[j].at + k);
    }
  }
  if (!s.beyond) return;
  for (int j = 0; j < bins; ++j) {
    for (int k = 0; k < kLanes; k += kWidth) {
      const Ints beyond = absolute_of(lanes_at(tile[j], k)) > kLargestLogit;
      store_floats((Floats)(~beyond & (Ints)lanes_at(out[j], k)), out[j].at + k);
    }
  }
}

}  // namespace gfl::GFL_ISA
