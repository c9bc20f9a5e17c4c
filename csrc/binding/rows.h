// SPDX-License-Identifier: Apache-2.0
// From tensors of any leading shape and strides to the two leading dimensions that the launchers walk.
#pragma once
#include <initializer_list>
#include <vector>

#include "operator.h"
#include "gfl/rows.h"

namespace gfl::binding {

// Several tensors with the same leading shape and `trailing` own dimensions each, seen as two leading dimensions.
struct Locations {
  int64_t outer = 1, inner = 1;
  std::vector<LocationStride> strides;  // one a tensor
};

// Walks dimensions [first, last) of `t` with one stride, if its strides allow.
inline bool collapse(const at::Tensor& t, int64_t first, int64_t last, int64_t& stride) {
  stride = 0;
  int64_t expected = -1;
  for (int64_t d = last - 1; d >= first; --d) {
    if (t.size(d) == 1) continue;
    if (expected < 0) stride = t.stride(d);
    else if (t.stride(d) != expected) return false;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

struct Leading {
  at::Tensor* tensor;
  int64_t trailing;
};

// Finds the split of the leading dimensions at which every tensor can be read in place. Where there is none, the
// tensors are replaced by contiguous copies. All have the same leading shape, which the caller has checked.
inline Locations locations_of(std::initializer_list<Leading> tensors) {
  const at::Tensor& shaped = *tensors.begin()->tensor;
  const int64_t leading = shaped.dim() - tensors.begin()->trailing;
  for (bool copied : {false, true}) {
    if (copied) {
      for (const Leading& t : tensors) *t.tensor = t.tensor->contiguous();
    }
    for (int64_t split = 0; split <= leading; ++split) {
      Locations result;
      bool fits = true;
      for (const Leading& t : tensors) {
        LocationStride stride{};
        fits = fits && collapse(*t.tensor, 0, split, stride.outer) && collapse(*t.tensor, split, leading, stride.inner);
        result.strides.push_back(stride);
      }
      if (!fits) continue;
      for (int64_t d = 0; d < leading; ++d) (d < split ? result.outer : result.inner) *= shaped.size(d);
      return result;
    }
  }
  TORCH_INTERNAL_ASSERT(false, "contiguous tensors collapse at split 0");
}

inline BinRows bin_rows(const at::Tensor& pred, int64_t sides, int64_t bins, const Locations& locations) {
  const int64_t stride = pred.stride(-1);
  return BinRows{pred.const_data_ptr(), dtype_of(pred, "pred"), locations.outer, locations.inner, sides, bins,
                 locations.strides[0],  bins * stride,          stride};
}

inline void check_bins(int64_t bins) {
  TORCH_CHECK_VALUE(bins >= 2, "gfl: there must be at least 2 bins, got ", bins);
  TORCH_CHECK_NOT_IMPLEMENTED(bins <= kMaxBins, "gfl: there can be at most ", kMaxBins, " bins, got ", bins);
}

// `t` must be so; its last dimension is made dense, which a row of coordinates almost always is.
inline void check_coordinates(at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype, const at::Tensor& like,
                              const char* argument) {
  check_shape(t, shape, argument);
  check_dtype(t, dtype, argument);
  check_device(t, like, argument);
  if (t.stride(-1) != 1) t = t.contiguous();
}

// `pred` is [..., 4(R+1)].
inline void check_four_sides(const at::Tensor& pred, int64_t reg_max) {
  TORCH_CHECK_VALUE(reg_max >= 1, "gfl: `reg_max` must be at least 1, got ", reg_max);
  check_bins(reg_max + 1);
  TORCH_CHECK_VALUE(pred.dim() >= 1 && pred.size(-1) == 4 * (reg_max + 1), "gfl: `pred` must have shape [..., ",
                    4 * (reg_max + 1), "], got ", pred.sizes());
}

inline at::Tensor wanted(bool needed, const at::Tensor& like) {
  return needed ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options());
}
inline void* pointer(const at::Tensor& t, bool needed) { return needed ? t.mutable_data_ptr() : nullptr; }

}  // namespace gfl::binding
