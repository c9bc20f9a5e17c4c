// SPDX-License-Identifier: Apache-2.0
// The softmax of terms/bins.h over rows of bins, kLanes of them at a time, and the walks over rows for all operators.
//
// A lane does the same operations whatever the others hold and however many of them are rows: a row has the same bits
// wherever it is computed.
#pragma once
#include "bin_tile.h"

namespace gfl::GFL_ISA {

constexpr float kLargestLogit = std::numeric_limits<float>::max() / 4.0f;

template <class F> inline F bounded(F x) { return at_least(-kLargestLogit, at_most(kLargestLogit, x)); }

// ---- softmax ----

// The softmax of kLanes rows: `total` is Σ exp(x − origin), `moment` Σ j·exp(x − origin). The origin of a row is 0
// where its logits are so moderate that no exponential can overflow or vanish, as nearly always, and its highest logit
// elsewhere.
struct BinSums {
  Lanes origin, total, moment;
  bool beyond;  // a logit of the tile is beyond what counts

  // The expected bin.
  void mean(Lanes& to) const { GFL_LANES(k) to[k] = moment[k] / total[k]; }
};

// Far enough from the ends of fp32's range that a gradient may be divided by such a sum.
constexpr float kModerateLogit = 30.0f;

// The sums of kWidth rows, to which their exponentials are added bin by bin.
struct RunningSums {
  Floats total{}, moment{}, bin{};

  GFL_INLINE void add(Floats exponential) {
    total += exponential;
    moment = multiply_add(exponential, bin, moment);
    bin += 1.0f;
  }
  GFL_INLINE void store(int k, Floats origin, BinSums& s) const {
    store_floats(total, s.total.at + k);
    store_floats(moment, s.moment.at + k);
    store_floats(origin, s.origin.at + k);
  }
};

// The fast path: right for rows with moderate logits. `extent` is the largest absolute value of each row's logits; NaN
// does not count.
struct FastSums : RunningSums {
  Floats extent{};

  GFL_INLINE Floats add_logit(Floats x) {
    extent = larger_of(absolute_of(x), extent);
    const Floats e = exp_of_moderate(x);
    add(e);
    return e;
  }
  GFL_INLINE bool right() const { return !any_of(extent > kModerateLogit); }
};

// The general path, for any logits. Rows among them with moderate logits get the bits of the fast path.
template <bool kKeep>
[[gnu::noinline]] void general_exponentials(const Lanes* tile, int k, int bins, Floats extent, BinSums& s, float* e) {
  Floats highest = bounded(lanes_at(tile[0], k));
  for (int j = 1; j < bins; ++j) highest = larger_of(bounded(lanes_at(tile[j], k)), highest);
  const Floats origin = extent > kModerateLogit ? highest : Floats{};
  RunningSums sums;
  for (int j = 0; j < bins; ++j) {
    const Floats value = exp_of_negative(bounded(lanes_at(tile[j], k)) - origin);
    sums.add(value);
    if (kKeep) store_floats(value, e + j * kLanes + k);
  }
  sums.store(k, origin, s);
}

// The softmax of a tile of logits; with kKeep the exponentials go to `e` [bins, kLanes].
template <bool kKeep, class Bins> GFL_INLINE void softmax_of_tile(const Lanes* tile, Bins bins, BinSums& s, float* e) {
  s.beyond = false;
  for (int k = 0; k < kLanes; k += kWidth) {
    FastSums sums;
    for (int j = 0; j < bins; ++j) {
      const Floats value = sums.add_logit(lanes_at(tile[j], k));
      if (kKeep) store_floats(value, e + j * kLanes + k);
    }
    sums.store(k, Floats{}, s);
    if (sums.right()) continue;
    general_exponentials<kKeep>(tile, k, bins, sums.extent, s, e);
    s.beyond = s.beyond || any_of(sums.extent > kLargestLogit);
  }
}

// The sums of evenly spaced rows straight from memory; false where a group is none, or its logits want the general
// path.
template <class T, class Bins>
GFL_INLINE bool sums_without_tile(const RowGroup<T>& group, int64_t stride_bin, Bins bins, BinSums& s) {
  if constexpr (std::is_same_v<T, float>) {
    if (!group.spaced || stride_bin != 1 || bins < 4) return false;
    bool right = true;
    for (int k = 0; k < kLanes; k += kWidth) {
      FastSums sums;
      for_columns(SpacedRows<const T*>{group.from[0], group.pitch}, bins, k,
                  [&](Floats x) GFL_INLINED { sums.add_logit(x); });
      sums.store(k, Floats{}, s);
      right = right && sums.right();
    }
    s.beyond = false;
    return right;
  }
  return false;
}

// The gradient of the logits: gradient(k) is a function of a bin and its exponentials in `e` [bins, kLanes], for the
// kWidth rows from k on; 0 where a logit is beyond what counts. `out` may be `e`.
template <class Gradient, class Bins>
GFL_INLINE void bin_gradients(const Lanes* tile, const float* e, Bins bins, const BinSums& s, const Gradient& gradient,
                              Lanes* out) {
  for (int k = 0; k < kLanes; k += kWidth) {
    const auto of_bin = gradient(k);
    for (int j = 0; j < bins; ++j) {
      store_floats(of_bin(static_cast<float>(j), load_floats(e + j * kLanes + k)), out[j].at + k);
    }
  }
  if (!s.beyond) return;
  for (int j = 0; j < bins; ++j) {
    for (int k = 0; k < kLanes; k += kWidth) {
      const Ints beyond = absolute_of(lanes_at(tile[j], k)) > kLargestLogit;
      store_floats((Floats)(~beyond & (Ints)lanes_at(out[j], k)), out[j].at + k);
    }
  }
}

// ---- the walks over rows, with one functor per operator and direction ----

// Computes every softmax from the logits. Another policy may keep exponentials in forward and recall them in backward.
struct KeepNothing {
  template <class T, class Bins>
  GFL_INLINE void softmax(const Lanes* tile, const RowGroup<T>&, Bins bins, BinSums& s) const {
    softmax_of_tile<false>(tile, bins, s, nullptr);
  }
  // The exponentials [bins, kLanes] of a group, perhaps in `e`, with its sums; or null.
  template <class T, class Bins> const float* recall(const RowGroup<T>&, Bins, BinSums&, Lanes*) const {
    return nullptr;
  }
};

// forward(group, tile, sums) stores the results of a group of rows; one with kSumsAlone reads no tile, and may get
// none.
template <class T, class Forward, class Keep = KeepNothing>
void forward_rows(const BinRows& pred, int64_t begin, int64_t end, const Forward& forward, const Keep& keep = {}) {
  with_bins(pred.bins, [&](auto bins) {
    Lanes tile[kMaxBins];
    for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
      BinSums s;
      if constexpr (Forward::kSumsAlone) {
        if (sums_without_tile(group, pred.stride_bin, bins, s)) return forward(group, nullptr, s);
      }
      load_tile(group, pred.stride_bin, bins, tile);
      keep.softmax(tile, group, bins, s);
      forward(group, tile, s);
    });
  });
}

// backward(group, tile, sums) stores a group's gradients but that of the logits, for which it returns gradient(k) of
// bin_gradients. grad_pred is null where not wanted.
template <class T, class Backward, class Keep = KeepNothing>
void backward_rows(const BinRows& pred, void* grad_pred, int64_t begin, int64_t end, const Backward& backward,
                   const Keep& keep = {}) {
  with_bins(pred.bins, [&](auto bins) {
    Lanes tile[kMaxBins], e[kMaxBins];
    for_row_groups<T>(pred, begin, end, [&](const RowGroup<T>& group) {
      BinSums s;
      const float* exponentials = keep.recall(group, bins, s, e);
      if (exponentials == nullptr) {
        load_tile(group, pred.stride_bin, bins, tile);
        softmax_of_tile<true>(tile, bins, s, e[0].at);
        exponentials = e[0].at;
      }
      const auto gradient = backward(group, tile, s);
      if (grad_pred == nullptr) return;
      bin_gradients(tile, exponentials, bins, s, gradient, e);
      store_tile(e, group, bins, static_cast<T*>(grad_pred));
    });
  });
}

}  // namespace gfl::GFL_ISA
