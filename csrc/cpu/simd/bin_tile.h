// SPDX-License-Identifier: Apache-2.0
// Between rows of bins in memory and a tile [bin][lane]: rows whose bins lie side by side are transposed in registers,
// in blocks of 4×4; planes of bins are copied as they lie.
#pragma once
#include <type_traits>

#include "row_groups.h"

namespace gfl::GFL_ISA {

// Calls body(bins) with a constant for the 17 bins of nearly every detector, so that loops over them unroll, else with
// an int. `Bins` below is either.
template <class Body> inline void with_bins(int64_t bins, const Body& body) {
  if (bins == 17) return body(std::integral_constant<int, 17>{});
  body(static_cast<int>(bins));
}

// Four columns of several rows. The two halves of an AVX register hold different rows and are transposed separately.
#if defined(__AVX__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif
using Block = float __attribute__((vector_size(4 * kBlockRows)));
using BlockIndex = int32_t __attribute__((vector_size(4 * kBlockRows)));

// Evenly spaced rows, whose addresses need no memory.
template <class P> struct SpacedRows {
  P first;
  int64_t pitch;
  P operator[](int k) const { return first + k * pitch; }
};

// Four columns of the rows at `low` and `high`, which are four apart; with narrow registers, of `low` alone.
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

#if defined(__AVX512F__)
// The rows of one block, then those of another. With all lanes masked in, as in vector_math.h.
inline Floats join(Block low, Block high) {
  const __m512d of_low = _mm512_castpd256_pd512((__m256d)low);
  return (Floats)_mm512_maskz_insertf64x4(0xff, of_low, (__m256d)high, 1);
}
#endif

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

// Calls body(first column) for blocks of four columns; the last block ends with the row and may overlap the one before.
template <class Bins, class Body> GFL_INLINE void for_four_columns(Bins bins, const Body& body) {
  for (int j = 0; j + 4 < bins; j += 4) body(j);
  body(bins - 4);
}

// Columns [j, j + 4) of kBlockRows rows from k on.
struct FourColumns { Block of[4]; };
template <class Rows> GFL_INLINE FourColumns four_columns(const Rows& rows, int k, int j) {
  const auto block = [&](int i) GFL_INLINED { return load_block(rows[k + i] + j, rows[k + i + kBlockRows - 4] + j); };
  FourColumns c{{block(0), block(1), block(2), block(3)}};
  transpose(c.of[0], c.of[1], c.of[2], c.of[3]);
  return c;
}

// Calls column(values) for each bin, in their order, of the kWidth rows from k on; at least four bins.
template <class Rows, class Bins, class Column>
GFL_INLINE void for_columns(const Rows& rows, Bins bins, int k, const Column& column) {
  const auto visit = [&](int j, int seen) GFL_INLINED {
    const FourColumns c = four_columns(rows, k, j);
#if defined(__AVX512F__)
    const FourColumns high = four_columns(rows, k + kBlockRows, j);
    for (int i = seen; i < 4; ++i) column(join(c.of[i], high.of[i]));
#else
    for (int i = seen; i < 4; ++i) column(c.of[i]);
#endif
  };
  int j = 0;
  for (; j + 4 < bins; j += 4) visit(j, 0);
  visit(bins - 4, j + 4 - bins);
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
      const FourColumns c = four_columns(rows, k, j);
      for (int i = 0; i < 4; ++i) std::memcpy(tile[j + i].at + k, &c.of[i], sizeof(Block));
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
template <class T> GFL_INLINE void widen_row(const T* from, int count, float* to) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) load_lanes(from + j, kLanes, 0.0f, to + j);
  for (; j < count; ++j) to[j] = load(from + j);
}
template <class T> GFL_INLINE void narrow_row(const float* from, int count, T* to) {
  int j = 0;
  for (; j + kLanes <= count; j += kLanes) store_lanes(from + j, kLanes, to + j);
  for (; j < count; ++j) store(to + j, from[j]);
}

// 16-bit rows as floats, one after the other.
struct Staging { float values[kLanes * kMaxBins]; };

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
      else
        for (int k = 0; k < kLanes; ++k) widen_row(group.from_at(k), bins, staged.values + k * bins);
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

}  // namespace gfl::GFL_ISA
