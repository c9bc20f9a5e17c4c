// SPDX-License-Identifier: Apache-2.0
// Kernels without an error, one for each part of the vocabulary. The same file runs on a GPU: it is a plain program.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../../../cuda/launch.h"

namespace {

int failures = 0;
void expect(bool right, const char* what) {
  if (!right) {
    std::printf("wrong result: %s\n", what);
    ++failures;
  }
}

// A cudaMalloc'd array that is copied in and out.
template <class T> struct Device {
  T* data = nullptr;
  size_t count;
  explicit Device(size_t n) : count(n) { expect(cudaMalloc(&data, n * sizeof(T)) == cudaSuccess, "cudaMalloc"); }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice);
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  std::vector<T> get() const {
    std::vector<T> values(count);
    expect(cudaMemcpy(values.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "cudaMemcpy");
    return values;
  }
};

constexpr unsigned kAll = 0xffffffffu;

template <class T> __device__ T warp_sum(T value) {
  for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) sum_kernel(const T* in, int64_t n, T* out) {
  T* partial = gfl::shared<T>();
  T sum = 0;
  const int64_t step = int64_t{kThreads} * gridDim.x;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < n; i += step) sum += in[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = warp_sum(threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : T(0));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// Reduction by halves in shared memory: a barrier in a loop that every thread goes through.
__global__ void halves_kernel(const float* in, float* out) {
  float* values = gfl::shared<float>();
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) values[threadIdx.x] += values[threadIdx.x + step];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = values[0];
}

void reductions() {
  const int n = 10007, blocks = 5;
  std::vector<float> values(n);
  double total = 0;
  for (int i = 0; i < n; ++i) total += values[i] = static_cast<float>(i % 17);
  Device<float> in(values), out(blocks);
  GFL_LAUNCH((sum_kernel<float, 256>), blocks, 256, 8 * sizeof(float), nullptr, in.data, n, out.data);
  expect(cudaGetLastError() == cudaSuccess, "launch");
  double sum = 0;
  for (float part : out.get()) sum += part;
  expect(sum == total, "block reduction");

  Device<float> halves(4);
  GFL_LAUNCH(halves_kernel, 4, 512, 512 * sizeof(float), nullptr, in.data, halves.data);
  const std::vector<float> got = halves.get();
  for (int block = 0; block < 4; ++block) {
    float oracle = 0;
    for (int i = 0; i < 512; ++i) oracle += values[block * 512 + i];
    expect(got[block] == oracle, "reduction by halves");
  }
}

__global__ void compact_kernel(const int* in, int n, int* out, int* count) {
  const unsigned lane = threadIdx.x % 32;
  int base = 0;
  for (int start = 0; start < n; start += 32) {
    const int i = start + static_cast<int>(lane);
    const bool keep = i < n && in[i] % 3 == 0;
    const unsigned kept = __ballot_sync(kAll, keep);
    if (keep) out[base + __popc(kept & ((1u << lane) - 1u))] = in[i];
    base += __popc(kept);
  }
  if (lane == 0) *count = base;
}

__global__ void votes_kernel(int* out) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  int right = 1;
  right &= __any_sync(kAll, lane == 7) == 1 && __any_sync(kAll, 0) == 0;
  right &= __all_sync(kAll, 1) == 1 && __all_sync(kAll, lane != 7) == 0;
  right &= __shfl_sync(kAll, lane, 5) == 5 && __shfl_sync(kAll, lane, 3, 8) == (lane & ~7) + 3;
  right &= __shfl_up_sync(kAll, lane, 1) == (lane == 0 ? 0 : lane - 1);
  right &= __shfl_down_sync(kAll, lane, 4, 16) == (lane % 16 < 12 ? lane + 4 : lane);
  right &= __shfl_sync(kAll, 0.5 + lane, 31 - lane) == 31.5 - lane;
  right &= __match_any_sync(kAll, lane % 2) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u);
  right &= __reduce_max_sync(kAll, lane - 40) == -9 && __reduce_add_sync(kAll, 1u) == 32u;
  if (lane < 16) {  // half of the warp by itself, with its own mask
    right &= __shfl_xor_sync(0x0000ffffu, lane, 1, 16) == (lane ^ 1);
    __syncwarp(0x0000ffffu);
  }
  right &= __any_sync(kAll, lane == 20);  // where the other half may wait already
  right &= __syncthreads_count(tid % 2) == static_cast<int>(blockDim.x / 2);
  right &= __syncthreads_and(tid >= 0) != 0;
  right &= __syncthreads_or(tid == 33) != 0;
  right &= __ffs(8) == 4 && __ffsll(1ll << 40) == 41 && __clz(1) == 31 && __clzll(1) == 63 && __popcll(~0ull) == 64;
  right &= __float_as_uint(1.0f) == 0x3f800000u && __int_as_float(0x40000000) == 2.0f;
  out[blockIdx.x * blockDim.x + threadIdx.x] = right;
}

void warps() {
  std::vector<int> values(1001), oracle;
  for (int i = 0; i < 1001; ++i) {
    values[i] = (i * 7919) % 1000;
    if (values[i] % 3 == 0) oracle.push_back(values[i]);
  }
  Device<int> in(values), out(values.size()), count(1);
  GFL_LAUNCH(compact_kernel, 1, 32, 0, nullptr, in.data, static_cast<int>(values.size()), out.data, count.data);
  std::vector<int> got = out.get();
  got.resize(static_cast<size_t>(count.get()[0]));
  expect(got == oracle, "ballot compaction");

  Device<int> votes(3 * 96);
  GFL_LAUNCH(votes_kernel, 3, 96, 0, nullptr, votes.data);
  for (int right : votes.get()) expect(right == 1, "votes, shuffles and bits");
}

__global__ void histogram_kernel(const int* in, int n, int* bins, float* sum, unsigned* tickets, unsigned* last_block) {
  int* local = gfl::shared<int>();
  for (unsigned i = threadIdx.x; i < 16; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(n); i += gridDim.x * blockDim.x) {
    atomicAdd(&local[in[i]], 1);
    atomicAdd(sum, 1.0f);
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < 16; i += blockDim.x) atomicAdd(&bins[i], local[i]);
  __threadfence();
  if (threadIdx.x == 0 && atomicInc(tickets, gridDim.x - 1) == gridDim.x - 1) atomicMax(last_block, 1u);
}

void atomics() {
  std::vector<int> values(5000), oracle(16);
  for (int i = 0; i < 5000; ++i) ++oracle[values[i] = (i * i) % 16];
  Device<int> in(values), bins(16);
  Device<float> sum(1);
  Device<unsigned> tickets(1), last(1);
  cudaMemset(bins.data, 0, 16 * sizeof(int));
  cudaMemset(sum.data, 0, sizeof(float));
  cudaMemsetAsync(tickets.data, 0, sizeof(unsigned), nullptr);
  cudaMemsetAsync(last.data, 0, sizeof(unsigned), nullptr);
  GFL_LAUNCH(histogram_kernel, 7, 128, 16 * sizeof(int), nullptr, in.data, 5000, bins.data, sum.data, tickets.data,
             last.data);
  expect(bins.get() == oracle && sum.get()[0] == 5000.0f, "atomics histogram");
  expect(tickets.get()[0] == 0 && last.get()[0] == 1, "last block");
}

// Transposes tiles of 32 × 32 with blocks of 32 × 8.
__global__ void transpose_kernel(const float* in, int height, int width, float* out) {
  float* tile = gfl::shared<float>();
  const int x = static_cast<int>(blockIdx.x * 32 + threadIdx.x), y = static_cast<int>(blockIdx.y * 32 + threadIdx.y);
  for (int row = 0; row < 32; row += 8) {
    if (x < width && y + row < height) tile[(threadIdx.y + row) * 33 + threadIdx.x] = in[(y + row) * width + x];
  }
  __syncthreads();
  const int tx = static_cast<int>(blockIdx.y * 32 + threadIdx.x), ty = static_cast<int>(blockIdx.x * 32 + threadIdx.y);
  for (int row = 0; row < 32; row += 8) {
    if (tx < height && ty + row < width) out[(ty + row) * height + tx] = tile[threadIdx.x * 33 + threadIdx.y + row];
  }
}

void two_dimensions() {
  const int height = 45, width = 70;
  std::vector<float> values(height * width);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  Device<float> in(values), out(values.size());
  GFL_LAUNCH(transpose_kernel, dim3(3, 2), dim3(32, 8), 32 * 33 * sizeof(float), nullptr, in.data, height, width,
             out.data);
  const std::vector<float> got = out.get();
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) expect(got[x * height + y] == values[y * width + x], "transpose");
  }
}

__device__ float load(const float* p) { return __ldg(p); }
__device__ float load(const __half* p) { return __half2float(*p); }
__device__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void store(float* p, float value) { *p = value; }
__device__ void store(__half* p, float value) { *p = __float2half_rn(value); }
__device__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }

template <class T> __global__ void round_kernel(const float* in, int n, T* rounded, float* back) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    store(&rounded[i], in[i]);
    back[i] = load(&rounded[i]);
  }
}

// The nearest value with `digits` binary digits, ties to even, none smaller in magnitude than 2^exponent.
float nearest(float value, int digits, int exponent, float largest) {
  if (value == 0.0f || !std::isfinite(value)) return value;
  int own = 0;
  std::frexp(value, &own);
  const double unit = std::ldexp(1.0, std::max(own - digits, exponent));
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::fabs(rounded) > largest ? std::copysign(INFINITY, value) : static_cast<float>(rounded);
}

template <class T> void rounding(int digits, int exponent, float largest, const char* what) {
  std::vector<float> values = {0.0f,          1.0f,  65504.0f, 65519.996f,    65520.0f,      1e-8f,   5.9604645e-8f,
                               2.9802322e-8f, 3e-8f, 6.1e-5f,  8.9406967e-8f, 3.3895314e38f, 3.4e38f, INFINITY};
  uint32_t state = 12345;
  for (int i = 0; i < 4000; ++i) {
    state = state * 1664525u + 1013904223u;
    values.push_back(std::ldexp(static_cast<float>(state >> 8), static_cast<int>(state % 60) - 55));
  }
  for (size_t i = 0, count = values.size(); i < count; ++i) values.push_back(-values[i]);
  const int n = static_cast<int>(values.size());
  Device<float> in(values), back(values.size());
  Device<T> rounded(values.size());
  GFL_LAUNCH(round_kernel<T>, (n + 255) / 256, 256, 0, nullptr, in.data, n, rounded.data, back.data);
  const std::vector<float> got = back.get();
  for (int i = 0; i < n; ++i) {
    const float oracle = nearest(values[i], digits, exponent, largest);
    if (got[i] != oracle) std::printf("%.9g gives %.9g, not %.9g\n", values[i], got[i], oracle);
    expect(got[i] == oracle && std::signbit(got[i]) == std::signbit(oracle), what);
  }
  Device<float> nan(std::vector<float>{NAN}), nan_back(1);
  GFL_LAUNCH(round_kernel<T>, 1, 32, 0, nullptr, nan.data, 1, rounded.data, nan_back.data);
  expect(std::isnan(nan_back.get()[0]), what);
}

__global__ void vector_kernel(const float4* in, float4* out, int n) {
  float4* staged = gfl::shared<float4>();
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) staged[i] = in[i];
  __syncthreads();
  if (i < n) {
    const float4 v = staged[n - 1 - i];
    out[i] = make_float4(__fmul_rn(v.w, 2.0f), __fadd_rn(v.z, 1.0f), max(v.y, 3.0f), __expf(v.x - v.x));
  }
}

void vectors() {
  std::vector<float4> values(40);
  for (int i = 0; i < 40; ++i) values[i] = make_float4(i, i + 1, i + 2, i + 3);
  Device<float4> in(values), out(values.size());
  GFL_LAUNCH(vector_kernel, 1, 64, 40 * sizeof(float4), nullptr, in.data, out.data, 40);
  const std::vector<float4> got = out.get();
  for (int i = 0; i < 40; ++i) {
    const float4 v = values[39 - i];
    expect(got[i].x == v.w * 2 && got[i].y == v.z + 1, "float4");
    expect(got[i].z == std::fmax(v.y, 3.0f) && got[i].w == 1.0f, "float4");
  }
}

}  // namespace

int main() {
  reductions();
  warps();
  atomics();
  two_dimensions();
  rounding<float>(24, -149, 3.4028235e38f, "float");
  rounding<__half>(11, -24, 65504.0f, "half");
  rounding<__nv_bfloat16>(8, -133, 3.3895314e38f, "bfloat16");
  vectors();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
