// SPDX-License-Identifier: Apache-2.0
// Distribution focal loss of fp32 and 16-bit logits, kLanes rows at a time; formulas in common/bins.h.
#include "gfl/dfl.h"

#include <type_traits>

#include "bin_rows.h"

namespace gfl::GFL_ISA {
namespace {

// What TwoBins of common/bins.h holds, of kLanes rows; bins and truth values as floats.
struct BinPairs {
  Lanes left, right, weight_left, weight_right, counted, clamped;
};

inline void bins_at_positions(const Lanes& y, int bins, bool ignore_out_of_range, BinPairs& pairs) {
  const Floats zero{}, one = splat<Floats>(1.0f), last = splat<Floats>(static_cast<float>(bins - 1));
  const Ints ignore = Ints{} - (ignore_out_of_range ? 1 : 0);
  for (int k = 0; k < kLanes; k += kWidth) {
    const Floats at = lanes_at(y, k);
    const Ints outside = (at < zero) | (at > last);
    Floats held = at > zero ? at : zero;  // a NaN too
    held = held > last ? last : held;
    Floats left = __builtin_convertvector(__builtin_convertvector(held, Ints), Floats);
    left = left > last - one ? last - one : left;
    const Floats right = left + one;
    store_floats(left, pairs.left.at + k);
    store_floats(right, pairs.right.at + k);
    store_floats(right - held, pairs.weight_left.at + k);
    store_floats(held - left, pairs.weight_right.at + k);
    store_floats((at == at) & ~(ignore & outside) ? one : zero, pairs.counted.at + k);
    store_floats(outside ? one : zero, pairs.clamped.at + k);
  }
}

template <class T> inline void bins_given(const DflInput& in, const RowGroup<T>& group, BinPairs& pairs) {
  const int64_t last = in.pred.bins - 1;
  for (int k = 0; k < kLanes; ++k) {
    const int64_t left = in.left[group.row_at(k)];
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

// One number a lane, of the bin that the lane names.
inline Floats picked(const Lanes* tile, const int32_t* bins, int k) {
  const auto at = [&](int i) { return tile[bins[k + i]][k + i]; };
#if defined(__AVX512F__)
  return Floats{at(0), at(1), at(2),  at(3),  at(4),  at(5),  at(6),  at(7),
                at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)};
#elif defined(__AVX__)
  return Floats{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
#else
  return Floats{at(0), at(1), at(2), at(3)};
#endif
}
// The logits of both bins.
template <class T>
inline void pick(const DflInput& in, const RowGroup<T>& group, const Lanes* tile, const BinPairs& pairs, Lanes& left,
                 Lanes& right) {
  int32_t first[kLanes], second[kLanes];
  GFL_LANES(k) {
    first[k] = static_cast<int32_t>(pairs.left[k]);
    second[k] = static_cast<int32_t>(pairs.right[k]);
  }
#if defined(__AVX__)
  // Side by side in memory: one load for both of a row.
  if (std::is_same_v<T, float> && in.target != nullptr && in.pred.stride_bin == 1 && group.spaced) {
    for (int k = 0; k < kLanes; k += 8) {
      const float* row = reinterpret_cast<const float*>(group.from[0]) + k * group.pitch;
      const auto pair = [&](int i) { return reinterpret_cast<const __m64*>(row + i * group.pitch + first[k + i]); };
      const auto pairs_of_rows = [&](int i) {  // of i and i + 1, and four rows on
        const __m128 low = _mm_loadh_pi(_mm_loadl_pi(__m128{}, pair(i)), pair(i + 1));
        const __m128 high = _mm_loadh_pi(_mm_loadl_pi(__m128{}, pair(i + 4)), pair(i + 5));
        return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
      };
      const __m256 a = pairs_of_rows(0), b = pairs_of_rows(2);
      _mm256_storeu_ps(left.at + k, _mm256_shuffle_ps(a, b, 0x88));
      _mm256_storeu_ps(right.at + k, _mm256_shuffle_ps(a, b, 0xdd));
    }
    return;
  }
#endif
  for (int k = 0; k < kLanes; k += kWidth) {
    store_floats(picked(tile, first, k), left.at + k);
    store_floats(picked(tile, second, k), right.at + k);
  }
}

// −log p of both bins.
template <class T>
inline void entropies(const DflInput& in, const RowGroup<T>& group, const Lanes* tile, const BinSums& s,
                      const BinPairs& pairs, Lanes& left, Lanes& right) {
  pick(in, group, tile, pairs, left, right);
  GFL_LANES(k) {
    left[k] = log_less(s.total[k], bounded(left[k]) - s.origin[k]);
    right[k] = log_less(s.total[k], bounded(right[k]) - s.origin[k]);
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

template <class T, class Bins>
inline void softmax_and_keep(const Lanes* tile, const RowGroup<T>& group, Bins bins, BinSums& s, const DflKept& kept) {
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
}

// The exponentials [bins, kLanes] of a group, maybe in `e`, and its sums without their origin; null where the
// logits have to be looked at.
template <class T, class Bins>
inline const float* recalled(const DflKept& kept, const RowGroup<T>& group, Bins bins, BinSums& s, Lanes* e) {
  if (kept.exponentials == nullptr) return nullptr;
  load_rows(kept.sums, group, s.total);
  Ints negative{};
  for (int k = 0; k < kLanes; k += kWidth) negative |= (Ints)lanes_at(s.total, k) < 0;
  if (any_of(negative)) return nullptr;
  load_rows(kept.sums + kept.rows, group, s.moment);
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

template <class T, bool kKeep, class Bins>
void forward(const DflInput& in, Bins bins, float* loss, float* distance, const DflKept& kept, int64_t begin,
             int64_t end) {
  Lanes tile[kMaxBins];
  for_row_groups<T>(in.pred, begin, end, [&](const RowGroup<T>& group) {
    load_tile(group, in.pred.stride_bin, bins, tile);
    BinSums s;
    if (kKeep) softmax_and_keep(tile, group, bins, s, kept);
    else bin_softmax<false>(tile, bins, s, nullptr);
    BinPairs pairs;
    pairs_of(in, group, pairs);
    Lanes left, right;
    entropies(in, group, tile, s, pairs, left, right);
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
template <bool kDistance, class Bins>
GFL_INLINE void gradients(const Lanes* tile, const float* e, Bins bins, const BinSums& s, const BinPairs& pairs,
                      const Lanes& scale, const Lanes& scale_distance, Lanes* out) {
  const auto gradient = [&](int k) {
    const Floats total = lanes_at(s.total, k), zero{};
    const Ints counted = lanes_at(pairs.counted, k) > 0.0f;
    const Floats of_row = counted ? lanes_at(scale, k) : zero;
    const Floats bin_left = lanes_at(pairs.left, k), bin_right = lanes_at(pairs.right, k);
    const Floats left = of_row * lanes_at(pairs.weight_left, k), right = of_row * lanes_at(pairs.weight_right, k);
    const Floats both = (left + right) / total;
    const Floats slope = lanes_at(scale_distance, k) / total, mean = lanes_at(s.moment, k) / total;
    return [=](float bin, Floats value) GFL_INLINED {
      // A row that does not count has no gradient of the loss, whatever its logits are; but of the distance.
      Floats gradient =
          kDistance ? value * multiply_add(slope, bin - mean, both) : (Floats)(counted & (Ints)(value * both));
      gradient -= (Floats)((bin_left == bin) & (Ints)left);
      gradient -= (Floats)((bin_right == bin) & (Ints)right);
      return gradient;
    };
  };
  bin_gradients(tile, e, bins, s, gradient, out);
}

template <class T, class Bins>
void backward(const DflInput& in, Bins bins, const float* grad_loss, const float* grad_distance,
              const DflGradients& out, const DflKept& kept, int64_t begin, int64_t end) {
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
      entropies(in, group, tile, s, pairs, left, right);
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
  dispatch_float(in.pred.dtype, [&](auto t) {
    with_bins(in.pred.bins,
              [&](auto bins) { forward<decltype(t), false>(in, bins, loss, distance, {}, begin, end); });
  });
}

void dfl_backward(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  dispatch_float(in.pred.dtype, [&](auto t) {
    with_bins(in.pred.bins, [&](auto bins) {
      backward<decltype(t)>(in, bins, grad_loss, grad_distance, out, {}, begin, end);
    });
  });
}

void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end) {
  with_bins(in.pred.bins, [&](auto bins) { forward<float, true>(in, bins, loss, distance, kept, begin, end); });
}

void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflKept& kept,
                int64_t begin, int64_t end) {
  with_bins(in.pred.bins, [&](auto bins) {
    backward<float>(in, bins, grad_loss, grad_distance, {kept.exponentials, nullptr, nullptr, nullptr}, kept, begin,
                    end);
  });
}

}  // namespace gfl::GFL_ISA
