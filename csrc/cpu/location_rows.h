// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace gfl::cpu {

// Locations first + y·pitch + x for y < height, x < width.
struct LocationRows { int64_t first, width, height, pitch; };

}  // namespace gfl::cpu
