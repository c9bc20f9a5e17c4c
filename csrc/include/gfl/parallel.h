// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels share out their work: in chunks whose bounds depend on the sizes alone, never on the number of
// threads, so that the results are the same bits at any.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

namespace gfl {

// What a launcher of several steps is given to run each of them: calls body(begin, end) for every chunk of [0, count),
// on any threads and in any order, and returns when all are done. The caller brings its own thread pool or OpenMP's,
// below.
using ParallelFor =
    std::function<void(int64_t count, int64_t chunk, const std::function<void(int64_t begin, int64_t end)>& body)>;

// For callers without a thread pool. Compile the calling file with OpenMP; without it the chunks run one after another.
template <class Body> void for_chunks(int64_t count, int64_t chunk, const Body& body) {
  chunk = std::max<int64_t>(1, chunk);
  const int64_t chunks = (std::max<int64_t>(0, count) + chunk - 1) / chunk;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (chunks > 1)
#endif
  for (int64_t i = 0; i < chunks; ++i) body(i * chunk, std::min(count, (i + 1) * chunk));
}

}  // namespace gfl
