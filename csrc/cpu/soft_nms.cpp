// SPDX-License-Identifier: Apache-2.0
// Soft-NMS on the CPU: what is done once per call; a class is walked by the vector code in simd/soft_nms.cpp.
#include "gfl/select.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "terms/scalar.h"
#include "sort.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void soft_nms_class(const SoftNmsInput& in, const int64_t* order, int64_t count, void* scratch,
                                        void* final_scores, uint8_t* keep))
GFL_DECLARE_PER_ISA(int64_t soft_nms_class_scratch_bytes(int64_t count, DType dtype))
}  // namespace gfl

namespace gfl::cpu {
namespace {

void soft_nms_class(const SoftNmsInput& in, const int64_t* order, int64_t count, void* scratch, void* final_scores,
                    uint8_t* keep) {
  GFL_BY_ISA(soft_nms_class, in, order, count, scratch, final_scores, keep);
}

template <class A> A score_of(const SoftNmsInput& in, int64_t i) {
  return dispatch(in.score_dtype, [&](auto t) {
    return static_cast<A>(load(static_cast<const decltype(t)*>(in.scores) + i * in.stride_score));
  });
}

template <class A>
int64_t collect(const SoftNmsInput& in, const A* final_scores, const uint8_t* keep, int64_t* indices, float* scores) {
  using Key = decltype(falling_key(A{}));
  std::vector<Keyed<Key>> kept;
  for (int64_t i = 0; i < in.count; ++i) {
    if (keep[i] != 0) kept.push_back({falling_key(final_scores[i]), i});
  }
  sort_stable(kept);
  for (size_t i = 0; i < kept.size(); ++i) {
    indices[i] = kept[i].index;
    scores[i] = static_cast<float>(final_scores[kept[i].index]);
  }
  if (!kept.empty() || in.count == 0) return static_cast<int64_t>(kept.size());
  int64_t best = 0;
  for (int64_t i = 1; i < in.count; ++i) {
    if (falling_key(score_of<A>(in, i)) < falling_key(score_of<A>(in, best))) best = i;
  }
  indices[0] = best;
  scores[0] = static_cast<float>(score_of<A>(in, best));
  return 1;
}

}  // namespace

void soft_nms(const SoftNmsInput& in, const int64_t* grouped, const int64_t* bounds, void* final_scores, uint8_t* keep,
              int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int64_t s = begin; s < end; ++s) largest = std::max(largest, bounds[s + 1] - bounds[s]);
  const auto bytes = static_cast<size_t>(portable::soft_nms_class_scratch_bytes(largest, in.dtype));
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[bytes]);
  for (int64_t s = begin; s < end; ++s) {
    soft_nms_class(in, grouped + bounds[s], bounds[s + 1] - bounds[s], scratch.get(), final_scores, keep);
  }
}

int64_t soft_nms_collect(const SoftNmsInput& in, const void* final_scores, const uint8_t* keep, int64_t* indices,
                         float* scores) {
  if (in.dtype == DType::f64) return collect(in, static_cast<const double*>(final_scores), keep, indices, scores);
  return collect(in, static_cast<const float*>(final_scores), keep, indices, scores);
}

}  // namespace gfl::cpu
