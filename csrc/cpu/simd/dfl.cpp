// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss of fp32 and 16-bit logits, kLanes rows at a time; formulas in common/bins.h.
#include "gfl/dfl.h"

#include "bin_rows.h"

namespace gfl::GFL_ISA {
namespace {

// What TwoBins of common/bins.h holds, of kLanes rows; bins and truth values as floats.
struct BinPairs {
  Lanes left, right, weight_left, weight_right, counted, clamped;
};

inline void bins_at_positions(const Lanes& y, int bins, bool ignore_out_of_range, BinPairs& pairs) {
  const float last = static_cast<float>(bins - 1), ignore = ignore_out_of_range ? 1.0f : 0.0f;
  GFL_LANES(k) {
    const float at = y[k];
    const float outside = (at < 0.0f ? 1.0f : 0.0f) + (at > last ? 1.0f : 0.0f);
    const float number = at == at ? 1.0f : 0.0f;
    float held = at > 0.0f ? at : 0.0f;  // a NaN too
    held = held > last ? last : held;
    float left = static_cast<float>(static_cast<int32_t>(held));
    left = left > last - 1.0f ? last - 1.0f : left;
    pairs.left[k] = left;
    pairs.right[k] = left + 1.0f;
    pairs.weight_left[k] = pairs.right[k] - held;
    pairs.weight_right[k] = held - left;
    pairs.counted[k] = number * (1.0f - ignore * outside);
    pairs.clamped[k] = outside;
  }
}

template <class T> inline void bins_given(const DflInput& in, const RowGroup<T>& group, BinPairs& pairs) {
  const int64_t last = in.pred.bins - 1;
  for (int k = 0; k < kLanes; ++k) {
    const int64_t left = in.left[group.row[k]];
    const int64_t near = left < -1 ? -1 : (left > last ? last : left);  // keeps left + 1 from running over
    pairs.left[k] = static_cast<float>(near < 0 ? 0 : near);
    pairs.right[k] = static_cast<float>(near + 1 > last ? last : near + 1);
    pairs.counted[k] = 1.0f;
    pairs.clamped[k] = 0.0f;
  }
  load_rows(static_cast<const float*>(in.weight_left), group, pairs.weight_left);
  load_rows(static_cast<const float*>(in.weight_right), group, pairs.weight_right);
}

template <class T> inline void pairs_of(const DflInput& in, const RowGroup<T>& group, BinPairs& pairs) {
  if (in.target == nullptr) return bins_given(in, group, pairs);
  Lanes y;
  load_rows(static_cast<const float*>(in.target), group, y);
  bins_at_positions(y, static_cast<int>(in.pred.bins), in.ignore_out_of_range, pairs);
}

// −log p of both bins.
inline void entropies(const Lanes* tile, const BinSums& s, const BinPairs& pairs, Lanes& left, Lanes& right) {
  for (int k = 0; k < kLanes; ++k) {
    left[k] = tile[static_cast<int>(pairs.left[k])][k];
    right[k] = tile[static_cast<int>(pairs.right[k])][k];
  }
  GFL_LANES(k) {
    const float log_total = log_of_sum(s.total[k]);
    left[k] = log_total - (bounded(left[k]) - s.max[k]);
    right[k] = log_total - (bounded(right[k]) - s.max[k]);
  }
}

// ---- what forward keeps for backward ----

// The exponentials of a whole group lie as its tile does, [bins, kLanes], in the place of its rows: backward reads them
// without a transpose, and its gradient takes their place. The rows of any other group lie one by one. A negative total
// says that a logit of the group is beyond what counts: backward looks at the logits again.
template <class T> inline float* kept_tile(const DflKept& kept, const RowGroup<T>& group, int bins) {
  return kept.exponentials + group.row[0] * bins;
}
template <class T>
inline void kept_rows(const DflKept& kept, const RowGroup<T>& group, int bins, float* (&rows)[kLanes]) {
  for (int k = 0; k < kLanes; ++k) rows[k] = kept.exponentials + group.row[k] * bins;
}

template <class T>
inline void softmax_and_keep(const Lanes* tile, const RowGroup<T>& group, int bins, BinSums& s, const DflKept& kept) {
  if (group.consecutive) {
    bin_softmax<true>(tile, bins, s, kept_tile(kept, group, bins));
  } else {
    Lanes e[kMaxBins];
    float* rows[kLanes];
    bin_softmax<true>(tile, bins, s, e[0].at);
    kept_rows(kept, group, bins, rows);
    scatter_rows(e, bins, group.count, rows);
  }
  Lanes total = s.total;
  if (s.beyond) GFL_LANES(k) total[k] = -total[k];
  store_rows(total, group, kept.sums);
  store_rows(s.moment, group, kept.sums + kept.rows);
  store_rows(s.peak, group, kept.sums + 2 * kept.rows);
}

// The exponentials [bins, kLanes] of a group, maybe in `e`, and its sums without the highest logits; null where the
// logits have to be looked at.
template <class T>
inline const float* recalled(const DflKept& kept, const RowGroup<T>& group, int bins, BinSums& s, Lanes* e) {
  if (kept.exponentials == nullptr) return nullptr;
  load_rows(kept.sums, group, s.total);
  Ints negative{};
  for (int k = 0; k < kLanes; k += kWidth) negative |= (Ints)lanes_at(s.total, k) < 0;
  if (any_of(negative)) return nullptr;
  load_rows(kept.sums + kept.rows, group, s.moment);
  load_rows(kept.sums + 2 * kept.rows, group, s.peak);
  s.beyond = false;
  if (group.consecutive) return kept_tile(kept, group, bins);
  float* rows[kLanes];
  const float* from[kLanes];
  kept_rows(kept, group, bins, rows);
  for (int k = 0; k < kLanes; ++k) from[k] = rows[k];
  gather_rows(from, bins, e);
  return e[0].at;
}

// ---- forward and backward ----

template <class T, bool kKeep>
void forward(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.pred.bins);
  Lanes tile[kMaxBins];
  for_row_groups<T>(in.pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, in.pred.stride_bin, bins, tile);
    BinSums s;
    if (kKeep) softmax_and_keep(tile, group, bins, s, kept);
    else bin_softmax<false>(tile, bins, s, nullptr);
    BinPairs pairs;
    pairs_of(in, group, pairs);
    Lanes left, right;
    entropies(tile, s, pairs, left, right);
    GFL_LANES(k) {
      const float value = left[k] * pairs.weight_left[k] + right[k] * pairs.weight_right[k];
      left[k] = pairs.counted[k] > 0.0f ? value : 0.0f;
    }
    store_rows(left, group, loss);
    if (distance == nullptr) return;
    s.mean(right);
    store_rows(right, group, distance);
  });
}

// d(loss) / d(logits) · scale + d(distance) / d(logits) · scale_distance, from the exponentials.
template <bool kDistance>
inline void gradients(const Lanes* tile, const float* e, int bins, const BinSums& s, const BinPairs& pairs,
                      const Lanes& scale, const Lanes& scale_distance, Lanes* out) {
  const auto gradient = [&](int k) {
    const Floats total = lanes_at(s.total, k), peak = lanes_at(s.peak, k), zero{};
    const Ints counted = lanes_at(pairs.counted, k) > 0.0f;
    const Floats of_row = counted ? lanes_at(scale, k) : zero;
    const Floats bin_left = lanes_at(pairs.left, k), bin_right = lanes_at(pairs.right, k);
    const Floats left = of_row * lanes_at(pairs.weight_left, k), right = of_row * lanes_at(pairs.weight_right, k);
    const Floats both = (left + right) / total;
    const Floats slope = lanes_at(scale_distance, k) / total, from_peak = lanes_at(s.moment, k) / total;
    return [=](float bin, Floats value) {
      // A row that does not count has no gradient of the loss, whatever its logits are; but of the distance.
      Floats gradient = kDistance ? value * multiply_add(slope, (bin - peak) - from_peak, both)
                                  : (Floats)(counted & (Ints)(value * both));
      gradient -= (Floats)((bin_left == bin) & (Ints)left);
      gradient -= (Floats)((bin_right == bin) & (Ints)right);
      return gradient;
    };
  };
  bin_gradients(tile, e, bins, s, gradient, out);
}

template <class T>
void backward(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflGradients& out,
              const DflKept& kept, int64_t begin, int64_t end) {
  const int bins = static_cast<int>(in.pred.bins);
  Lanes tile[kMaxBins], e[kMaxBins];
  for_row_groups<T>(in.pred, begin, end, [&](const RowGroup<T>& group) {
    BinSums s;
    const float* from = recalled(kept, group, bins, s, e);
    if (from == nullptr) {
      load_tile(group, in.pred.stride_bin, bins, tile);
      bin_softmax<true>(tile, bins, s, e[0].at);
      from = e[0].at;
    }
    BinPairs pairs;
    pairs_of(in, group, pairs);
    Lanes scale, scale_distance{};
    load_rows(grad_loss, group, scale);
    if (out.target != nullptr || out.weight_left != nullptr || out.weight_right != nullptr) {
      Lanes left, right, by_target;
      entropies(tile, s, pairs, left, right);
      GFL_LANES(k) {
        const float through = pairs.counted[k] * (1.0f - pairs.clamped[k]);
        by_target[k] = through > 0.0f ? scale[k] * (right[k] - left[k]) : 0.0f;
        left[k] *= scale[k];
        right[k] *= scale[k];
      }
      if (out.target != nullptr) store_rows(by_target, group, static_cast<float*>(out.target));
      if (out.weight_left != nullptr) store_rows(left, group, static_cast<float*>(out.weight_left));
      if (out.weight_right != nullptr) store_rows(right, group, static_cast<float*>(out.weight_right));
    }
    if (out.pred == nullptr) return;
    if (grad_distance == nullptr) {
      gradients<false>(tile, from, bins, s, pairs, scale, scale_distance, e);
    } else {
      load_rows(grad_distance, group, scale_distance);
      gradients<true>(tile, from, bins, s, pairs, scale, scale_distance, e);
    }
    store_tile(e, group, bins, static_cast<T*>(out.pred));
  });
}

}  // namespace

void dfl_forward(const DflInput& in, float* loss, float* distance, int64_t begin, int64_t end) {
  dispatch_float(in.pred.dtype,
                 [&](auto t) { forward<decltype(t), false>(in, loss, distance, {}, begin, end); });
}

void dfl_backward(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  dispatch_float(in.pred.dtype,
                 [&](auto t) { backward<decltype(t)>(in, grad_loss, grad_distance, out, {}, begin, end); });
}

void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end) {
  forward<float, true>(in, loss, distance, kept, begin, end);
}

void dfl_settle(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflKept& kept,
                int64_t begin, int64_t end) {
  backward<float>(in, grad_loss, grad_distance, {kept.exponentials, nullptr, nullptr, nullptr}, kept, begin, end);
}

}  // namespace gfl::GFL_ISA
