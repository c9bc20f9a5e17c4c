// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime API in its host meaning. The device it claims to be has an H100's limits, but few multiprocessors:
// loops over the grid then go round more than once on inputs of a test's size.
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>

#include "runtime.h"

struct gfl_host_stream {};
struct gfl_host_event { std::chrono::steady_clock::time_point at; };

namespace {

constexpr int kMultiprocessors = 4;

std::mutex mutex;
std::map<const unsigned char*, size_t> allocations;
std::map<const void*, size_t> shared_limits;
thread_local cudaError_t last_error = cudaSuccess;

enum class Range { unknown, inside, outside };

// Whether [pointer, pointer + bytes) stays in the cudaMalloc'd block that it starts in.
Range range(const void* pointer, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* begin = static_cast<const unsigned char*>(pointer);
  auto block = allocations.upper_bound(begin);
  if (block == allocations.begin()) return Range::unknown;
  --block;
  const size_t offset = static_cast<size_t>(begin - block->first);
  if (offset > block->second || (offset == block->second && offset != 0)) return Range::unknown;
  return bytes <= block->second - offset ? Range::inside : Range::outside;
}

}  // namespace

namespace gfl_host {

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = shared_limits.find(kernel);
  return found == shared_limits.end() ? kDefaultSharedLimit : found->second;
}

}  // namespace gfl_host

using gfl_host::note;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (!pointer) return note(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(pointer, 256, bytes) != 0) {
    *pointer = nullptr;
    return note(cudaErrorMemoryAllocation);
  }
  std::memset(*pointer, gfl_host::garbage(), bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[static_cast<unsigned char*>(*pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (allocations.erase(static_cast<unsigned char*>(pointer)) == 0) return note(cudaErrorInvalidValue);
  }
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  if (!pointer) return note(cudaErrorInvalidValue);
  *pointer = std::malloc(bytes);
  return *pointer || bytes == 0 ? cudaSuccess : note(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  if (!to || !from) return note(cudaErrorInvalidValue);
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return note(cudaErrorInvalidMemcpyDirection);
  const Range target = range(to, bytes), source = range(from, bytes);
  if (target == Range::outside || source == Range::outside) return note(cudaErrorInvalidValue);
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  const bool backwards = (to_host && target == Range::inside) || (from_host && source == Range::inside);
  if (backwards) return note(cudaErrorInvalidValue);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  if (!to || range(to, bytes) == Range::outside) return note(cudaErrorInvalidValue);
  std::memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new gfl_host_stream;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new gfl_host_event;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->at = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->at - begin->at).count();
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define GFL_HOST_NAME(name) \
  case name: return #name;
    GFL_HOST_NAME(cudaSuccess)
    GFL_HOST_NAME(cudaErrorInvalidValue)
    GFL_HOST_NAME(cudaErrorMemoryAllocation)
    GFL_HOST_NAME(cudaErrorInvalidConfiguration)
    GFL_HOST_NAME(cudaErrorInvalidMemcpyDirection)
    GFL_HOST_NAME(cudaErrorInvalidDeviceFunction)
    GFL_HOST_NAME(cudaErrorNoDevice)
    GFL_HOST_NAME(cudaErrorInvalidDevice)
    GFL_HOST_NAME(cudaErrorInvalidResourceHandle)
    GFL_HOST_NAME(cudaErrorNotReady)
    GFL_HOST_NAME(cudaErrorIllegalAddress)
    GFL_HOST_NAME(cudaErrorNotSupported)
    GFL_HOST_NAME(cudaErrorUnknown)
#undef GFL_HOST_NAME
  }
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : note(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return note(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = gfl_host::kMaxThreads; return cudaSuccess;
    case cudaDevAttrMaxBlockDimX: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxBlockDimY: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxBlockDimZ: *value = 64; return cudaSuccess;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; return cudaSuccess;
    case cudaDevAttrMaxGridDimY: *value = 65535; return cudaSuccess;
    case cudaDevAttrMaxGridDimZ: *value = 65535; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = gfl_host::kDefaultSharedLimit; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = gfl_host::kMaxSharedLimit; return cudaSuccess;
  }
  return note(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  const size_t bytes = static_cast<size_t>(value);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || bytes > gfl_host::kMaxSharedLimit) {
    return note(cudaErrorInvalidValue);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t smem) {
  if (threads < 1) return note(cudaErrorInvalidValue);
  *blocks = threads > gfl_host::kMaxThreads || smem > gfl_host::shared_limit(kernel) ? 0 : 1;
  return cudaSuccess;
}
