// SPDX-License-Identifier: Apache-2.0
// Warp operations: lanes wait until their mask is complete, and the last to arrive computes the results of all.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace gfl_host {
namespace {
// The lane that a shuffle reads; out of its segment of `width` lanes it is the reader itself, as in the PTX manual.
unsigned source_lane(const Fiber& fiber) {
  const unsigned lane = fiber.lane;
  const unsigned width = static_cast<unsigned>(fiber.width), step = static_cast<unsigned>(fiber.argument);
  const unsigned first = lane & ~(width - 1), last = lane | (width - 1), within = lane - first;
  switch (fiber.warp_op) {
    case WarpOp::shuffle_index: return first + (step & (width - 1));
    case WarpOp::shuffle_up: return step > within ? lane : lane - step;
    case WarpOp::shuffle_down: return step > last - lane ? lane : lane + step;
    default: return (lane ^ (step & 31)) > last ? lane : lane ^ (step & 31);
  }
}

uint64_t fold(WarpOp op, uint64_t a, uint64_t b) {
  const unsigned x = static_cast<unsigned>(a), y = static_cast<unsigned>(b);
  const int i = static_cast<int>(x), j = static_cast<int>(y);
  switch (op) {
    case WarpOp::add: return x + y;
    case WarpOp::min_signed: return static_cast<unsigned>(std::min(i, j));
    case WarpOp::max_signed: return static_cast<unsigned>(std::max(i, j));
    case WarpOp::min_unsigned: return std::min(x, y);
    case WarpOp::max_unsigned: return std::max(x, y);
    case WarpOp::bit_and: return x & y;
    case WarpOp::bit_or: return x | y;
    default: return x ^ y;
  }
}

// Results of all lanes at once, by the last to arrive: nobody may overwrite a value that another has yet to read.
void complete(WarpOp op, unsigned mask, Fiber* lanes) {
  uint64_t common = 0;
  const auto each = [mask](auto&& use) {
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) use(static_cast<unsigned>(__builtin_ctz(rest)));
  };
  switch (op) {
    case WarpOp::sync: return;
    case WarpOp::shuffle_index:
    case WarpOp::shuffle_up:
    case WarpOp::shuffle_down:
    case WarpOp::shuffle_xor:
      each([&](unsigned lane) {
        const unsigned source = source_lane(lanes[lane]);
        if ((mask >> source & 1u) == 0) {
          m.current = &lanes[lane];
          fail("%s reads lane %u, absent from the mask 0x%08x, %s", name_of(op), source, mask,
               place(lanes[lane].site).c_str());
        }
        lanes[lane].result = lanes[source].value;
      });
      return;
    case WarpOp::match_any:
      each([&](unsigned lane) {
        unsigned equal = 0;
        each([&](unsigned other) { equal |= (lanes[other].value == lanes[lane].value ? 1u : 0u) << other; });
        lanes[lane].result = equal;
      });
      return;
    case WarpOp::ballot:
    case WarpOp::all:
    case WarpOp::any:
      each([&](unsigned lane) { common |= (lanes[lane].value ? 1ull : 0ull) << lane; });
      if (op == WarpOp::all) common = common == mask;
      if (op == WarpOp::any) common = common != 0;
      break;
    default: {
      const unsigned first = static_cast<unsigned>(__builtin_ctz(mask));
      common = lanes[first].value;
      each([&](unsigned lane) { common = lane == first ? common : fold(op, common, lanes[lane].value); });
    }
  }
  each([&](unsigned lane) { lanes[lane].result = common; });
}
}  // namespace

uint64_t sync_warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Fiber& self = running(name_of(op));
  Warp& warp = m.warps[self.warp];
  Fiber* lanes = &m.fibers[self.warp * kLanes];
  const unsigned own = 1u << self.lane;
  if ((mask & own) == 0) {
    fail("mask mismatch: %s with mask 0x%08x, which lacks the calling lane %u, %s", name_of(op), mask, self.lane,
         place(site).c_str());
  }
  if (const unsigned absent = mask & (~warp.lanes | warp.exited)) {
    const unsigned lane = static_cast<unsigned>(__builtin_ctz(absent));
    fail("%s with mask 0x%08x: lane %u %s, %s", name_of(op), mask, lane,
         warp.lanes >> lane & 1u ? "has returned from the kernel" : "does not exist in this block",
         place(site).c_str());
  }
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("%s with width %d, which is no power of two up to 32, %s", name_of(op), width, place(site).c_str());
  }
  self.warp_op = op;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.width = width;
  self.site = site;

  // A lane that waits for us under the same mask must be at the same operation. One that waits under another mask with
  // us in it never meets us; one without us may still come here after its own operation.
  const auto conflicts = [&](const Fiber& other) {
    if (other.mask != mask) return (other.mask & own) != 0;
    return other.warp_op != op || other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0;
  };
  const auto refuse = [&](const Fiber& other) {
    fail("%s: it is at %s(0x%08x), %s, while thread %s of its mask waits at %s(0x%08x), %s",
         other.mask != mask ? "mask mismatch" : "divergent warp operation", name_of(op), mask, place(site).c_str(),
         place(other.index).c_str(), name_of(other.warp_op), other.mask, place(other.site).c_str());
  };
  const unsigned here = warp.waiting & mask;
  if (here != 0) {
    const Fiber& other = lanes[__builtin_ctz(here)];
    if (conflicts(other)) refuse(other);
  }
  bool last = (here | own) == mask;
  if (last) {
    for (unsigned rest = here; rest != 0; rest &= rest - 1) {
      const Fiber& other = lanes[__builtin_ctz(rest)];
      if (conflicts(other)) refuse(other);
      last = last && other.mask == mask;
    }
  }
  if (!last) {
    warp.waiting |= own;
    self.wait = Wait::warp;
    suspend(self);
    self.wait = Wait::nothing;
    return self.result;
  }
  complete(op, mask, lanes);
  warp.waiting &= ~mask;
  if (here != 0) make_ready(warp, here);
  return self.result;
}

}  // namespace gfl_host
