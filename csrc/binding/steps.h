// SPDX-License-Identifier: Apache-2.0
// For operators whose CPU launcher runs several steps.
#pragma once
#include "gfl/parallel.h"
#include "operator.h"

namespace gfl::binding {

// Runs one operator where `t` is: the launch on its device's current stream, or `kernel`, which takes the ParallelFor
// that runs each of its steps in torch's thread pool. `launch` is GFL_CUDA_LAUNCH(function, arguments).
template <class Launch, class Kernel> void run(const at::Tensor& t, const Launch& launch, const Kernel& kernel) {
#if defined(GFL_WITH_CUDA)
  if (t.is_cuda()) return on_stream_of(t, launch);
#endif
  kernel([](int64_t count, int64_t chunk, const auto& body) { for_chunks(count, chunk, body); });
}

}  // namespace gfl::binding
