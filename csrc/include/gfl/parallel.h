// SPDX-License-Identifier: Apache-2.0
// Runs a CPU kernel over its rows in parallel, for callers without a thread pool of their own (torch's is used by the
// Python package). Compile the calling file with OpenMP; without it the chunks run one after another.
#pragma once
#include <algorithm>
#include <cstdint>

namespace gfl {

// body(begin, end) for every chunk of [0, count). The bounds depend on `count` and `chunk` alone, never on the number of
// threads, so that results are the same bits at any.
template <class Body> void for_chunks(int64_t count, int64_t chunk, const Body& body) {
  chunk = std::max<int64_t>(1, chunk);
  const int64_t chunks = (std::max<int64_t>(0, count) + chunk - 1) / chunk;
#if defined(_OPENMP)
#pragma omp parallel for schedule(static) if (chunks > 1)
#endif
  for (int64_t i = 0; i < chunks; ++i) body(i * chunk, std::min(count, (i + 1) * chunk));
}

}  // namespace gfl
