// SPDX-License-Identifier: Apache-2.0
// Loads and stores of contiguous elements, 16 bytes per access, or 8 where there are no more. The caller makes sure
// that rows are aligned; `is_aligned` tests an address.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace gfl::cuda {

// How many elements of T are 16 bytes.
template <class T> constexpr int kRun = 16 / static_cast<int>(sizeof(T));

template <int bytes> struct Words { using type = uint4; };
template <> struct Words<8> { using type = uint2; };

// The alignment in bytes that an access to `count` elements of T needs.
template <class T, int count> constexpr int kVecBytes =
    sizeof(T) * count >= 16 ? 16 : static_cast<int>(sizeof(T)) * count;

template <int bytes = 16> __host__ __device__ __forceinline__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

template <class T, int count> __device__ __forceinline__ void load_vec(const T* from, T (&to)[count]) {
  static_assert(sizeof(to) % 8 == 0, "a multiple of 8 bytes");
  using Word = typename Words<kVecBytes<T, count>>::type;
  constexpr int bytes = sizeof(to), word_bytes = sizeof(Word);
#pragma unroll
  for (int w = 0; w < bytes / word_bytes; ++w) {
    const Word word = reinterpret_cast<const Word*>(from)[w];
    memcpy(reinterpret_cast<char*>(to) + sizeof(Word) * w, &word, sizeof word);
  }
}

template <class T, int count> __device__ __forceinline__ void store_vec(T* to, const T (&from)[count]) {
  static_assert(sizeof(from) % 8 == 0, "a multiple of 8 bytes");
  using Word = typename Words<kVecBytes<T, count>>::type;
  constexpr int bytes = sizeof(from), word_bytes = sizeof(Word);
#pragma unroll
  for (int w = 0; w < bytes / word_bytes; ++w) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(from) + sizeof(Word) * w, sizeof word);
    reinterpret_cast<Word*>(to)[w] = word;
  }
}

}  // namespace gfl::cuda
