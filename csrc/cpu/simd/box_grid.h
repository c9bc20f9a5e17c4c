// SPDX-License-Identifier: Apache-2.0
// The boxes that one box may overlap, without looking at all of them. Boxes of like width and height make a level; a
// level is a grid of cells over their upper left corners; the boxes of a row of cells lie in one piece of memory.
//
// What is left out is certain, whatever the rounding. From IoU ≥ t follows, along either axis, that the intersection is
// at least t · (w + w') / (1 + t) long, w and w' the widths. So a width is at least t times the other, and the corner
// of the second box is at most (w' − t·w) / (1 + t) before that of the first, and (w − t·w') / (1 + t) behind it.
// `Reach` adds a thousandth to both, thousands of roundings; corners themselves are compared as they are given.
#pragma once
#include <cmath>
#include <cstring>
#include <type_traits>

#include "terms/box.h"
#include "vector_math.h"

namespace gfl::GFL_ISA {

template <class A> struct Reach {
  A iou, share, offset;

  // For pairs with an IoU of at least `threshold`, or an intersection where that says little.
  Reach(A threshold, A box_offset)
      : iou(threshold < A(1) / 16 ? A(0) : smaller(threshold, A(0.95)) * A(0.998)),
        share(A(1.001) / (1 + iou)),
        offset(box_offset) {}

  A width(const Box<A>& b) const { return add_rn(sub_rn(b.x2, b.x1), offset); }
  A height(const Box<A>& b) const { return add_rn(sub_rn(b.y2, b.y1), offset); }
  // Whether a length can go with one of [least, most].
  bool alike(A length, A least, A most) const { return most >= iou * length && length >= iou * least; }
  // How far before or behind its corner that of the other can be.
  A before(A length, A most) const { return (most - iou * length) * share; }
  A behind(A length, A least) const { return (length - iou * least) * share; }
};

enum class BoxKind { ordinary, odd, apart };

// `apart`: of no intersection, or of an IoU of 0 or NaN, with any box: inverted, without width or height, with a NaN or
// an infinite area. `odd`: of a size or at a place where rounding could matter.
template <class A> inline BoxKind kind_of(const Box<A>& b, const Reach<A>& reach) {
  const A w = reach.width(b), h = reach.height(b), most = A(int64_t(1) << 40), least = 1 / most;
  if (!(w > 0 && h > 0 && mul_rn(w, h) < std::numeric_limits<A>::infinity())) return BoxKind::apart;
  const bool sized = w >= least && w <= most && h >= least && h <= most && b.x2 >= b.x1 && b.y2 >= b.y1;
  const bool placed = b.x1 >= -most && b.x1 <= most && b.y1 >= -most && b.y1 <= most;
  return sized && placed ? BoxKind::ordinary : BoxKind::odd;
}

// Whether a grid is worth its making: of a sample's pairs few can overlap. box_at(i), for i < count, gives a box.
template <class A, class BoxAt> inline bool grid_pays(int64_t count, const Reach<A>& reach, const BoxAt& box_at) {
  constexpr int kMost = 64;
  const int size = static_cast<int>(smaller(count / 128 + 4, int64_t(kMost)));
  Box<A> sample[kMost];
  int meet = 0;
  for (int i = 0; i < size; ++i) {
    const Box<A> b = sample[i] = box_at(count * i / size);
    const BoxKind kind = kind_of(b, reach);
    if (kind == BoxKind::odd) meet += i;
    if (kind != BoxKind::ordinary) continue;
    const A w = reach.width(b), h = reach.height(b);
    for (int j = 0; j < i; ++j) {
      const Box<A>& o = sample[j];
      const A ow = reach.width(o), oh = reach.height(o);
      // Bitwise, as each of them is as likely as not.
      meet += reach.alike(w, ow, ow) & reach.alike(h, oh, oh) & (o.x1 >= b.x1 - reach.before(w, ow)) &
              (o.x1 <= b.x1 + reach.behind(w, ow)) & (o.y1 >= b.y1 - reach.before(h, oh)) &
              (o.y1 <= b.y1 + reach.behind(h, oh));
    }
  }
  return meet * 8 <= size * (size - 1) / 2;
}

template <class A> class BoxGrid {
 public:
  // By position, in order of the cells, the odd ones last. After the last there are kLanes with NaN, which overlap
  // nothing. index: of the box among those given to `build`.
  A *x1, *y1, *x2, *y2, *area;
  int32_t* index;

  static int64_t bytes(int64_t count) {
    return (count + kLanes) * static_cast<int64_t>(5 * sizeof(A) + 3 * sizeof(int32_t)) +
           2 * kMostLevels * static_cast<int64_t>(sizeof(int32_t));
  }

  // scratch: bytes(count), aligned as A.
  BoxGrid(unsigned char* scratch, int64_t count, const Reach<A>& reach) : reach_(reach) {
    const int64_t room = count + kLanes;
    x1 = reinterpret_cast<A*>(scratch);
    y1 = x1 + room;
    x2 = y1 + room;
    y2 = x2 + room;
    area = y2 + room;
    index = reinterpret_cast<int32_t*>(area + room);
    cell_ = index + room;
    ends_ = cell_ + room + 1;
  }

  Box<A> box(int64_t position) const { return {x1[position], y1[position], x2[position], y2[position]}; }
  // From now on it overlaps nothing.
  void remove(int64_t position) { x1[position] = area[position] = std::numeric_limits<A>::quiet_NaN(); }
  int64_t size() const { return size_; }

  // Of the boxes box_at(i), i < count, that takes(i) says.
  template <class BoxAt, class Takes> void build(int64_t count, const BoxAt& box_at, const Takes& takes) {
    for (int64_t i = 0; i < count; ++i) {
      const BoxKind kind = takes(i) ? kind_of(box_at(i), reach_) : BoxKind::apart;
      cell_[i] = kind == BoxKind::apart ? kApart : kind == BoxKind::odd ? kOdd : sizes(box_at(i));
    }
    size_ = odd_ = make_cells(count, box_at);
    for (int64_t i = 0; i < count; ++i) {
      if (cell_[i] == kApart) continue;
      const Box<A> b = box_at(i);
      put(cell_[i] == kOdd ? size_++ : ends_[cell_[i]]++, b, box_area(b, reach_.offset), static_cast<int32_t>(i));
    }
    const A nan = std::numeric_limits<A>::quiet_NaN();
    for (int64_t i = size_; i < size_ + kLanes; ++i) put(i, {nan, nan, nan, nan}, nan, 0);
  }

  // Calls visit(begin, end) for pieces of the positions, no two of which share one: all boxes that `b` can overlap.
  template <class Visit> void near(const Box<A>& b, const Visit& visit) const {
    const BoxKind kind = kind_of(b, reach_);
    if (kind == BoxKind::apart) return;
    if (kind == BoxKind::odd) return visit(int64_t(0), size_);
    const A w = reach_.width(b), h = reach_.height(b);
    for (int i = 0; i < levels_; ++i) {
      const Level& l = level_[i];
      if (!reach_.alike(w, l.w.least, l.w.most) || !reach_.alike(h, l.h.least, l.h.most)) continue;
      const A left = b.x1 - reach_.before(w, l.w.most), right = b.x1 + reach_.behind(w, l.w.least);
      const A top = b.y1 - reach_.before(h, l.h.most), bottom = b.y1 + reach_.behind(h, l.h.least);
      if (left > l.x.most || right < l.x.least || top > l.y.most || bottom < l.y.least) continue;
      const int32_t from = l.first + l.column(left), to = l.first + l.column(right), last = l.row(bottom);
      for (int32_t row = l.row(top); row <= last; ++row) {
        const int64_t begin = ends_[from + row * l.columns - 1], end = ends_[to + row * l.columns];
        if (begin < end) visit(begin, end);
      }
    }
    if (odd_ < size_) visit(odd_, size_);
  }

 private:
  static constexpr int kMostLevels = 64, kExponents = 81;  // of lengths of 2^-40 to 2^40
  static constexpr int32_t kApart = -1, kOdd = -2;

  struct Range {
    A least = std::numeric_limits<A>::infinity(), most = -std::numeric_limits<A>::infinity();
    void add(A v) {
      least = v < least ? v : least;
      most = v > most ? v : most;
    }
  };

  struct Level {
    Range w, h, x, y;
    int32_t count = 0, first = 0, columns = 1, rows = 1;
    A columns_per_unit = 0, rows_per_unit = 0;

    // The cell before the first is the first, the one behind the last is the last. Monotone, as each rounding is.
    static int32_t at(A v, A begin, A per_unit, int32_t cells) {
      const A place = v > begin ? (v - begin) * per_unit : A(0);
      return place < static_cast<A>(cells - 1) ? static_cast<int32_t>(place) : cells - 1;
    }
    int32_t column(A v) const { return at(v, x.least, columns_per_unit, columns); }
    int32_t row(A v) const { return at(v, y.least, rows_per_unit, rows); }

    // How many cells of the given size there are, and how many there are to be at most.
    static double cells_of(const Range& corners, A size, double most) {
      const double cells = static_cast<double>(corners.most - corners.least) / static_cast<double>(size);
      return cells < most ? cells + 1 : most;
    }
    static A per_unit(const Range& corners, int32_t& cells) {
      const A result = static_cast<A>(cells) / (corners.most - corners.least);
      if (cells > 1 && result < std::numeric_limits<A>::max()) return result;
      cells = 1;
      return 0;
    }
    // Cells for its boxes, of at least two boxes on average. Returns where the next level's begin.
    int32_t shape(const Reach<A>& reach, int32_t begin) {
      const double most = count * 0.5 + 1;
      double c = cells_of(x, (reach.before(w.most, w.most) + reach.behind(w.most, w.least)) / 4, most);
      double r = cells_of(y, (reach.before(h.most, h.most) + reach.behind(h.most, h.least)) / 2, most);
      if (c * r > most) {
        const double less = std::sqrt(most / (c * r));
        c = c * less < 1 ? 1 : c * less;
        r = r * less < 1 ? 1 : smaller(r * less, most);
        c = smaller(c, most / r);
      }
      first = begin;
      columns = static_cast<int32_t>(c);
      rows = static_cast<int32_t>(r);
      columns_per_unit = per_unit(x, columns);
      rows_per_unit = per_unit(y, rows);
      return begin + columns * rows;
    }
  };

  // The logarithm of a length to base 2, rounded down, and 40 more.
  static int32_t exponent(A length) {
    constexpr bool in_double = sizeof(A) == sizeof(double);
    std::conditional_t<in_double, uint64_t, uint32_t> bits;
    std::memcpy(&bits, &length, sizeof bits);
    return static_cast<int32_t>(bits >> (in_double ? 52 : 23)) - (in_double ? 1023 : 127) + 40;
  }
  int32_t sizes(const Box<A>& b) const { return exponent(reach_.width(b)) * kExponents + exponent(reach_.height(b)); }
  void put(int64_t position, const Box<A>& b, A area_of_b, int32_t i) {
    x1[position] = b.x1;
    y1[position] = b.y1;
    x2[position] = b.x2;
    y2[position] = b.y2;
    area[position] = area_of_b;
    index[position] = i;
  }

  // Puts the cell of each ordinary box into cell_ instead of its size, and where the cell begins into ends_, which the
  // filling makes its end. Returns how many boxes there are in cells.
  template <class BoxAt> int64_t make_cells(int64_t count, const BoxAt& box_at) {
    make_levels(count, box_at);
    int32_t total = 0;
    for (int l = 0; l < levels_; ++l) total = level_[l].shape(reach_, total);
    for (int32_t c = -1; c < total; ++c) ends_[c] = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (cell_[i] < 0) continue;
      const Level& l = level_[cell_[i]];
      const Box<A> b = box_at(i);
      cell_[i] = l.first + l.row(b.y1) * l.columns + l.column(b.x1);
      ++ends_[cell_[i]];
    }
    int32_t begin = 0;
    for (int32_t c = 0; c < total; ++c) {
      const int32_t here = ends_[c];
      ends_[c] = begin;
      begin += here;
    }
    return begin;
  }

  // Puts the level of each ordinary box into cell_ instead of its size: one for each power of two of width and height,
  // or for each two, four, … powers where those are too many for the boxes.
  template <class BoxAt> void make_levels(int64_t count, const BoxAt& box_at) {
    const int64_t limit = smaller(count / 128 + 1, int64_t(kMostLevels));
    int16_t level_of[kExponents * kExponents], coarse[kExponents * kExponents];
    std::memset(level_of, -1, sizeof level_of);
    for (int64_t i = 0; i < count; ++i) {
      if (cell_[i] >= 0) level_of[cell_[i]] = 0;
    }
    for (int shift = 0;; ++shift) {
      levels_ = 0;
      std::memset(coarse, -1, sizeof coarse);
      for (int s = 0; s < kExponents * kExponents && levels_ <= limit; ++s) {
        if (level_of[s] < 0) continue;
        int16_t& level = coarse[(s / kExponents >> shift) * kExponents + (s % kExponents >> shift)];
        if (level < 0) level = static_cast<int16_t>(levels_++);
        level_of[s] = level;
      }
      if (levels_ <= limit) break;
    }
    for (int l = 0; l < levels_; ++l) level_[l] = Level();
    for (int64_t i = 0; i < count; ++i) {
      if (cell_[i] < 0) continue;
      cell_[i] = level_of[cell_[i]];
      Level& l = level_[cell_[i]];
      const Box<A> b = box_at(i);
      l.w.add(reach_.width(b));
      l.h.add(reach_.height(b));
      l.x.add(b.x1);
      l.y.add(b.y1);
      ++l.count;
    }
  }

  Reach<A> reach_;
  Level level_[kMostLevels];
  int levels_ = 0;
  int64_t size_ = 0, odd_ = 0;  // how many there are, and where the odd ones begin
  int32_t *cell_, *ends_;       // by box; by cell, with a 0 before the first
};

}  // namespace gfl::GFL_ISA
