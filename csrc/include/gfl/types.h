// SPDX-License-Identifier: Apache-2.0
// Types shared by every launcher of the C++ API. No header of torch, none of the CUDA toolkit.
#pragma once
#include <cstdint>

#if defined(GFL_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace gfl {

// Element type of a tensor that a launcher takes as `const void*`.
enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };

}  // namespace gfl
