// SPDX-License-Identifier: Apache-2.0
// What every binding needs: checks with the argument's name, dtypes, chunks of work on the CPU, device and stream on
// the GPU, and registration with the dispatcher and the Python module.
//
// The Python functions check what a user passes and explain what is wrong; the checks here keep a direct call of an
// operator memory-safe.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(GFL_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

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

// Runs body(begin, end) over fixed chunks of [0, count) in torch's own thread pool. The bounds depend on the sizes
// alone, so a kernel that sums within its chunk gives the same bits with any number of threads.
template <class Body> void for_chunks(int64_t count, int64_t chunk, const Body& body) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i * chunk, std::min(count, (i + 1) * chunk));
  });
}

// How many rows of `width` elements make a chunk: enough work to pay for a thread, few enough to share out evenly.
inline int64_t rows_per_chunk(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// Runs an operator on the device of `t`: the launch on its current stream, or the CPU kernel in fixed chunks of
// [0, count). `launch` is GFL_CUDA_LAUNCH(function, arguments); `kernel` takes the bounds of a chunk.
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
// Makes the tensor's device current and passes its current stream to `launch`, whose error becomes an exception.
template <class Launch> void on_stream_of(const at::Tensor& t, const Launch& launch) {
  const c10::cuda::CUDAGuard guard(t.device());
  C10_CUDA_CHECK(launch(c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

// --- The Python module ---------------------------------------------------------------------------------------------

// What pybind11 converts an argument to: a vector for a view of one.
template <class T> struct Converted { using type = std::decay_t<T>; };
template <class T> struct Converted<c10::ArrayRef<T>> { using type = std::vector<T>; };

template <class R, class... A> void expose(pybind11::module_& module, const char* name, R (*function)(A...)) {
  module.def(name, [function](const typename Converted<A>::type&... values) -> R { return function(values...); });
}

// Each GFL_OPERATOR adds itself here while the library loads; the Python module walks the list once.
struct EntryPoint {
  using Expose = void (*)(pybind11::module_&);
  explicit EntryPoint(Expose expose) { all().push_back(expose); }
  static std::vector<Expose>& all() {
    static std::vector<Expose> list;
    return list;
  }
};

}  // namespace gfl::binding

#if defined(GFL_WITH_CUDA)
#define GFL_CUDA_LAUNCH(function, ...) [&](cudaStream_t stream) { return cuda::function(__VA_ARGS__, stream); }
#define GFL_REGISTER_CUDA(name, function) \
  TORCH_LIBRARY_IMPL(gfl, CUDA, m) { m.impl(#name, TORCH_FN(function)); }
#else
#define GFL_CUDA_LAUNCH(function, ...) 0
#define GFL_REGISTER_CUDA(name, function)
#endif

// Registers `function` for the operator gfl::<name> on the CPU and the GPU, and as gfl_ops._C.<function>.
#define GFL_OPERATOR(name, function) \
  GFL_OPERATOR_CPU(name, function)   \
  GFL_REGISTER_CUDA(name, function)
#define GFL_OPERATOR_CPU(name, function)                                 \
  TORCH_LIBRARY_IMPL(gfl, CPU, m) { m.impl(#name, TORCH_FN(function)); } \
  static const ::gfl::binding::EntryPoint entry_point_of_##function(     \
      [](pybind11::module_& module) { ::gfl::binding::expose(module, #function, &function); });
