// SPDX-License-Identifier: Apache-2.0
// Launches and rendezvous: what runtime.cpp offers to the vocabulary of cuda_runtime.h.
#pragma once
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

// One block runs at a time and each switch of threads sets threadIdx, so plain variables do.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace gfl_host {

// Place of a call in the kernel's source; a default argument takes the caller's line.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

enum class BlockOp { sync, count, all, any };
enum class WarpOp {
  sync,
  shuffle_index,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  all,
  any,
  match_any,
  add,
  min_signed,
  max_signed,
  min_unsigned,
  max_unsigned,
  bit_and,
  bit_or,
  bit_xor
};

// Waits for every thread of the block; the result is that of __syncthreads_count, _and or _or.
int sync_block(BlockOp op, int predicate, Site site);
// Waits for every lane of `mask`; `argument` and `width` are those of a shuffle.
uint64_t sync_warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Site site);
// A point at which another thread of the block may run first.
void maybe_yield();
// Dynamic shared memory of the running block.
unsigned char* shared_memory();
// Ends the process with exit code 86, naming kernel, block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
// Starts the sequence of random orders anew; without a call the environment's GFL_HOST_SEED counts.
extern "C" void gfl_host_set_seed(uint64_t seed);

struct LaunchConfig {
  const char* name;
  Site site;
  const void* kernel;
  dim3 grid, block;
  size_t smem;
};
void launch(const LaunchConfig& config, void (*body)(void*), void* data);

// `launcher(…)(arguments…)` is what `kernel<<<…>>>(arguments…)` is under nvcc: arguments are converted to the kernel's
// parameters once, at the launch, and copied for every thread.
template <class... P> struct Launcher {
  LaunchConfig config;
  void (*kernel)(P...);
  void operator()(P... parameters) const {
    static_assert((std::is_trivially_copyable<P>::value && ...), "a kernel's parameters are copied byte by byte");
    struct Call {
      void (*kernel)(P...);
      std::tuple<P...> parameters;
      static void run(void* data) {
        const Call& self = *static_cast<Call*>(data);
        std::apply(self.kernel, self.parameters);
      }
    } call{kernel, std::tuple<P...>(parameters...)};
    launch(config, &Call::run, &call);
  }
};
template <class... P>
Launcher<P...> launcher(const char* name, Site site, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                        cudaStream_t) {
  return {{name, site, reinterpret_cast<const void*>(kernel), grid, block, smem}, kernel};
}

template <class T> uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a lane hands over at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T> T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T> T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, Site site) {
  return from_bits<T>(sync_warp(op, mask, to_bits(value), argument, width, site));
}

}  // namespace gfl_host

#define GFL_LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::gfl_host::launcher(#kernel, ::gfl_host::Site::here(), kernel, (grid), (block), (smem), (stream))(__VA_ARGS__)

namespace gfl {
template <class T> T* shared() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16 bytes");
  return reinterpret_cast<T*>(gfl_host::shared_memory());
}
}  // namespace gfl
