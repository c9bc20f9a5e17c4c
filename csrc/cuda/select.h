// SPDX-License-Identifier: Apache-2.0
// Radix selection by one block: the least of a given number of greatest keys. Keys are 64 bits, all different, and need
// not lie in memory: a pass goes over whatever produces them, six passes at most.
#pragma once
#include <cstdint>

#include "launch.h"
#include "warp.h"

namespace gfl::cuda {

constexpr int kSelectThreads = 512;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr int kDigitsPerThread = kDigits / kSelectThreads;

struct SelectScratch {
  unsigned histogram[kDigits];
  unsigned long long of_warp[kSelectThreads / kWarp];
  unsigned long long above;  // keys above the digit where the count is passed
  int digit;                 // that digit, or −1
};

// Finds, among the digits from the highest, the one at which the number of keys passes `wanted`. All threads get it.
__device__ __forceinline__ void find_digit(SelectScratch& s, unsigned long long taken, unsigned long long wanted) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int top = kDigits - 1 - thread * kDigitsPerThread;
  unsigned long long sum = 0;
  for (int i = 0; i < kDigitsPerThread; ++i) sum += s.histogram[top - i];
  unsigned long long through = sum;  // keys of this thread's digits and the higher ones of the warp
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned long long other = __shfl_up_sync(kFullMask, through, offset);
    if (lane >= offset) through += other;
  }
  if (lane == kWarp - 1) s.of_warp[warp] = through;
  if (thread == 0) s.digit = -1;
  __syncthreads();
  unsigned long long above = taken + through - sum;
  for (int w = 0; w < warp; ++w) above += s.of_warp[w];
  if (above <= wanted && above + sum > wanted) {  // true for one thread only
    int digit = top;
    while (above + s.histogram[digit] <= wanted) above += s.histogram[digit--];
    s.digit = digit;
    s.above = above;
  }
  __syncthreads();
}

// The least key of the greatest ones, which are `wanted` where `enough` is as much, else between `enough` ≥ 1 and
// `wanted`; 0 where there are not more than `wanted`. each(visit) calls visit(key) for this thread's share of the keys.
template <class Each>
__device__ __forceinline__ unsigned long long select_greatest(const Each& each, unsigned long long wanted,
                                                              unsigned long long enough, SelectScratch& s) {
  unsigned long long prefix = 0, taken = 0;
  for (int shift = 64 - kDigitBits;;) {
    const int bits = shift == 0 ? 64 % kDigitBits : kDigitBits, higher = shift + bits;
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kSelectThreads) s.histogram[i] = 0;
    __syncthreads();
    each([&](unsigned long long key) {
      if (higher < 64 && key >> higher != prefix) return;
      atomicAdd(&s.histogram[static_cast<unsigned>(key >> shift) & ((1u << bits) - 1u)], 1u);
    });
    __syncthreads();
    find_digit(s, taken, wanted);
    if (s.digit < 0) return 0;
    const unsigned long long digit = static_cast<unsigned long long>(s.digit), above = s.above;
    __syncthreads();
    if (above >= enough) return ((prefix << bits) + digit + 1) << shift;
    prefix = (prefix << bits) + digit;
    taken = above;
    shift = shift > kDigitBits ? shift - kDigitBits : 0;
  }
}

// Sorts the keys of a block in descending order; `size` is a power of two, and what is beyond `count` is set to 0.
__device__ __forceinline__ void sort_descending(unsigned long long* keys, int count, int size) {
  for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kSelectThreads) keys[i] = 0;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2; pair += kSelectThreads) {
        const int low = pair / step * 2 * step + pair % step, high = low + step;
        const bool falling = (low & run) == 0;
        if ((keys[low] < keys[high]) == falling) {
          const unsigned long long kept = keys[low];
          keys[low] = keys[high];
          keys[high] = kept;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace gfl::cuda
