// SPDX-License-Identifier: Apache-2.0
// kLanes rows of bins at a time, one per lane: which rows they are, and where in memory each begins.
//
// Conv outputs are read in place: where locations lie side by side in memory, the lanes are neighbouring locations of
// one side; where bins do, they are neighbouring rows.
#pragma once
#include "gfl/rows.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {

// For the inner parts of a kernel, whatever their size: as calls they would keep addresses and the number of bins in
// memory.
#define GFL_INLINE inline __attribute__((always_inline))
#define GFL_INLINED __attribute__((always_inline))  // of a lambda

struct alignas(64) Lanes {
  float at[kLanes];
  float& operator[](int j) { return at[j]; }
  float operator[](int j) const { return at[j]; }
};

// The kWidth lanes from k on.
inline Floats lanes_at(const Lanes& lanes, int k) { return load_floats(lanes.at + k); }

// Up to kLanes rows: where each is, and its index. Lanes beyond `count` repeat the last row. kLanes consecutive rows
// that lie evenly spaced are given by the first and their pitch: such a group costs next to nothing to make and to
// read.
template <class T> struct RowGroup {
  const T* from[kLanes];
  int64_t row[kLanes];
  int count;
  bool consecutive;  // kLanes rows, each the next of the one before
  bool spaced;       // and they lie `pitch` elements apart
  int64_t pitch;

  const T* from_at(int k) const { return spaced ? from[0] + k * pitch : from[k]; }
  int64_t row_at(int k) const { return spaced ? row[0] + k : row[k]; }

  // Rows [first_row, end), at most kLanes, the first at `first` and the others `step` elements apart.
  void set_spaced(const T* first, int64_t first_row, int64_t end, int64_t step) {
    consecutive = spaced = end - first_row >= kLanes;
    count = spaced ? kLanes : static_cast<int>(end - first_row);
    pitch = step;
    from[0] = first;
    row[0] = first_row;
    for (int k = 1; k < kLanes && !spaced; ++k) {
      const int of = k < count ? k : count - 1;
      from[k] = first + of * step;
      row[k] = first_row + of;
    }
  }
  // After from and row of `count` rows have been set.
  void repeat_last() {
    for (int k = count; k < kLanes; ++k) {
      from[k] = from[count - 1];
      row[k] = row[count - 1];
    }
    spaced = false;
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

// Neighbouring locations that are read together, so that each visit to a bin's plane reads several cache lines.
constexpr int kNeighbours = 8 * kLanes;

// Calls body(group) for all rows [begin, end), in an order that suits the layout: of a location, sides in their order.
template <class T, class Body> void for_row_groups(const BinRows& v, int64_t begin, int64_t end, const Body& body) {
  const T* data = static_cast<const T*>(v.data);
  RowGroup<T> group;
  const bool evenly_spaced = v.count_outer == 1 && (v.sides == 1 || v.stride_location.inner == v.sides * v.stride_side);
  const int64_t pitch = v.sides == 1 ? v.stride_location.inner : v.stride_side;
  const auto in_order = [&](int64_t row, int64_t last) {
    if (evenly_spaced) {
      for (; row < last; row += kLanes) {
        group.set_spaced(data + row * pitch, row, last, pitch);
        body(group);
      }
      return;
    }
    for (RowCursor cursor(v, row); row < last; row += kLanes) {
      group.count = static_cast<int>(last - row < kLanes ? last - row : kLanes);
      group.consecutive = group.count == kLanes;
      for (int k = 0; k < group.count; ++k, cursor.next_row()) {
        group.from[k] = data + cursor.offset();
        group.row[k] = row + k;
      }
      group.repeat_last();
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
        group.repeat_last();
        body(group);
      }
    }
  }
  if (last * v.sides < end) in_order(last * v.sides, end);
}

// One number per row, and back.
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

}  // namespace gfl::GFL_ISA
