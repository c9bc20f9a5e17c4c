// SPDX-License-Identifier: Apache-2.0
// What every binding needs: checks with the argument's name, dtypes, the CPU's chunks and the GPU's device and stream.
//
// The Python functions check what a user passes and say it in full; the checks here are the ones that keep a direct call
// of an operator memory-safe.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(GFL_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "direct.h"
#include "gfl/types.h"

namespace gfl::binding {

using OptionalTensor = std::optional<at::Tensor>;
using Needs2 = std::array<bool, 2>;
using Needs3 = std::array<bool, 3>;

inline DType dtype_of(const at::Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    case at::kDouble: return DType::f64;
    default: TORCH_CHECK_TYPE(false, "gfl: `", argument, "` must be fp32, fp16, bf16 or fp64, got ", t.scalar_type());
  }
}

// The dtype of arithmetic, losses and per-row inputs: fp64 for fp64, else fp32.
inline at::ScalarType accumulator_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_dtype(const at::Tensor& t, at::ScalarType expected, const char* argument) {
  TORCH_CHECK_TYPE(t.scalar_type() == expected, "gfl: `", argument, "` must be ", expected, ", got ", t.scalar_type());
}

inline void check_shape(const at::Tensor& t, at::IntArrayRef expected, const char* argument) {
  TORCH_CHECK_VALUE(t.sizes() == expected, "gfl: `", argument, "` must have shape ", expected, ", got ", t.sizes());
}

inline void check_dim(const at::Tensor& t, int64_t expected, const char* argument) {
  TORCH_CHECK_VALUE(t.dim() == expected, "gfl: `", argument, "` must have ", expected, " dimensions, got ", t.sizes());
}

inline void check_device(const at::Tensor& t, const at::Tensor& other, const char* argument) {
  TORCH_CHECK_VALUE(t.device() == other.device(), "gfl: `", argument, "` must be on ", other.device(), ", got ",
                    t.device());
}

// Runs body(begin, end) over fixed chunks of [0, count) in torch's own thread pool. The bounds depend on the sizes alone,
// never on the number of threads, so that a kernel which sums within its chunk gives the same bits at any.
template <class Body> void for_chunks(int64_t count, int64_t chunk, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i * chunk, std::min(count, (i + 1) * chunk));
  });
}

// Rows of `width` elements a chunk: enough work to pay for a thread, few enough to share out.
inline int64_t rows_per_chunk(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// Runs one operator where `t` is: the launch on its device's current stream, or the CPU kernel in fixed chunks of
// [0, count). `launch` is GFL_CUDA_LAUNCH(function, arguments), `kernel` takes the bounds of a chunk.
template <class Launch, class Kernel>
void run(const at::Tensor& t, int64_t count, int64_t chunk, const Launch& launch, const Kernel& kernel) {
#if defined(GFL_WITH_CUDA)
  if (t.is_cuda()) {
    const c10::cuda::CUDAGuard guard(t.device());
    C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream().stream()));
    return;
  }
#endif
  for_chunks(count, chunk, kernel);
}

#if defined(GFL_WITH_CUDA)
// Makes the tensor's device current and hands its current stream to `launch`, whose error becomes an exception.
template <class Launch> void on_stream_of(const at::Tensor& t, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(t.device());
  C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

}  // namespace gfl::binding

#if defined(GFL_WITH_CUDA)
#define GFL_CUDA_LAUNCH(function, ...) [&](cudaStream_t stream) { return cuda::function(__VA_ARGS__, stream); }
#define GFL_REGISTER_CUDA(name, function) \
  TORCH_LIBRARY_IMPL(gfl, CUDA, m) { m.impl(#name, TORCH_FN(function)); }
#else
#define GFL_CUDA_LAUNCH(function, ...) 0
#define GFL_REGISTER_CUDA(name, function)
#endif

// Registers `function` for the operator gfl::<name> on the CPU and the GPU, and as gfl_ops._C.<function>. A function that
// records its own gradient is an entry point only.
#define GFL_OPERATOR(name, function) \
  GFL_OPERATOR_CPU(name, function)   \
  GFL_REGISTER_CUDA(name, function)
#define GFL_OPERATOR_CPU(name, function)                                    \
  TORCH_LIBRARY_IMPL(gfl, CPU, m) { m.impl(#name, TORCH_FN(function)); }    \
  GFL_ENTRY_POINT(function, false)
#define GFL_ENTRY_POINT(function, records)                                  \
  static const ::gfl::binding::EntryPoint entry_point_of_##function(        \
      [](::gfl::binding::Entries& entries) { entries.add(#function, &function, records); });
