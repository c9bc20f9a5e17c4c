// SPDX-License-Identifier: Apache-2.0
// What gfl_loss.cpp passes to simd/gfl_loss.cpp.
#pragma once
#include <cstdint>

namespace gfl {

// Locations per tile, at most: long enough runs of a class's plane that the CPU's prefetcher follows them.
constexpr int kHeadTile = 1024;

// Evenly spaced locations of a class map: (location i, class c) is at data[i · location + c · channel].
template <class T> struct HeadTile {
  T* data;
  int64_t location, channel;
};

}  // namespace gfl
