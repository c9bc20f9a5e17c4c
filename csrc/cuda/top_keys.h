// SPDX-License-Identifier: Apache-2.0
// The k greatest of a stream of 64-bit keys, kept by a warp in shared memory, falling.
#pragma once
#include <cstring>

#include "warp.h"

namespace gfl::cuda {

using Key = unsigned long long;
constexpr unsigned kNoIndex = 0xffffffffu;

// Greater for a greater value (≥ 0), then for the lower index; 0 is no key.
__device__ __forceinline__ Key key_of(float value, unsigned index) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<Key>(bits) << 32 | (kNoIndex - index);
}
__device__ __forceinline__ unsigned index_of(Key key) { return kNoIndex - static_cast<unsigned>(key); }
__device__ __forceinline__ bool has_value(Key key) { return key >> 32 != 0; }

// All 32 lanes call each function together. Keys differ from each other.
struct TopKeys {
  Key* list;  // [capacity], shared by the warp; 0 behind the last
  int capacity;
  Key least;

  __device__ void clear() {
    for (int e = static_cast<int>(threadIdx.x) % kWarp; e < capacity; e += kWarp) list[e] = 0;
    least = 0;
    __syncwarp();
  }

  // Takes one key from each lane; 0 for none.
  __device__ void offer(Key key) {
    for (;;) {
      const unsigned wanted = __ballot_sync(kFullMask, key > least);
      if (wanted == 0) return;
      const int from = __ffs(static_cast<int>(wanted)) - 1;
      insert(__shfl_sync(kFullMask, key, from));
      if (static_cast<int>(threadIdx.x) % kWarp == from) key = 0;
    }
  }

  // The same key in every lane. Shifts what is smaller by one place, 32 places at a time from the end.
  __device__ void insert(Key key) {
    for (int first = (capacity - 1) / kWarp * kWarp; first >= 0; first -= kWarp) {
      const int e = first + static_cast<int>(threadIdx.x) % kWarp;
      const Key mine = e < capacity ? list[e] : 0;
      const Key before = e == 0 ? ~Key{0} : e < capacity ? list[e - 1] : 0;
      __syncwarp();
      if (e < capacity) list[e] = mine > key ? mine : before > key ? key : before;
      __syncwarp();
    }
    least = list[capacity - 1];
    __syncwarp();
  }

  __device__ int count() const {
    int found = 0;
    for (int first = 0; first < capacity; first += kWarp) {
      const int e = first + static_cast<int>(threadIdx.x) % kWarp;
      found += __popc(__ballot_sync(kFullMask, e < capacity && list[e] != 0));
    }
    return found;
  }
};

}  // namespace gfl::cuda
