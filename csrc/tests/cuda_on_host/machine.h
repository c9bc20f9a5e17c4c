// SPDX-License-Identifier: Apache-2.0
// The state of the running block, which runtime.cpp (scheduler, barriers) and warp.cpp (warp operations) share.
#pragma once
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <string>

#include "fiber.h"
#include "runtime.h"

namespace gfl_host {

constexpr unsigned kLanes = 32;

// --- random numbers -----------------------------------------------------------------------------------------------
struct Random {
  uint64_t state = 1, seed = 0;
  void reset(uint64_t new_seed) {
    seed = new_seed;
    state = (new_seed + 1) * 0x9e3779b97f4a7c15ull;  // odd multiplier: zero only for the seed -1
    if (state == 0) state = 1;
    for (int i = 0; i < 8; ++i) next();
  }
  unsigned next() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<unsigned>((state * 0x2545f4914f6cdd1dull) >> 32);
  }
  uint64_t below(uint64_t bound) { return ((static_cast<uint64_t>(next()) << 32) | next()) % bound; }
  // Some set bit of a mask that is not 0.
  unsigned bit_of(unsigned mask) {
    const unsigned turn = next() >> 27;
    const unsigned turned = (mask >> turn) | (mask << ((32 - turn) & 31));
    return (static_cast<unsigned>(__builtin_ctz(turned)) + turn) & 31;
  }
  // Garbage for unset memory: NaN and −1, a large negative or a large positive number, in every type.
  unsigned char garbage() {
    static const unsigned char patterns[] = {0xff, 0xcb, 0x7f};
    return patterns[below(3)];
  }
};

// --- fibers -------------------------------------------------------------------------------------------------------
enum class Wait { nothing, block, warp, exited };

struct Fiber {
  Context context;
  uint3 index{};
  unsigned warp = 0, lane = 0;
  Wait wait = Wait::nothing;
  Site site{};
  BlockOp block_op{};
  WarpOp warp_op{};
  unsigned mask = 0;
  int argument = 0, width = 0;
  uint64_t value = 0, result = 0;
};

struct Warp {
  unsigned lanes;    // that exist
  unsigned ready;    // may go on
  unsigned waiting;  // at a warp operation
  unsigned exited;
  unsigned rank;  // place in this block's order of warps
};

struct Machine {
  std::mutex mutex;
  Random random;
  const LaunchConfig* launch = nullptr;
  void (*body)(void*) = nullptr;
  void* data = nullptr;

  Context host;
  Fiber fibers[kMaxThreads];
  Fiber* current = nullptr;  // null outside a kernel
  Warp warps[kMaxThreads / kLanes];
  unsigned warp_of_rank[kMaxThreads / kLanes];
  unsigned ready_ranks = 0;
  bool scatter = true;
  unsigned threads = 0, alive = 0;

  unsigned arrived = 0, predicates = 0;
  int barrier_result = 0;
  Fiber* first_at_barrier = nullptr;

  unsigned char* shared = nullptr;

  uint64_t turns = 0;
  double timeout = 300.0;
  std::chrono::steady_clock::time_point began;

  Machine() {
    const char* seed = std::getenv("GFL_HOST_SEED");
    random.reset(seed ? std::strtoull(seed, nullptr, 10) : 0);
    if (const char* seconds = std::getenv("GFL_HOST_TIMEOUT")) timeout = std::strtod(seconds, nullptr);
  }
};

extern Machine m;

std::string place(uint3 at);
std::string place(const Site& site);
const char* name_of(BlockOp op);
const char* name_of(WarpOp op);
// These lanes may run.
void make_ready(Warp& warp, unsigned lanes);
// The running fiber waits: another one runs.
void suspend(Fiber& self);
// The fiber that calls; an error outside a kernel.
Fiber& running(const char* what);

}  // namespace gfl_host
