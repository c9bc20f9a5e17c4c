// SPDX-License-Identifier: Apache-2.0
// What gfl_loss.cpp asks of simd/gfl_loss.cpp.
#pragma once
#include <cstdint>

namespace gfl {

// Locations in one go.
constexpr int kHeadTile = 256;

// Some locations of a class map at an even pitch: element (location i, class c) is i · location + c · channel further.
template <class T> struct HeadTile {
  T* data;
  int64_t location, channel;
};

}  // namespace gfl
