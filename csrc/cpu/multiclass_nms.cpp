// SPDX-License-Identifier: Apache-2.0
// The candidates of multiclass NMS on the CPU: one pass over the scores to count, one to gather.
#include "gfl/select.h"

#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

// Calls take(row, class) for every candidate in order.
template <class S, class Take> void each_candidate(const MulticlassInput& in, const Take& take) {
  const acc_t<S> threshold = static_cast<acc_t<S>>(in.score_threshold);
  for (int64_t row = 0; row < in.rows; ++row) {
    const S* score = static_cast<const S*>(in.scores) + row * in.stride_row;
    for (int64_t c = 0; c < in.classes; ++c) {
      if (load(score + c * in.stride_class) > threshold) take(row, c);
    }
  }
}

}  // namespace

int64_t multiclass_count(const MulticlassInput& in) {
  int64_t count = 0;
  dispatch(in.score_dtype, [&](auto s) { each_candidate<decltype(s)>(in, [&](int64_t, int64_t) { ++count; }); });
  return count;
}

void multiclass_gather(const MulticlassInput& in, void* boxes, void* scores, int64_t* labels) {
  dispatch(in.score_dtype, [&](auto s) {
    using S = decltype(s);
    dispatch(in.dtype, [&](auto t) {
      using T = decltype(t);
      T* box = static_cast<T*>(boxes);
      S* score = static_cast<S*>(scores);
      each_candidate<S>(in, [&](int64_t row, int64_t c) {
        const T* from = static_cast<const T*>(in.boxes) + row * in.stride_box;
        if (in.per_class) from += 4 * c * in.stride_coordinate;
        for (int64_t j = 0; j < 4; ++j) *box++ = from[j * in.stride_coordinate];
        *score++ = static_cast<const S*>(in.scores)[row * in.stride_row + c * in.stride_class];
        *labels++ = c;
      });
    });
  });
}

}  // namespace gfl::cpu
