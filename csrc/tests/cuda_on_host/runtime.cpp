// SPDX-License-Identifier: Apache-2.0
// Runs the blocks of a launch one after another, in random order, on the calling thread. The threads of a block are
// fibers that yield only where they wait (barrier, warp operation) or at an atomic; the next to run is drawn at random.
// So a result that depends on an order nobody enforced differs from seed to seed.
//
// Stricter than a GPU on purpose: every thread of the block takes part in every barrier and every lane of a mask in its
// warp operation (warp.cpp), at the same line of the source; a thread that returned before is an error, not an arrival.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace gfl_host {

Machine m;

std::string place(uint3 at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}
std::string place(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

const char* name_of(BlockOp op) {
  static const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
  return names[static_cast<int>(op)];
}
const char* name_of(WarpOp op) {
  static const char* const names[] = {
      "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
      "__ballot_sync",     "__all_sync",        "__any_sync",        "__match_any_sync",  "__reduce_add_sync",
      "__reduce_min_sync", "__reduce_max_sync", "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
      "__reduce_or_sync",  "__reduce_xor_sync"};
  return names[static_cast<int>(op)];
}

// --- scheduling --------------------------------------------------------------------------------------------------
void make_ready(Warp& warp, unsigned lanes) {
  warp.ready |= lanes;
  m.ready_ranks |= 1u << warp.rank;
}

namespace {

Fiber& pick() {
  const unsigned first = static_cast<unsigned>(__builtin_ctz(m.ready_ranks));
  const unsigned rank = m.scatter ? m.random.bit_of(m.ready_ranks) : first;
  const unsigned index = m.warp_of_rank[rank];
  Warp& warp = m.warps[index];
  const unsigned lane = m.random.bit_of(warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) m.ready_ranks &= ~(1u << rank);
  if ((++m.turns & 0xffff) == 0) {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - m.began;
    if (spent.count() > m.timeout) {
      fail("the block has run for %.0f s: an endless loop, or a wait for another block (GFL_HOST_TIMEOUT)",
           spent.count());
    }
  }
  return m.fibers[index * kLanes + lane];
}

// One line for each group of threads that wait at the same place.
[[noreturn]] void report_stuck() {
  struct Group {
    unsigned count = 0, missing = 0;
    const Fiber* first = nullptr;
  };
  std::map<std::string, Group> groups;
  const Fiber* waiting = nullptr;
  bool at_barrier = false;
  for (unsigned i = 0; i < m.threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    std::string where = "returned from the kernel";
    if (fiber.wait == Wait::block) where = std::string("at ") + name_of(fiber.block_op) + ", " + place(fiber.site);
    if (fiber.wait == Wait::warp) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", fiber.mask);
      where = std::string("at ") + name_of(fiber.warp_op) + "(" + mask + "), " + place(fiber.site);
    }
    if (!waiting && fiber.wait != Wait::exited) waiting = &fiber;
    at_barrier |= fiber.wait == Wait::block;
    Group& group = groups[where];
    if (group.count++ == 0) group.first = &fiber;
  }
  std::string text =
      at_barrier ? "divergent barrier: not every thread arrives" : "deadlock: lanes of the mask never arrive";
  for (const auto& [where, group] : groups) {
    text += "\n  " + std::to_string(group.count) + " of " + std::to_string(m.threads) + " threads " + where;
    text += ", first " + place(group.first->index);
  }
  m.current = const_cast<Fiber*>(waiting);
  fail("%s", text.c_str());
}

}  // namespace

void suspend(Fiber& self) {
  if (m.ready_ranks == 0) report_stuck();
  Fiber& next = pick();
  if (&next == &self) return;
  m.current = &next;
  switch_context(self.context, next.context);
  threadIdx = self.index;
}

namespace {

[[noreturn]] void fiber_main() {
  Fiber& self = *m.current;
  begin_context(self.context);
  for (;;) {
    threadIdx = self.index;
    m.body(m.data);
    self.wait = Wait::exited;
    Warp& warp = m.warps[self.warp];
    warp.exited |= 1u << self.lane;
    --m.alive;
    for (unsigned lanes = warp.waiting; lanes != 0; lanes &= lanes - 1) {
      const Fiber& other = m.fibers[self.warp * kLanes + static_cast<unsigned>(__builtin_ctz(lanes))];
      if (other.mask >> self.lane & 1u) {
        fail("the thread returned from the kernel while thread %s waits for it in %s, mask 0x%08x, %s",
             place(other.index).c_str(), name_of(other.warp_op), other.mask, place(other.site).c_str());
      }
    }
    if (m.alive != 0) {
      suspend(self);  // until a later block needs this thread
    } else {
      m.current = nullptr;
      switch_context(self.context, m.host);
    }
  }
}

// --- shared memory ------------------------------------------------------------------------------------------------
// Aligned to 16 and not to 32, so that no kernel relies on a wider alignment by luck. AddressSanitizer sees every
// access beyond either end; without it a guard on both sides shows the writes.
constexpr size_t kBefore = 80;
constexpr unsigned char kGuard = 0xa5;
#if defined(GFL_HOST_ASAN)
constexpr size_t kAfter = 0;
#else
constexpr size_t kAfter = 64;
#endif

void allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, kBefore + bytes + kAfter) != 0) {
    fail("no memory for %zu bytes of shared memory", bytes);
  }
  m.shared = static_cast<unsigned char*>(memory) + kBefore;
#if defined(GFL_HOST_ASAN)
  ASAN_POISON_MEMORY_REGION(memory, kBefore);
#else
  std::memset(memory, kGuard, kBefore);
  std::memset(m.shared + bytes, kGuard, kAfter);
#endif
}
void free_shared() {
  std::free(m.shared - kBefore);
  m.shared = nullptr;
}
void check_guards([[maybe_unused]] size_t bytes) {
#if !defined(GFL_HOST_ASAN)
  const auto damaged = [](const unsigned char* begin, size_t count) {
    return std::any_of(begin, begin + count, [](unsigned char byte) { return byte != kGuard; });
  };
  if (damaged(m.shared - kBefore, kBefore)) fail("the block wrote below its dynamic shared memory");
  if (damaged(m.shared + bytes, kAfter)) fail("the block wrote past its %zu bytes of dynamic shared memory", bytes);
#endif
}

void run_block() {
  const unsigned warps = (m.threads + kLanes - 1) / kLanes;
  for (unsigned i = 0; i < warps; ++i) {
    const unsigned other = static_cast<unsigned>(m.random.below(i + 1));
    m.warp_of_rank[i] = m.warp_of_rank[other];
    m.warp_of_rank[other] = i;
  }
  m.ready_ranks = 0;
  for (unsigned rank = 0; rank < warps; ++rank) {
    const unsigned index = m.warp_of_rank[rank], count = std::min(kLanes, m.threads - index * kLanes);
    const unsigned lanes = count == kLanes ? ~0u : (1u << count) - 1u;
    m.warps[index] = Warp{lanes, 0, 0, 0, rank};
    make_ready(m.warps[index], lanes);
  }
  for (unsigned i = 0; i < m.threads; ++i) m.fibers[i].wait = Wait::nothing;
  m.alive = m.threads;
  m.arrived = m.predicates = 0;
  // Half the blocks mix all warps; in the others a warp goes on while it can, so one gets far ahead of the rest.
  m.scatter = m.random.next() & 1u;
  m.turns = 0;
  m.began = std::chrono::steady_clock::now();
  std::memset(m.shared, m.random.garbage(), m.launch->smem);
  m.current = &pick();
  switch_context(m.host, m.current->context);
  check_guards(m.launch->smem);
}

cudaError_t check(const LaunchConfig& config) {
  const dim3 grid = config.grid, block = config.block;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (static_cast<uint64_t>(block.x) * block.y * block.z > kMaxThreads) return cudaErrorInvalidConfiguration;
  return config.smem > shared_limit(config.kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

Fiber& running(const char* what) {
  if (!m.current) fail("%s called outside a kernel", what);
  return *m.current;
}

// --- interface of cuda_on_host.h ----------------------------------------------------------------------------------
void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_host: ");
  if (m.launch) {
    std::fprintf(stderr, "kernel %s launched at %s, grid %s, block size %s: ", m.launch->name,
                 place(m.launch->site).c_str(), place(m.launch->grid).c_str(), place(m.launch->block).c_str());
    std::fprintf(stderr, "block %s, ", place(blockIdx).c_str());
    if (m.current) std::fprintf(stderr, "thread %s: ", place(m.current->index).c_str());
  }
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, " [GFL_HOST_SEED=%llu]\n", static_cast<unsigned long long>(m.random.seed));
  std::fflush(stderr);
  std::_Exit(86);
}

void gfl_host_set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(m.mutex);
  m.random.reset(seed);
}

unsigned char garbage() {
  const std::lock_guard<std::mutex> lock(m.mutex);
  return m.random.garbage();
}

void maybe_yield() {
  if (!m.current || m.random.next() >> 30 != 0) return;
  Fiber& self = *m.current;
  make_ready(m.warps[self.warp], 1u << self.lane);
  suspend(self);
}

unsigned char* shared_memory() {
  running("gfl::shared");
  return m.shared;
}

int sync_block(BlockOp op, int predicate, Site site) {
  Fiber& self = running(name_of(op));
  self.block_op = op;
  self.site = site;
  if (m.arrived++ == 0) {
    m.first_at_barrier = &self;
  } else {
    const Fiber& first = *m.first_at_barrier;
    if (first.block_op != op || first.site.line != site.line || std::strcmp(first.site.file, site.file) != 0) {
      fail("divergent barrier: it is at %s, %s, while thread %s waits at %s, %s", name_of(op), place(site).c_str(),
           place(first.index).c_str(), name_of(first.block_op), place(first.site).c_str());
    }
  }
  m.predicates += predicate != 0;
  if (m.arrived < m.threads) {
    self.wait = Wait::block;
    suspend(self);
    self.wait = Wait::nothing;
    return m.barrier_result;
  }
  const int count = static_cast<int>(m.predicates);
  m.barrier_result = op == BlockOp::count ? count : op == BlockOp::all ? m.predicates == m.threads : count > 0;
  m.arrived = m.predicates = 0;
  for (unsigned i = 0; i * kLanes < m.threads; ++i) {
    const unsigned lanes = m.warps[i].lanes & ~(i == self.warp ? 1u << self.lane : 0u);
    if (lanes != 0) make_ready(m.warps[i], lanes);
  }
  return m.barrier_result;
}

void launch(const LaunchConfig& config, void (*body)(void*), void* data) {
  if (m.current) fail("a kernel launched from within a kernel, %s", place(config.site).c_str());
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (note(check(config)) != cudaSuccess) return;
  m.launch = &config;
  m.body = body;
  m.data = data;
  blockDim = config.block;
  gridDim = config.grid;
  m.threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    if (!fiber.context.stack) {
      fiber.warp = i / kLanes;
      fiber.lane = i % kLanes;
      if (!create_context(fiber.context, i, fiber_main)) fail("no memory for the stack of thread %u", i);
    }
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
  }
  allocate_shared(config.smem);
  // A step that shares no factor with the number of blocks visits each once, in an order that looks random.
  const uint64_t blocks = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  uint64_t step = m.random.below(blocks) + 1, block = m.random.below(blocks);
  while (std::gcd(step, blocks) != 1) ++step;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t rest = block / gridDim.x;
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(rest % gridDim.y),
                static_cast<unsigned>(rest / gridDim.y)};
    run_block();
    block = (block + step) % blocks;
  }
  free_shared();
  m.launch = nullptr;
}

}  // namespace gfl_host
