// SPDX-License-Identifier: Apache-2.0
// Rows of bins, kLanes of them at a time, one a lane: reading them from any layout into a tile [bin][lane], the softmax
// of common/bins.h over a tile, and writing a tile of gradients back. Formulas are there.
//
// A lane does the same operations whatever the others hold and however many of them are rows: a row has the same bits
// wherever it is computed. Conv outputs are read in place: where locations lie side by side in memory, the lanes are
// neighbouring locations of one side; where bins do, blocks of 4×4 are transposed in registers.
#pragma once
#include <type_traits>

#include "gfl/rows.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {

// A kernel's inner parts, which belong into its loop whatever the compiler makes of their size: called, they would have
// their addresses and their number of bins in memory.
#define GFL_INLINE inline __attribute__((always_inline))
#define GFL_INLINED __attribute__((always_inline))  // the same of a lambda

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

// Up to kLanes rows: where each is, and its index. Lanes beyond `count` repeat the last row. Of consecutive rows that lie
// evenly spaced only the first is written down: a group of them costs next to nothing to make and to read.
template <class T> struct RowGroup {
  const T* from[kLanes];
  int64_t row[kLanes];
  int count;
  bool consecutive;  // kLanes rows, each the next of the one before
  bool spaced;       // and they lie `pitch` elements apart
  int64_t pitch;

  const T* from_at(int k) const { return spaced ? from[0] + k * pitch : from[k]; }
  int64_t row_at(int k) const { return spaced ? row[0] + k : row[k]; }
  // Of a group that is to be written down, after `count` of them were.
  void fill_up() {
    for (int k = count; k < kLanes; ++k) {
      from[k] = from[count - 1];
      row[k] = row[count - 1];
    }
    spaced = false;
  }
  void set_spaced(const T* first, int64_t first_row, int64_t step) {
    from[0] = first;
    row[0] = first_row;
    count = kLanes;
    consecutive = spaced = true;
    pitch = step;
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
  const bool even = v.count_outer == 1 && (v.sides == 1 || v.stride_location.inner == v.sides * v.stride_side);
  const int64_t pitch = v.sides == 1 ? v.stride_location.inner : v.stride_side;
  const auto in_order = [&](int64_t first, int64_t last) {
    int64_t row = first;
    for (; even && row + kLanes <= last; row += kLanes) {
      group.set_spaced(data + row * pitch, row, pitch);
      body(group);
    }
    RowCursor cursor(v, row);
    for (; row < last; row += kLanes) {
      group.count = static_cast<int>(last - row < kLanes ? last - row : kLanes);
      group.consecutive = group.count == kLanes;
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

// Calls body(bins) with a constant for the 17 bins that nearly every detector has: loops over them unroll. Functions that
// take `Bins` take an int or such a constant.
template <class Body> inline void with_bins(int64_t bins, const Body& body) {
  if (bins == 17) return body(std::integral_constant<int, 17>{});
  body(static_cast<int>(bins));
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

// Rows that lie evenly spaced: their addresses need no memory.
template <class P> struct SpacedRows {
  P first;
  int64_t pitch;
  P operator[](int k) const { return first + k * pitch; }
};

// Four columns from `low` and from `high`, rows that are four apart; of narrow registers, from `low`.
inline Block load_block(const float* low, const float* high) {
#if defined(__AVX__)
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
#else
  Block v;
  std::memcpy(&v, low, sizeof v);
  return v;
#endif
}
inline void store_block(Block v, float* low, float* high, bool to_high) {
#if defined(__AVX__)
  _mm_storeu_ps(low, _mm256_castps256_ps128(v));
  if (to_high) _mm_storeu_ps(high, _mm256_extractf128_ps(v, 1));
#else
  std::memcpy(low, &v, sizeof v);
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
template <class Bins, class Body> GFL_INLINE void for_four_columns(Bins bins, const Body& body) {
  for (int j = 0; j + 4 < bins; j += 4) body(j);
  body(bins - 4);
}

// Rows of `bins` floats -> tile, and back to the first `count` rows. Rows are pointers or SpacedRows.
template <class Rows, class Bins> GFL_INLINE void gather_rows(const Rows& rows, Bins bins, Lanes* tile) {
  if (bins < 4) {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < kLanes; ++k) tile[j][k] = rows[k][j];
    }
    return;
  }
  for_four_columns(bins, [&](int j) GFL_INLINED {
    for (int k = 0; k < kLanes; k += kBlockRows) {
      const auto block = [&](int i) GFL_INLINED {
        return load_block(rows[k + i] + j, rows[k + i + kBlockRows - 4] + j);
      };
      Block a = block(0), b = block(1), c = block(2), d = block(3);
      transpose(a, b, c, d);
      std::memcpy(tile[j].at + k, &a, sizeof a);
      std::memcpy(tile[j + 1].at + k, &b, sizeof b);
      std::memcpy(tile[j + 2].at + k, &c, sizeof c);
      std::memcpy(tile[j + 3].at + k, &d, sizeof d);
    }
  });
}

template <bool kAll, class Rows, class Bins>
GFL_INLINE void scatter_columns(const Lanes* tile, Bins bins, int count, const Rows& rows) {
  for_four_columns(bins, [&](int j) GFL_INLINED {
    for (int k = 0; k < (kAll ? kLanes : count); k += kBlockRows) {
      Block a, b, c, d;
      std::memcpy(&a, tile[j].at + k, sizeof a);
      std::memcpy(&b, tile[j + 1].at + k, sizeof b);
      std::memcpy(&c, tile[j + 2].at + k, sizeof c);
      std::memcpy(&d, tile[j + 3].at + k, sizeof d);
      transpose(a, b, c, d);
      const auto put = [&](int i, Block v) GFL_INLINED {
        const int low = k + i, high = low + kBlockRows - 4;
        if (kAll || low < count) store_block(v, rows[low] + j, rows[high] + j, kAll || high < count);
      };
      put(0, a);
      put(1, b);
      put(2, c);
      put(3, d);
    }
  });
}
template <class Rows, class Bins>
GFL_INLINE void scatter_rows(const Lanes* tile, Bins bins, int count, const Rows& rows) {
  if (bins < 4) {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < count; ++k) rows[k][j] = tile[j][k];
    }
    return;
  }
  if (count == kLanes) return scatter_columns<true>(tile, bins, count, rows);
  scatter_columns<false>(tile, bins, count, rows);
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

// Where 16-bit rows pass as floats, one after the other.
struct Staging {
  float values[kLanes * kMaxBins];
};

// Whether row k lies k · pitch after the first.
template <class T> inline bool evenly_spaced(const RowGroup<T>& group, int64_t pitch) {
  if (group.spaced) return group.pitch == pitch;
  bool even = true;
  for (int k = 1; k < kLanes; ++k) even = even && group.from[k] == group.from[0] + k * pitch;
  return even;
}

template <class T, class Bins>
GFL_INLINE void load_tile(const RowGroup<T>& group, int64_t stride_bin, Bins bins, Lanes* tile) {
  if (stride_bin == 1) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (group.spaced) {
        gather_rows(SpacedRows<const T*>{group.from[0], group.pitch}, bins, tile);
      } else {
        gather_rows(group.from, bins, tile);
      }
    } else {
      Staging staged;
      if (evenly_spaced(group, bins)) widen_row(group.from[0], kLanes * bins, staged.values);
      else for (int k = 0; k < kLanes; ++k) widen_row(group.from_at(k), bins, staged.values + k * bins);
      gather_rows(SpacedRows<const float*>{staged.values, bins}, bins, tile);
    }
  } else if (evenly_spaced(group, 1)) {
    for (int j = 0; j < bins; ++j) load_lanes(group.from[0] + j * stride_bin, kLanes, 0.0f, tile[j].at);
  } else {
    for (int j = 0; j < bins; ++j) {
      for (int k = 0; k < kLanes; ++k) tile[j][k] = load(group.from_at(k) + j * stride_bin);
    }
  }
}

// To `out` [rows, bins], contiguous.
template <class T, class Bins>
GFL_INLINE void store_tile(const Lanes* tile, const RowGroup<T>& group, Bins bins, T* out) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (group.consecutive) {
      scatter_rows(tile, bins, kLanes, SpacedRows<float*>{out + group.row[0] * bins, bins});
      return;
    }
    float* rows[kLanes];
    for (int k = 0; k < kLanes; ++k) rows[k] = out + group.row[k] * bins;
    scatter_rows(tile, bins, group.count, rows);
  } else {
    Staging staged;
    scatter_rows(tile, bins, group.count, SpacedRows<float*>{staged.values, bins});
    if (group.row_at(group.count - 1) - group.row[0] == group.count - 1) {
      narrow_row(staged.values, group.count * bins, out + group.row[0] * bins);
    } else {
      for (int k = 0; k < group.count; ++k) narrow_row(staged.values + k * bins, bins, out + group.row[k] * bins);
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

// A row's softmax, of kLanes rows: `total` is Σ exp(x − origin), `moment` Σ j·exp(x − origin). The origin is 0 where all
// logits of the row are so moderate that no exponential can run out of range, which is the rule and spares the search for
// the highest; else it is the highest logit.
struct BinSums {
  Lanes origin, total, moment;
  bool beyond;  // a logit is beyond what counts

  // The expected bin.
  void mean(Lanes& to) const { GFL_LANES(k) to[k] = moment[k] / total[k]; }
};

// Far enough from the ends of fp32's range that a gradient may be divided by such a sum.
constexpr float kModerateLogit = 30.0f;

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

// The sums of kWidth rows whose exponentials `exponential(bin)` gives, and where they are kept.
template <bool kKeep, class Bins, class Exponential>
GFL_INLINE void bin_sums(int k, Bins bins, Floats origin, BinSums& s, float* e, const Exponential& exponential) {
  Floats total{}, moment{}, bin{};
  for (int j = 0; j < bins; ++j) {
    const Floats value = exponential(j);
    total += value;
    moment = multiply_add(value, bin, moment);
    bin += 1.0f;
    if (kKeep) store_floats(value, e + j * kLanes + k);
  }
  store_floats(total, s.total.at + k);
  store_floats(moment, s.moment.at + k);
  store_floats(origin, s.origin.at + k);
}

// The exponentials of kWidth rows whose logits are moderate. Returns the largest absolute value of each row's logits,
// which says whether they are; NaN does not count.
template <bool kKeep, class Bins>
GFL_INLINE Floats moderate_exponentials(const Lanes* tile, int k, Bins bins, BinSums& s, float* e) {
  Floats extent{};
  bin_sums<kKeep>(k, bins, Floats{}, s, e, [&](int j) GFL_INLINED {
    const Floats x = lanes_at(tile[j], k);
    extent = larger_of(absolute_of(x), extent);
    return exp_of_moderate(x);
  });
  return extent;
}

// The same of any logits. The rows among them whose logits are moderate get the same bits as above.
template <bool kKeep>
[[gnu::noinline]] void any_exponentials(const Lanes* tile, int k, int bins, Floats extent, BinSums& s, float* e) {
  Floats highest = bounded(lanes_at(tile[0], k));
  for (int j = 1; j < bins; ++j) highest = larger_of(bounded(lanes_at(tile[j], k)), highest);
  const Floats origin = extent > kModerateLogit ? highest : Floats{};
  bin_sums<kKeep>(k, bins, origin, s, e, [&](int j) GFL_INLINED {
    return exp_of_negative(bounded(lanes_at(tile[j], k)) - origin);
  });
}

// Of the logits in a tile; the exponentials go to `e` [bins, kLanes], if they are to be kept.
template <bool kKeep, class Bins> GFL_INLINE void bin_softmax(const Lanes* tile, Bins bins, BinSums& s, float* e) {
  s.beyond = false;
  for (int k = 0; k < kLanes; k += kWidth) {
    const Floats extent = moderate_exponentials<kKeep>(tile, k, bins, s, e);
    if (!any_of(extent > kModerateLogit)) continue;
    any_exponentials<kKeep>(tile, k, bins, extent, s, e);
    s.beyond = s.beyond || any_of(extent > kLargestLogit);
  }
}

// The gradient by the logits: what `gradient(k)` makes of the bin and its exponential, of `e` [bins, kLanes], for the
// lanes from k on, and 0 where a logit is beyond what counts. `out` may be where `e` is.
template <class Gradient, class Bins>
GFL_INLINE void bin_gradients(const Lanes* tile, const float* e, Bins bins, const BinSums& s, const Gradient& gradient,
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
