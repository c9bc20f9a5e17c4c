// SPDX-License-Identifier: Apache-2.0
// The candidates of multiclass NMS on the CPU. What the best of them reach is found by selection among those that a
// sample says are good; all are looked at by vector code alone.
#include "gfl/select.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <type_traits>
#include <vector>

#include "terms/scalar.h"

namespace gfl::cpu {
namespace {

// Calls visit(scores, row, class, count) for pieces of the rows, with their scores one after another.
template <class S, class Visit> void each_piece(const MulticlassInput& in, const Visit& visit) {
  constexpr int64_t kPiece = 64;
  acc_t<S> piece[kPiece];
  for (int64_t row = 0; row < in.rows; ++row) {
    for (int64_t first = 0; first < in.classes; first += kPiece) {
      const S* scores = static_cast<const S*>(in.scores) + row * in.stride_row + first * in.stride_class;
      const int64_t count = std::min(kPiece, in.classes - first);
      if constexpr (std::is_same_v<S, acc_t<S>>) {
        if (in.stride_class == 1) {
          visit(scores, row, first, count);
          continue;
        }
      }
      for (int64_t c = 0; c < count; ++c) piece[c] = load(scores + c * in.stride_class);
      visit(piece, row, first, count);
    }
  }
}

// Calls take(row, class, score) for every candidate of the cut in order.
template <class S, class Take>
void each_candidate(const MulticlassInput& in, const MulticlassCut& cut, const Take& take) {
  const auto least = static_cast<acc_t<S>>(cut.least);
  int64_t ties = cut.ties;
  each_piece<S>(in, [&](const acc_t<S>* scores, int64_t row, int64_t first, int64_t count) {
    int32_t any = 0;  // of a small cut most pieces have none, which vector code finds
    for (int64_t c = 0; c < count; ++c) any |= scores[c] >= least ? 1 : 0;
    if (any == 0) return;
    for (int64_t c = 0; c < count; ++c) {
      if (scores[c] > least || (scores[c] == least && ties-- > 0)) take(row, first + c, scores[c]);
    }
  });
}

template <class S> int64_t count_above(const MulticlassInput& in, acc_t<S> threshold) {
  int64_t total = 0;
  each_piece<S>(in, [&](const acc_t<S>* scores, int64_t, int64_t, int64_t count) {
    int32_t above = 0;
    for (int64_t c = 0; c < count; ++c) above += scores[c] > threshold ? 1 : 0;
    total += above;
  });
  return total;
}

// A score that by a sample a few times as many as `most` are above or equal to; the threshold where most of all are.
template <class S> acc_t<S> guess_least(const MulticlassInput& in, acc_t<S> threshold, int64_t most) {
  constexpr int64_t kSample = 4096;
  const int64_t pairs = in.rows * in.classes, step = (pairs / kSample) | 1;
  std::vector<acc_t<S>> sample;
  for (int64_t i = 0; i < pairs; i += step) {
    const int64_t at = i / in.classes * in.stride_row + i % in.classes * in.stride_class;
    const acc_t<S> score = load(static_cast<const S*>(in.scores) + at);
    if (score > threshold) sample.push_back(score);
  }
  const auto place = static_cast<size_t>(4 * most / step + 16);
  if (place >= sample.size()) return threshold;
  std::nth_element(sample.begin(), sample.begin() + static_cast<std::ptrdiff_t>(place), sample.end(), std::greater<>());
  return sample[place];
}

// The best of the scores that are above `least`, or equal to it for up to `ties`; none of them where there are not as
// many as `most`.
template <class S>
MulticlassCut cut_from(const MulticlassInput& in, acc_t<S> least, int64_t ties, int64_t most) {
  std::vector<acc_t<S>> above;
  int64_t equal = 0;
  each_candidate<S>(in, {static_cast<double>(least), ties, 0, false}, [&](int64_t, int64_t, acc_t<S> score) {
    if (score > least) above.push_back(score);
    else ++equal;
  });
  const int64_t found = static_cast<int64_t>(above.size());
  if (found + equal < most) return {static_cast<double>(least), ties, 0, false};
  if (found <= most) return {static_cast<double>(least), most - found, most, false};
  const auto last = above.begin() + (most - 1);
  std::nth_element(above.begin(), last, above.end(), std::greater<>());
  const int64_t better = std::count_if(above.begin(), last, [&](acc_t<S> score) { return score > *last; });
  return {static_cast<double>(*last), most - better, most, false};
}

template <class S> MulticlassCut cut_of(const MulticlassInput& in, int64_t most) {
  const auto threshold = static_cast<acc_t<S>>(in.score_threshold);
  const int64_t count = count_above<S>(in, threshold);
  if (count / 4 <= most) return {static_cast<double>(threshold), 0, count, true};
  const acc_t<S> least = guess_least<S>(in, threshold, most);
  const MulticlassCut cut = cut_from<S>(in, least, least > threshold ? count : 0, most);
  return cut.count > 0 ? cut : cut_from<S>(in, threshold, 0, most);
}

}  // namespace

MulticlassCut multiclass_cut(const MulticlassInput& in, int64_t most) {
  return dispatch(in.score_dtype, [&](auto s) { return cut_of<decltype(s)>(in, most); });
}

void multiclass_gather(const MulticlassInput& in, const MulticlassCut& cut, void* boxes, void* scores,
                       int64_t* labels) {
  dispatch(in.score_dtype, [&](auto s) {
    using S = decltype(s);
    dispatch(in.dtype, [&](auto t) {
      using T = decltype(t);
      T* box = static_cast<T*>(boxes);
      S* score = static_cast<S*>(scores);
      each_candidate<S>(in, cut, [&](int64_t row, int64_t c, acc_t<S>) {
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
