// SPDX-License-Identifier: Apache-2.0
// What runtime.cpp and api.cpp share and no kernel sees.
#pragma once
#include "cuda_on_host.h"

#if defined(__SANITIZE_ADDRESS__)
#define GFL_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GFL_HOST_ASAN 1
#endif
#endif
#if defined(GFL_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace gfl_host {

constexpr int kMaxThreads = 1024;                  // of a block
constexpr size_t kDefaultSharedLimit = 48 * 1024;  // without cudaFuncSetAttribute
constexpr size_t kMaxSharedLimit = 227 * 1024;     // with it, on sm_90

// A byte for memory that has not been written.
unsigned char garbage();
// Dynamic shared memory that the kernel may be launched with.
size_t shared_limit(const void* kernel);
// Keeps an error for cudaGetLastError, and returns it.
cudaError_t note(cudaError_t error);

}  // namespace gfl_host
