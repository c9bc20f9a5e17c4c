// SPDX-License-Identifier: Apache-2.0
// gfl::for_chunks visits every index once, in the chunks that its arguments say.
#include "gfl/parallel.h"

#include <cstdio>
#include <vector>

int main() {
  int failures = 0;
  for (const int64_t count : {0, 1, 7, 8, 9, 1000}) {
    for (const int64_t chunk : {1, 8, 5000}) {
      std::vector<int> visits(static_cast<size_t>(count), 0);
      std::vector<int> bounds(static_cast<size_t>(count), 1);
      gfl::for_chunks(count, chunk, [&](int64_t begin, int64_t end) {
        bounds[static_cast<size_t>(begin)] = begin % chunk == 0 && end - begin <= chunk;
        for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
      });
      for (size_t i = 0; i < visits.size(); ++i) {
        if (visits[i] == 1 && bounds[i] == 1) continue;
        std::printf("count %lld chunk %lld: index %zu visited %d times\n", static_cast<long long>(count),
                    static_cast<long long>(chunk), i, visits[i]);
        ++failures;
      }
    }
  }
  return failures == 0 ? 0 : 1;
}
