// SPDX-License-Identifier: Apache-2.0
// One error a kernel. `bad CASE` runs one of them, which the layer has to catch: by a message, by AddressSanitizer or
// by a result that is wrong under some seed.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../../cuda/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 256;

__global__ void missing_barrier(int* out) {
  int* values = gfl::shared<int>();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}
// The barrier between reading a buffer and filling it again is not there.
__global__ void missing_second_barrier(int* out) {
  int* total = gfl::shared<int>();
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) *total = round;
    __syncthreads();
    out[threadIdx.x] = round == 0 ? *total : out[threadIdx.x] + *total;
  }
}
__global__ void missing_syncwarp(int* out) {
  int* values = gfl::shared<int>();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
__global__ void unset_shared(int* out) {
  int* sum = gfl::shared<int>();
  __syncthreads();
  if (out[threadIdx.x] == 0) atomicAdd(sum, 1);
  __syncthreads();
  out[threadIdx.x] = *sum;
}
// Takes slots in the order of arrival and relies on it.
__global__ void order_of_atomics(int* out) { out[atomicAdd(&out[kThreads], 1)] = static_cast<int>(threadIdx.x); }

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void two_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
__global__ void early_return(int* out) {
  if (threadIdx.x >= 200) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void absent_lane(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 16);
}
__global__ void exited_lane(int* out) {
  if (threadIdx.x % 32 == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}
// Three groups of lanes wait for each other in a circle.
__global__ void lanes_never_arrive(int* out) {
  const unsigned masks[] = {0x0000ffffu, 0x00ffff00u, 0x00ff00ffu}, group = threadIdx.x / 8;
  if (group < 3) __syncwarp(masks[group]);
  out[threadIdx.x] = 1;
}
__global__ void mask_mismatch(int* out) {
  out[threadIdx.x] = __any_sync(threadIdx.x % 32 == 3 ? 0x0000ffffu : kAll, 1);
}
__global__ void mask_without_caller(int* out) { out[threadIdx.x] = __any_sync(0x0000ffffu, 1); }
__global__ void uneven_loop(int* out) {
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < 300; i += 32) sum += __shfl_xor_sync(kAll, i, 1);
  out[threadIdx.x] = __shfl_sync(kAll, sum, 0);
}
__global__ void endless_loop(int* out) {
  while (atomicAdd(&out[threadIdx.x], 0) != 12345) {}
}

__global__ void shared_read(int* out) { out[threadIdx.x] = gfl::shared<int>()[threadIdx.x + 1]; }
__global__ void shared_overrun(int* out) {
  gfl::shared<int>()[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}
__global__ void shared_underrun(int* out) {
  gfl::shared<int>()[static_cast<int>(threadIdx.x) - 1] = 1;
  out[threadIdx.x] = 1;
}
__global__ void global_read(int* out) { out[threadIdx.x] = out[threadIdx.x + 2]; }
__global__ void local_overrun(int* out) {
  int local[4] = {0, 1, 2, 3};
  out[threadIdx.x] = local[(threadIdx.x + static_cast<unsigned>(out[0])) % 5];
}
__global__ void misaligned_float4(int* out) {
  const float4 v = *reinterpret_cast<const float4*>(out + 1 + 4 * (threadIdx.x % 2));
  out[threadIdx.x] = static_cast<int>(v.x);
}

}  // namespace

int main(int argc, char** argv) {
  const char* wanted = argc > 1 ? argv[1] : "";
  int* out = nullptr;
  cudaMalloc(&out, (kThreads + 1) * sizeof(int));
  cudaMemset(out, 0, (kThreads + 1) * sizeof(int));
  std::vector<int> got(kThreads);
  bool known = false;
  const auto is = [&](const char* name) {
    const bool same = std::strcmp(name, wanted) == 0;
    known |= same;
    return same;
  };
  const auto finish = [&](auto&& right) {
    cudaDeviceSynchronize();
    cudaMemcpy(got.data(), out, kThreads * sizeof(int), cudaMemcpyDeviceToHost);
    for (int i = 0; i < kThreads; ++i) {
      if (got[i] != right(i)) {
        std::printf("wrong result: thread %d has %d\n", i, got[i]);
        return 1;
      }
    }
    return 0;
  };
  const size_t words = kThreads * sizeof(int);
  if (is("missing_barrier")) {
    GFL_LAUNCH(missing_barrier, 1, kThreads, words, nullptr, out);
    return finish([](int i) { return kThreads - 1 - i; });
  }
  if (is("missing_second_barrier")) {
    GFL_LAUNCH(missing_second_barrier, 1, kThreads, sizeof(int), nullptr, out);
    return finish([](int) { return 6; });
  }
  if (is("missing_syncwarp")) {
    GFL_LAUNCH(missing_syncwarp, 1, kThreads, words, nullptr, out);
    return finish([](int i) { return i ^ 1; });
  }
  if (is("unset_shared")) {
    GFL_LAUNCH(unset_shared, 1, kThreads, sizeof(int), nullptr, out);
    return finish([](int) { return kThreads; });
  }
  if (is("order_of_atomics")) {
    GFL_LAUNCH(order_of_atomics, 1, kThreads, 0, nullptr, out);
    return finish([](int i) { return i; });
  }
  if (is("use_after_free")) {
    cudaFree(out);
    GFL_LAUNCH(divergent_barrier, 1, 1, 0, nullptr, out);
  }
  if (is("no_shared_asked_for")) GFL_LAUNCH(shared_read, 1, 32, 0, nullptr, out);
#define CASE(name, threads, smem) \
  if (is(#name)) GFL_LAUNCH(name, 2, threads, smem, nullptr, out);
  CASE(divergent_barrier, 64, 0)
  CASE(two_barriers, 64, 0)
  CASE(early_return, kThreads, 0)
  CASE(absent_lane, 32, 0)
  CASE(exited_lane, 64, 0)
  CASE(lanes_never_arrive, 32, 0)
  CASE(mask_mismatch, 64, 0)
  CASE(mask_without_caller, 64, 0)
  CASE(uneven_loop, 32, 0)
  CASE(endless_loop, 32, 0)
  CASE(shared_read, 32, 128)
  CASE(shared_overrun, 32, 128)
  CASE(shared_underrun, 32, 128)
  CASE(global_read, kThreads, 0)
  CASE(local_overrun, 32, 0)
  CASE(misaligned_float4, 32, 0)
  if (!known) std::printf("unknown case %s\n", wanted);
  return known ? 0 : 2;
}
