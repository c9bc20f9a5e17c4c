// SPDX-License-Identifier: Apache-2.0
// Integral, decode and distribution focal loss of fp32 and 16-bit logits: one functor per operator and direction for
// the walks of bin_rows.h, kLanes rows at a time.
#include <type_traits>

#include "bin_rows.h"
#include "gfl/bins.h"
#include "terms/bins.h"

namespace gfl::GFL_ISA {
namespace {

// ---- integral and decode ----

// slope · ∂(Σ p·j)/∂x
struct MeanGradient {
  const BinSums& s;
  Lanes slope;
  GFL_INLINE auto operator()(int k) const {
    const Floats total = lanes_at(s.total, k);
    const Floats mean = lanes_at(s.moment, k) / total, of_row = lanes_at(slope, k) / total;
    return [=](float bin, Floats e) GFL_INLINED { return of_row * (e * (bin - mean)); };
  }
};

struct IntegralForward {
  static constexpr bool kSumsAlone = true;
  float* distance;
  template <class T> GFL_INLINE void operator()(const RowGroup<T>& group, const Lanes*, const BinSums& s) const {
    Lanes mean;
    s.mean(mean);
    store_rows(mean, group, distance);
  }
};

struct IntegralBackward {
  const float* grad_distance;
  template <class T> GFL_INLINE MeanGradient operator()(const RowGroup<T>& group, const Lanes*,
                                                        const BinSums& s) const {
    MeanGradient gradient{s, {}};
    load_rows(grad_distance, group, gradient.slope);
    return gradient;
  }
};

struct DecodeBackward {
  const DecodeInput& in;
  const float* grad_boxes;
  float* grad_points;
  template <class T> GFL_INLINE MeanGradient operator()(const RowGroup<T>& group, const Lanes*,
                                                        const BinSums& s) const {
    Lanes mean;
    s.mean(mean);
    MeanGradient gradient{s, {}};
    for (int k = 0; k < group.count; ++k) {
      const int64_t row = group.row_at(k);
      const BoxSide<float> side(in, row);
      const float passed = side.at(mean[k]).inside ? grad_boxes[row] : 0.0f;
      gradient.slope[k] = side.mean_gradient(passed);
      add_to_point(grad_points, row, passed);
    }
    return gradient;
  }
};

// ---- distribution focal loss ----

// TwoBins of terms/bins.h for kLanes rows; bins and truth values as floats.
struct BinPairs { Lanes left, right, weight_left, weight_right, counted, clamped; };

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
  for (int k = 0; k < kLanes; ++k) {
    const TwoBins<float> b = bins_of_row<float>(in, group.row_at(k));
    pairs.left[k] = static_cast<float>(b.left);
    pairs.right[k] = static_cast<float>(b.right);
    pairs.weight_left[k] = b.weight_left;
    pairs.weight_right[k] = b.weight_right;
    pairs.counted[k] = 1.0f;
    pairs.clamped[k] = 0.0f;
  }
}

template <class T> inline void pairs_of(const DflInput& in, const RowGroup<T>& group, BinPairs& pairs) {
  if (in.target == nullptr) return bins_given(in, group, pairs);
  Lanes y;
  load_rows(static_cast<const float*>(in.target), group, y);
  bins_at_positions(y, static_cast<int>(in.pred.bins), in.ignore_out_of_range, pairs);
}

// The number of each lane in the bin that `bins` names for it.
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
  // Both lie side by side in memory: one load per row.
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

struct DflForward {
  static constexpr bool kSumsAlone = false;
  const DflInput& in;
  float *loss, *distance;  // null where not wanted
  template <class T> GFL_INLINE void operator()(const RowGroup<T>& group, const Lanes* tile, const BinSums& s) const {
    Lanes value;
    losses(group, tile, s, value);
    store_rows(value, group, loss);
    store_distance(group, s);
  }

 protected:
  template <class T> GFL_INLINE void losses(const RowGroup<T>& group, const Lanes* tile, const BinSums& s,
                                            Lanes& value) const {
    BinPairs pairs;
    pairs_of(in, group, pairs);
    Lanes right;
    entropies(in, group, tile, s, pairs, value, right);
    GFL_LANES(k) {
      const float sum = value[k] * pairs.weight_left[k] + right[k] * pairs.weight_right[k];
      value[k] = pairs.counted[k] > 0.0f ? sum : 0.0f;
    }
  }
  template <class T> void store_distance(const RowGroup<T>& group, const BinSums& s) const {
    if (distance != nullptr) IntegralForward{distance}(group, nullptr, s);
  }
};

// Adds up weight · loss in the order of the rows instead of storing the losses.
struct DflSum : DflForward {
  const float* weight;  // or null: all 1
  double& total;
  template <class T> GFL_INLINE void operator()(const RowGroup<T>& group, const Lanes* tile, const BinSums& s) const {
    Lanes value;
    losses(group, tile, s, value);
    for (int k = 0; k < group.count; ++k) {
      total += weight != nullptr ? value[k] * weight[group.row_at(k)] : value[k];
    }
    store_distance(group, s);
  }
};

// of_loss · ∂loss/∂x + of_distance · ∂distance/∂x
template <bool kDistance> struct DflGradient {
  const BinSums& s;
  BinPairs pairs;
  Lanes of_loss, of_distance;
  GFL_INLINE auto operator()(int k) const {
    const Floats total = lanes_at(s.total, k), zero{};
    const Ints counted = lanes_at(pairs.counted, k) > 0.0f;
    const Floats of_row = counted ? lanes_at(of_loss, k) : zero;
    const Floats bin_left = lanes_at(pairs.left, k), bin_right = lanes_at(pairs.right, k);
    const Floats left = of_row * lanes_at(pairs.weight_left, k), right = of_row * lanes_at(pairs.weight_right, k);
    const Floats both = (left + right) / total;
    const Floats slope = lanes_at(of_distance, k) / total, mean = lanes_at(s.moment, k) / total;
    return [=](float bin, Floats e) GFL_INLINED {
      // A row that does not count has no gradient of the loss, whatever its logits are; but of the distance.
      Floats gradient = kDistance ? e * multiply_add(slope, bin - mean, both) : (Floats)(counted & (Ints)(e * both));
      gradient -= (Floats)((bin_left == bin) & (Ints)left);
      gradient -= (Floats)((bin_right == bin) & (Ints)right);
      return gradient;
    };
  }
};

// load_of_loss(group, lanes) loads the gradients of the losses.
template <bool kDistance, class LoadOfLoss> struct DflBackward {
  const DflInput& in;
  const LoadOfLoss& load_of_loss;
  const float* grad_distance;
  DflGradients out;

  template <class T>
  GFL_INLINE DflGradient<kDistance> operator()(const RowGroup<T>& group, const Lanes* tile, const BinSums& s) const {
    DflGradient<kDistance> gradient{s, {}, {}, {}};
    pairs_of(in, group, gradient.pairs);
    load_of_loss(group, gradient.of_loss);
    if (kDistance) load_rows(grad_distance, group, gradient.of_distance);
    if (out.target != nullptr || out.weight_left != nullptr || out.weight_right != nullptr) {
      store_others(group, tile, gradient);
    }
    return gradient;
  }

 private:
  template <class T>
  void store_others(const RowGroup<T>& group, const Lanes* tile, const DflGradient<kDistance>& gradient) const {
    const Lanes& scale = gradient.of_loss;
    Lanes left, right, by_target;
    entropies(in, group, tile, gradient.s, gradient.pairs, left, right);
    GFL_LANES(k) {
      const float through = gradient.pairs.counted[k] * (1.0f - gradient.pairs.clamped[k]);
      by_target[k] = through > 0.0f ? scale[k] * (right[k] - left[k]) : 0.0f;
      left[k] *= scale[k];
      right[k] *= scale[k];
    }
    if (out.target != nullptr) store_rows(by_target, group, static_cast<float*>(out.target));
    if (out.weight_left != nullptr) store_rows(left, group, static_cast<float*>(out.weight_left));
    if (out.weight_right != nullptr) store_rows(right, group, static_cast<float*>(out.weight_right));
  }
};

template <class T, class LoadOfLoss, class Keep = KeepNothing>
void dfl_backward_rows(const DflInput& in, const float* grad_distance, const DflGradients& out, int64_t begin,
                       int64_t end, const LoadOfLoss& load_of_loss, const Keep& keep = {}) {
  if (grad_distance == nullptr) {
    const DflBackward<false, LoadOfLoss> backward{in, load_of_loss, nullptr, out};
    backward_rows<T>(in.pred, out.pred, begin, end, backward, keep);
  } else {
    const DflBackward<true, LoadOfLoss> backward{in, load_of_loss, grad_distance, out};
    backward_rows<T>(in.pred, out.pred, begin, end, backward, keep);
  }
}

// What forward keeps for backward. The exponentials of a whole group lie as its tile does, [bins, kLanes], in the place
// of its rows: backward reads them without a transpose, and its gradient takes their place. Those of any other group
// lie row by row. A negative total says that a logit of the group is beyond what counts: backward then looks at the
// logits.
class KeepSoftmax {
 public:
  explicit KeepSoftmax(const DflKept& kept) : kept_(kept) {}

  template <class Bins>
  GFL_INLINE void softmax(const Lanes* tile, const RowGroup<float>& group, Bins bins, BinSums& s) const {
    if (group.consecutive) {
      softmax_of_tile<true>(tile, bins, s, place(group, 0, bins));
    } else {
      Lanes e[kMaxBins];
      float* rows[kLanes];
      softmax_of_tile<true>(tile, bins, s, e[0].at);
      for (int k = 0; k < kLanes; ++k) rows[k] = place(group, k, bins);
      scatter_rows(e, bins, group.count, rows);
    }
    Lanes total = s.total;
    if (s.beyond) GFL_LANES(k) total[k] = -total[k];
    store_rows(total, group, kept_.sums);
    store_rows(s.moment, group, kept_.sums + kept_.rows);
  }

  // The sums come without their origin.
  template <class Bins>
  GFL_INLINE const float* recall(const RowGroup<float>& group, Bins bins, BinSums& s, Lanes* e) const {
    load_rows(kept_.sums, group, s.total);
    Ints negative{};
    for (int k = 0; k < kLanes; k += kWidth) negative |= (Ints)lanes_at(s.total, k) < 0;
    if (any_of(negative)) return nullptr;
    load_rows(kept_.sums + kept_.rows, group, s.moment);
    s.beyond = false;
    if (group.consecutive) return place(group, 0, bins);
    const float* rows[kLanes];
    for (int k = 0; k < kLanes; ++k) rows[k] = place(group, k, bins);
    gather_rows(rows, bins, e);
    return e[0].at;
  }

 private:
  float* place(const RowGroup<float>& group, int k, int bins) const { return kept_.exponentials + group.row[k] * bins; }

  DflKept kept_;
};

}  // namespace

void integral_forward(const BinRows& pred, float* distance, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) { forward_rows<decltype(t)>(pred, begin, end, IntegralForward{distance}); });
}

void integral_backward(const BinRows& pred, const float* grad_distance, void* grad_pred, int64_t begin, int64_t end) {
  dispatch_float(pred.dtype, [&](auto t) {
    backward_rows<decltype(t)>(pred, grad_pred, begin, end, IntegralBackward{grad_distance});
  });
}

void decode_backward(const DecodeInput& in, const float* grad_boxes, void* grad_pred, float* grad_points, int64_t begin,
                     int64_t end) {
  dispatch_float(in.pred.dtype, [&](auto t) {
    backward_rows<decltype(t)>(in.pred, grad_pred, begin, end, DecodeBackward{in, grad_boxes, grad_points});
  });
}

void dfl_forward(const DflInput& in, float* loss, float* distance, int64_t begin, int64_t end) {
  dispatch_float(in.pred.dtype,
                 [&](auto t) { forward_rows<decltype(t)>(in.pred, begin, end, DflForward{in, loss, distance}); });
}

void dfl_backward(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflGradients& out,
                  int64_t begin, int64_t end) {
  dispatch_float(in.pred.dtype, [&](auto t) {
    const auto load_of_loss = [&](const auto& group, Lanes& lanes) { load_rows(grad_loss, group, lanes); };
    dfl_backward_rows<decltype(t)>(in, grad_distance, out, begin, end, load_of_loss);
  });
}

void dfl_forward_keeping(const DflInput& in, float* loss, float* distance, const DflKept& kept, int64_t begin,
                         int64_t end) {
  forward_rows<float>(in.pred, begin, end, DflForward{in, loss, distance}, KeepSoftmax(kept));
}

double dfl_sum_keeping(const DflInput& in, const float* weight, float* distance, const DflKept& kept, int64_t begin,
                       int64_t end) {
  double total = 0;
  forward_rows<float>(in.pred, begin, end, DflSum{{in, nullptr, distance}, weight, total}, KeepSoftmax(kept));
  return total;
}

void dfl_finish(const DflInput& in, const float* grad_loss, const float* grad_distance, const DflKept& kept,
                int64_t begin, int64_t end) {
  const auto load_of_loss = [&](const auto& group, Lanes& lanes) { load_rows(grad_loss, group, lanes); };
  dfl_backward_rows<float>(in, grad_distance, {kept.exponentials, nullptr, nullptr, nullptr}, begin, end, load_of_loss,
                           KeepSoftmax(kept));
}

void dfl_finish_reduced(const DflInput& in, const float* weight, float scale, const float* grad_distance,
                        const DflKept& kept, int64_t begin, int64_t end) {
  const auto load_of_loss = [&](const auto& group, Lanes& lanes) {
    if (weight != nullptr) load_rows(weight, group, lanes);
    GFL_LANES(k) lanes[k] = weight != nullptr ? scale * lanes[k] : scale;
  };
  dfl_backward_rows<float>(in, grad_distance, {kept.exponentials, nullptr, nullptr, nullptr}, begin, end, load_of_loss,
                           KeepSoftmax(kept));
}

}  // namespace gfl::GFL_ISA
