// SPDX-License-Identifier: Apache-2.0
// NMS on the CPU: sorting and grouping; a class is walked by the vector code in simd/nms.cpp.
#include "gfl/select.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "isa.h"
#include "terms/scalar.h"
#include "sort.h"

namespace gfl {
GFL_DECLARE_PER_ISA(void nms_class(const NmsInput& in, const int64_t* order, int64_t count, void* scratch,
                                   uint8_t* keep))
GFL_DECLARE_PER_ISA(int64_t nms_class_scratch_bytes(int64_t count, DType dtype))
}  // namespace gfl

namespace gfl::cpu {
namespace {

void nms_class(const NmsInput& in, const int64_t* order, int64_t count, void* scratch, uint8_t* keep) {
  GFL_BY_ISA(nms_class, in, order, count, scratch, keep);
}

template <class T> void order_by(const T* scores, int64_t stride, int64_t count, int64_t* order) {
  using Key = decltype(falling_key(acc_t<T>{}));
  std::vector<Keyed<Key>> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) items[static_cast<size_t>(i)] = {falling_key(load(scores + i * stride)), i};
  sort_stable(items);
  for (int64_t i = 0; i < count; ++i) order[i] = items[static_cast<size_t>(i)].index;
}

}  // namespace

void order_by_score(const void* scores, DType dtype, int64_t stride, int64_t count, int64_t* order) {
  dispatch(dtype, [&](auto t) { order_by(static_cast<const decltype(t)*>(scores), stride, count, order); });
}

int64_t group_by_class(const int64_t* classes, const int64_t* order, int64_t count, int64_t* grouped, int64_t* bounds) {
  bounds[0] = 0;
  if (classes == nullptr) {
    if (grouped != order) std::copy(order, order + count, grouped);
    bounds[count > 0 ? 1 : 0] = count;
    return count > 0 ? 1 : 0;
  }
  std::vector<Keyed<uint64_t>> items(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) items[static_cast<size_t>(i)] = {rising_key(classes[order[i]]), order[i]};
  sort_stable(items);
  int64_t groups = 0;
  for (int64_t i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i);
    grouped[i] = items[at].index;
    if (i == 0 || items[at].key != items[at - 1].key) bounds[groups++] = i;
  }
  bounds[groups] = count;
  return groups;
}

void nms(const NmsInput& in, const int64_t* grouped, const int64_t* bounds, uint8_t* keep, int64_t begin, int64_t end) {
  int64_t largest = 0;
  for (int64_t s = begin; s < end; ++s) largest = std::max(largest, bounds[s + 1] - bounds[s]);
  const auto bytes = static_cast<size_t>(portable::nms_class_scratch_bytes(largest, in.dtype));
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[bytes]);  // not cleared: few classes need all of it
  for (int64_t s = begin; s < end; ++s) {
    nms_class(in, grouped + bounds[s], bounds[s + 1] - bounds[s], scratch.get(), keep);
  }
}

int64_t count_kept(const uint8_t* keep, int64_t count) { return std::count(keep, keep + count, uint8_t(1)); }

void collect_kept(const uint8_t* keep, const int64_t* order, int64_t count, int64_t* kept) {
  for (int64_t i = 0; i < count; ++i) {
    if (keep[order[i]] != 0) *kept++ = order[i];
  }
}

}  // namespace gfl::cpu
