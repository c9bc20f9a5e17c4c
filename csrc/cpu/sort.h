// SPDX-License-Identifier: Apache-2.0
// Stable sorting by fixed-width keys: a radix sort, several times as fast as a comparison sort at the sizes of
// detection.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace gfl::cpu {

template <class Key> struct Keyed {
  Key key;
  int64_t index;
};

// Unsigned keys whose rising order is the falling order of the numbers: NaN first and all equal, −0 equal to 0.
inline uint32_t falling_key(float x) {
  if (x != x) return 0;
  uint32_t bits;
  x += 0.0f;  // −0 becomes 0
  std::memcpy(&bits, &x, sizeof bits);
  // Negative numbers order backwards by their bits; the complement of a non-negative one falls as it should.
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}
inline uint64_t falling_key(double x) {
  if (x != x) return 0;
  uint64_t bits;
  x += 0.0;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? bits : bits ^ 0x7fffffffffffffffu;
}

inline uint64_t rising_key(int64_t x) { return static_cast<uint64_t>(x) ^ (uint64_t(1) << 63); }

// Sorts by rising key; equal keys keep their order. A digit that all keys share costs no pass.
template <class Key> void sort_stable(std::vector<Keyed<Key>>& items) {
  constexpr int kDigits = sizeof(Key);
  constexpr size_t kSmall = 96;
  const size_t count = items.size();
  if (count <= kSmall) {
    std::stable_sort(items.begin(), items.end(), [](const auto& a, const auto& b) { return a.key < b.key; });
    return;
  }
  size_t histogram[kDigits][256] = {};
  for (const Keyed<Key>& item : items) {
    for (int d = 0; d < kDigits; ++d) ++histogram[d][(item.key >> (8 * d)) & 255];
  }
  std::vector<Keyed<Key>> other(count);
  for (int d = 0; d < kDigits; ++d) {
    size_t* bucket = histogram[d];
    if (bucket[(items[0].key >> (8 * d)) & 255] == count) continue;
    size_t start = 0;
    for (int v = 0; v < 256; ++v) {
      const size_t size = bucket[v];
      bucket[v] = start;
      start += size;
    }
    for (const Keyed<Key>& item : items) other[bucket[(item.key >> (8 * d)) & 255]++] = item;
    items.swap(other);
  }
}

}  // namespace gfl::cpu
