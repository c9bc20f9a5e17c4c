// SPDX-License-Identifier: Apache-2.0
// Must not compile on the host layer: a static array would be neither poisoned nor checked for its bounds.
#include <cuda_runtime.h>

__global__ void kernel() {
  __shared__ float values[32];
  values[threadIdx.x] = 0.0f;
}
