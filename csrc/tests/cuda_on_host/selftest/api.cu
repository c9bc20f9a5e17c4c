// SPDX-License-Identifier: Apache-2.0
// Limits of a launch and errors of the runtime API, as an H100 reports them; runs on a GPU too.
#include <cuda_runtime.h>

#include <cstdio>

#include "../../../cuda/launch.h"

namespace {

int failures = 0;
void expect(cudaError_t got, cudaError_t right, const char* what) {
  if (got == right) return;
  std::printf("%s: %s instead of %s\n", what, cudaGetErrorString(got), cudaGetErrorString(right));
  ++failures;
}

__global__ void count_kernel(int* count) {
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) atomicAdd(count, 1);
}
template <class T> __global__ void shared_kernel(T* out, int n) {
  T* values = gfl::shared<T>();
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) values[i] = static_cast<T>(i);
  __syncthreads();
  if (threadIdx.x == 0) *out = values[n - 1];
}

}  // namespace

int main() {
  int* count = nullptr;
  expect(cudaMalloc(&count, sizeof(int)), cudaSuccess, "cudaMalloc");
  expect(cudaMemset(count, 0, sizeof(int)), cudaSuccess, "cudaMemset");
  cudaStream_t stream = nullptr;
  expect(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess, "cudaStreamCreateWithFlags");

  const auto launched = [&](dim3 grid, dim3 block, size_t smem) {
    GFL_LAUNCH(count_kernel, grid, block, smem, stream, count);
    const cudaError_t error = cudaGetLastError();
    return error;
  };
  expect(launched(3, 1024, 0), cudaSuccess, "1024 threads");
  expect(launched(dim3(2, 3, 4), dim3(8, 4, 4), 48 * 1024), cudaSuccess, "three dimensions");
  expect(launched(1, 1025, 0), cudaErrorInvalidConfiguration, "1025 threads");
  expect(launched(1, dim3(32, 33), 0), cudaErrorInvalidConfiguration, "32 x 33 threads");
  expect(launched(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration, "65 threads deep");
  expect(launched(0, 32, 0), cudaErrorInvalidConfiguration, "no block");
  expect(launched(1, 0, 0), cudaErrorInvalidConfiguration, "no thread");
  expect(launched(dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration, "65536 rows of blocks");
  expect(launched(1, 32, 48 * 1024 + 1), cudaErrorInvalidValue, "shared memory beyond the default");
  expect(cudaGetLastError(), cudaSuccess, "an error is reported once");
  expect(cudaStreamSynchronize(stream), cudaSuccess, "cudaStreamSynchronize");
  int blocks = 0;
  expect(cudaMemcpy(&blocks, count, sizeof(int), cudaMemcpyDeviceToHost), cudaSuccess, "cudaMemcpy");
  if (blocks != 27) {
    std::printf("%d blocks ran instead of 27\n", blocks);
    ++failures;
  }

  int limit = 0;
  expect(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess,
         "cudaDeviceGetAttribute");
  expect(cudaFuncSetAttribute(shared_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit + 1),
         cudaErrorInvalidValue, "shared memory beyond the device's");
  cudaGetLastError();
  expect(cudaFuncSetAttribute(shared_kernel<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), cudaSuccess,
         "all shared memory");
  float* last = nullptr;
  expect(cudaMallocAsync(&last, sizeof(float), stream), cudaSuccess, "cudaMallocAsync");
  const int n = limit / static_cast<int>(sizeof(float));
  GFL_LAUNCH(shared_kernel<float>, 1, 256, static_cast<size_t>(limit), stream, last, n);
  expect(cudaGetLastError(), cudaSuccess, "launch with all shared memory");
  float value = 0;
  expect(cudaMemcpyAsync(&value, last, sizeof value, cudaMemcpyDeviceToHost, stream), cudaSuccess, "cudaMemcpyAsync");
  expect(cudaStreamSynchronize(stream), cudaSuccess, "cudaStreamSynchronize");
  if (value != static_cast<float>(n - 1)) {
    std::printf("last float of shared memory is %g\n", static_cast<double>(value));
    ++failures;
  }
  expect(cudaFreeAsync(last, stream), cudaSuccess, "cudaFreeAsync");

#if defined(GFL_CUDA_ON_HOST)  // a GPU rounds allocations up and may not notice
  int two[2] = {0, 0};
  expect(cudaMemcpy(two, count, sizeof two, cudaMemcpyDeviceToHost), cudaErrorInvalidValue, "copy past the end");
  expect(cudaMemset(count, 0, sizeof two), cudaErrorInvalidValue, "set past the end");
  expect(cudaMemcpy(two, count, sizeof(int), cudaMemcpyHostToDevice), cudaErrorInvalidValue,
         "copy in the wrong direction");
  cudaGetLastError();
#endif
  expect(cudaFree(count), cudaSuccess, "cudaFree");
  expect(cudaFree(nullptr), cudaSuccess, "cudaFree of nothing");
  expect(cudaStreamDestroy(stream), cudaSuccess, "cudaStreamDestroy");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
